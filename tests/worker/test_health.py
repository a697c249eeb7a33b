"""The worker's health check: a sign of life of this machine, and not too old."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.records import WorkerRecord
from service.jobs.repository import JobRepository, now
from service.settings import Settings
from worker.health import check

Sessions = sessionmaker[Session]


def sign_in(sessions: Sessions, *names: str, ago: float = 0) -> None:
    with sessions.begin() as session:
        for name in names:
            JobRepository(session).note_worker(name, "cpu", "2 CPU cores", timedelta(hours=1))
        session.execute(update(WorkerRecord).values(seen_at=now() - timedelta(seconds=ago)))


@pytest.mark.parametrize(
    ("workers", "ago", "healthy", "words"),
    [
        (["here:1"], 0, True, "signed in 0."),
        (["here:1"], 19, True, "signed in 19."),
        (["here:1"], 21, False, "signed in 21."),
        (["there:1", "here-too:1"], 0, False, "no worker of here has signed in"),
        ([], 0, False, "no worker of here has signed in"),
    ],
)
def test_a_worker_is_healthy_while_it_signs_in(
    settings: Settings, sessions: Sessions, workers: list[str], ago: float, healthy: bool, words: str
) -> None:
    sign_in(sessions, *workers, ago=ago)
    found, why = check(settings, "here")
    assert found is healthy
    assert words in why


def test_a_database_that_does_not_answer_is_told(settings: Settings, sessions: Sessions) -> None:
    with sessions.begin() as session:
        session.connection().exec_driver_sql("DROP TABLE workers")
    healthy, why = check(settings, "here")
    assert not healthy
    assert why.startswith("the database cannot be asked: ")


def test_it_is_one_line_and_needs_no_torch(settings: Settings, sessions: Sessions) -> None:
    sign_in(sessions, "there:1")
    argv = [sys.executable, "-X", "importtime", "-m", "worker.health"]
    environment = {
        "PYTHONPATH": ":".join(sys.path),
        "AQUANT_DATA_DIR": str(settings.data_dir),
        "AQUANT_DATABASE_URL": settings.database_url or "",
    }
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    (why,) = done.stdout.splitlines()
    assert (done.returncode, why.endswith("has signed in")) == (1, True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sqlalchemy" in imported
    assert not imported & {"torch", "numpy", "celery"}

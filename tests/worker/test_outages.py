"""A worker meets a database or a store that goes away: it warns, waits, and goes on."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib import import_module

import numpy as np
import pytest
import torch
from job_rows import not_overdue
from servers import S3, Gate, PostgreSQL, Storage
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.progress import Progress
from service.artifacts import job_prefix, open_artifacts
from service.jobs.database import open_database
from service.jobs.queue import JobQueue
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.states import JobState
from service.settings import Settings
from worker import presence
from worker.lease import Lease
from worker.presence import worker_name
from worker.probe import Found

behind_a_database = pytest.mark.parametrize("storage", ["postgresql-folder"], indirect=True)
behind_a_store = pytest.mark.parametrize("storage", ["sqlite-s3"], indirect=True)

Sessions = sessionmaker[Session]
MakeRunner = Callable[[Settings, Callable[..., None]], Callable[[], JobState | None]]


@pytest.fixture
def database(settings: Settings, postgresql: PostgreSQL) -> Iterator[tuple[Gate, Settings]]:
    """A gate before the database, and the settings that lead through it."""
    assert settings.database_url is not None
    with Gate(postgresql.port) as gate:
        url = settings.database_url.replace(f":{postgresql.port}/", f":{gate.port}/")
        yield gate, settings.model_copy(update={"database_url": url})


@pytest.fixture
def store(storage: Storage, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:  # noqa: ARG001  (it comes after)
    """A gate before the store."""
    with Gate(s3.port) as gate:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment(gate.port)["AWS_ENDPOINT_URL"])
        yield gate


@pytest.fixture
def make_runner(monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRunner]:
    """Makes a runner whose work is ``work``."""
    made = []

    def make(settings: Settings, work: Callable[..., None]) -> Callable[[], JobState | None]:
        assert settings.broker_url is not None
        monkeypatch.setenv("AQUANT_BROKER_URL", settings.broker_url)
        tasks = import_module("worker.tasks")
        monkeypatch.setattr(tasks, "STORE_POLL_SECONDS", 0.05)
        monkeypatch.setattr(JobQueue, "announce", lambda *_: None)  # there is no broker here
        runner = tasks.JobRunner(settings, "cpu")
        monkeypatch.setattr(runner, "_quantize", work)
        made.append(runner)
        return runner.run

    yield make
    for runner in made:
        runner._sessions.kw["bind"].dispose()
        runner._queue.close()


def until(reached: Callable[[], object]) -> None:
    for _ in range(400):
        if reached():
            return
        threading.Event().wait(0.05)
    raise AssertionError("nothing happened")


def queued(sessions: Sessions, claimed: Callable[..., Claim]) -> str:
    """A job that has been tried once."""
    claim = claimed()
    with sessions.begin() as session:
        assert JobRepository(session).give_back(claim, 9, {}) == JobState.QUEUED
    return claim.job_id


def shown(sessions: Sessions, job_id: str) -> JobRecord:
    with sessions() as session:
        return JobRepository(session).get(job_id)


@behind_a_database
def test_a_short_outage_of_the_database_does_not_stop_the_work(
    database: tuple[Gate, Settings],
    sessions: Sessions,
    claimed: Callable[..., Claim],
    caplog: pytest.LogCaptureFixture,
) -> None:
    gate, settings = database
    engine = open_database(settings)
    claim = claimed()
    with Lease(claim, settings, sessionmaker(engine), not_overdue) as lease:
        gate.shut()
        until(lambda: "could not be renewed" in caplog.text)
        gate.open()
        lease.report(Progress("nearest"))
        until(lambda: shown(sessions, claim.job_id).stage == "nearest")
        lease.check()
    engine.dispose()
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@behind_a_database
def test_a_worker_signs_in_when_the_database_is_back(
    database: tuple[Gate, Settings],
    sessions: Sessions,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def names() -> list[str]:
        with sessions() as session:
            return [worker.name for worker in JobRepository(session).workers()]

    gate, settings = database
    monkeypatch.setattr(presence, "SIGN_SECONDS", 0.02)
    gate.shut()
    sign = presence.Presence(settings, Found("cpu", "2 CPU cores"))
    sign.start()
    until(lambda: "sign of life" in caplog.text)
    gate.open()
    until(lambda: names() == [worker_name()])
    sign.stop()
    assert names() == []
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@behind_a_database
def test_a_job_without_a_database_waits_for_the_reaper(
    make_runner: MakeRunner, database: tuple[Gate, Settings], sessions: Sessions, claimed: Callable[..., Claim]
) -> None:
    def fail(*_: object) -> None:
        gate.shut()
        raise ValueError("the work went wrong")

    gate, settings = database
    job_id = queued(sessions, claimed)
    run = make_runner(settings, fail)
    gate.shut()
    assert run() is None
    assert shown(sessions, job_id).state == JobState.QUEUED
    gate.open()
    assert run() is None
    job = shown(sessions, job_id)
    assert (job.state, job.attempt) == (JobState.RUNNING, 2)
    assert job.lease_expires_at is not None


@behind_a_store
def test_a_job_waits_for_the_store_and_is_tried_again(
    make_runner: MakeRunner, store: Gate, settings: Settings, sessions: Sessions, claimed: Callable[..., Claim]
) -> None:
    def read(*_: object) -> None:
        store.shut()
        try:
            artifacts.get_bytes("jobs/job/model")
        finally:
            back.start()

    back = threading.Timer(0.5, store.open)
    job_id = queued(sessions, claimed)
    artifacts = open_artifacts(settings.artifacts)
    assert make_runner(settings, read)() == JobState.QUEUED
    assert not back.is_alive()  # not before the store was back
    artifacts.check()
    assert shown(sessions, job_id).attempt == 2


@pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)
def test_a_store_that_lists_but_does_not_store_is_not_back_yet(
    make_runner: MakeRunner, settings: Settings, sessions: Sessions, claimed: Callable[..., Claim]
) -> None:
    job_id = queued(sessions, claimed)
    artifacts = open_artifacts(settings.artifacts)
    folder = settings.data_dir / "artifacts" / job_prefix(job_id)
    back = threading.Timer(0.5, folder.unlink)

    def read(*_: object) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.touch()  # a file where the job's folder should be
        artifacts.check()
        back.start()
        artifacts.try_out(job_prefix(job_id))

    assert make_runner(settings, read)() == JobState.QUEUED
    assert not back.is_alive()
    assert artifacts.keys(job_prefix(job_id)) == []


@behind_a_store
def test_a_job_that_waits_for_the_store_can_be_cancelled(
    make_runner: MakeRunner, store: Gate, settings: Settings, sessions: Sessions, claimed: Callable[..., Claim]
) -> None:
    def read(*_: object) -> None:
        store.shut()
        with sessions.begin() as session:
            JobRepository(session).cancel(job_id)
        artifacts.get_bytes("jobs/job/model")

    job_id = queued(sessions, claimed)
    artifacts = open_artifacts(settings.artifacts)
    assert make_runner(settings, read)() == JobState.CANCELLED


@pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)
def test_a_job_that_meets_a_full_disk_is_tried_again_then_fails_with_the_reason(
    make_runner: MakeRunner, settings: Settings, sessions: Sessions, claimed: Callable[..., Claim]
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    job_id = queued(sessions, claimed)  # after its first attempt
    run = make_runner(settings, write)
    assert [run() for _ in range(settings.max_attempts - 1)] == [JobState.QUEUED, JobState.FAILED]
    error = shown(sessions, job_id).error
    assert error is not None
    assert error["code"] == "disk_full"


@pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)
@pytest.mark.parametrize("take", [torch.empty, np.empty])
def test_a_job_for_which_memory_does_not_do_fails_with_the_reason(
    make_runner: MakeRunner,
    settings: Settings,
    sessions: Sessions,
    claimed: Callable[..., Claim],
    take: Callable[[int], object],
) -> None:
    job_id = queued(sessions, claimed)
    assert make_runner(settings, lambda *_: take(1 << 50))() == JobState.FAILED
    error = shown(sessions, job_id).error
    assert error is not None
    assert error["code"] == "memory_exceeded"


@pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)
@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("AQUANT_DATABASE_URL", "postgresql://u:secret@127.0.0.1:1/x", "Check AQUANT_DATABASE_URL"),
        ("AQUANT_ARTIFACTS_URL", "ftp://host/x", "'ftp://host/x' is neither a folder nor a bucket"),
    ],
)
def test_worker_does_not_start_on_what_it_cannot_use(settings: Settings, variable: str, value: str, words: str) -> None:
    environment = {
        **os.environ,
        "AQUANT_DATA_DIR": str(settings.data_dir),
        "AQUANT_BROKER_URL": str(settings.broker_url),
        variable: value,
    }
    argv = [sys.executable, "-c", "from worker import celery_app; celery_app.worker_init.send(None)"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert "secret" not in done.stderr

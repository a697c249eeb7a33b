"""Work that does not stop is ended with its process, and its job as it should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from job_rows import claim, state
from servers import PAIRS
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts, blocks_prefix
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.states import JobState
from service.settings import Settings

pytestmark = pytest.mark.parametrize("storage", PAIRS[::3], indirect=True)

Sessions = sessionmaker[Session]
STUBBORN = """
import hashlib
from worker import lease, tasks
lease.STOP_SECONDS = lease.HAND_ON_SECONDS = 0.2
def work(*_):
    print("at work", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # no signal gets through to Python
from worker.celery_app import _begin_child
_begin_child()
runner = tasks.JobRunner(tasks.settings, "cpu")
runner._quantize = work
runner.run()
"""


def environment_of(settings: Settings) -> dict[str, str]:
    return {
        **os.environ,
        "AQUANT_DATA_DIR": str(settings.data_dir),
        "AQUANT_DATABASE_URL": settings.database,
        "AQUANT_ARTIFACTS_URL": settings.artifacts,
        "AQUANT_BROKER_URL": str(settings.broker_url),
    }


@contextmanager
def at_work(settings: Settings, **more: str) -> Iterator[subprocess.Popen[str]]:
    """A worker's child that has taken the job and will not stop by itself."""
    argv = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(argv, env=environment_of(settings) | more, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        yield process


@pytest.mark.parametrize(
    ("limits", "ends", "code"),
    [({}, JobState.CANCELLED, None), ({"AQUANT_JOB_SECONDS": "5"}, JobState.FAILED, "time_limit_exceeded")],
)
def test_a_process_in_an_endless_step_is_ended_with_its_job(
    settings: Settings,
    sessions: Sessions,
    artifacts: Artifacts,
    claimed: Callable[..., Claim],
    limits: dict[str, str],
    ends: JobState,
    code: str | None,
) -> None:
    """Cancelled, or over its time: the row says so, its blocks are gone, and the process with all that it held."""
    held = claimed(block=("safetensors", b"x"))
    with sessions.begin() as session:
        JobRepository(session).give_back(held, 9, {})
    artifacts.put_file(blocks_prefix("job") + "0", settings.data_dir.parent / "block")
    with at_work(settings, **limits) as process:
        if not limits:
            with sessions.begin() as session:
                JobRepository(session).cancel("job")
        assert process.wait(60) == -signal.SIGKILL
    assert state(sessions, "job") == ends
    with sessions() as session:
        error = session.get_one(JobRecord, "job").error
    assert (error or {}).get("code") == code
    assert artifacts.keys(blocks_prefix("job")) == []
    with pytest.raises(AssertionError):
        claim(sessions, "job")


def test_a_worker_that_ends_hands_on_the_job_even_in_an_endless_step(
    settings: Settings, sessions: Sessions, artifacts: Artifacts, claimed: Callable[..., Claim]
) -> None:
    """Long before its lease runs out, with the blocks it has finished, and for as many attempts as before."""
    held = claimed(block=("safetensors", b"x"))
    with sessions.begin() as session:
        JobRepository(session).give_back(held, 9, {})
    artifacts.put_file(blocks_prefix("job") + "0", settings.data_dir.parent / "block")
    with at_work(settings) as process:
        process.send_signal(signal.SIGUSR2)
        assert process.wait(60) == -signal.SIGKILL
    with sessions() as session:
        job = session.get_one(JobRecord, "job")
        assert (job.state, job.attempt, job.handed_on, job.error) == (JobState.QUEUED, 2, 1, None)
    assert artifacts.keys(blocks_prefix("job")) == [blocks_prefix("job") + "0"]
    claim(sessions, "job")


def test_a_worker_that_ends_takes_no_job(settings: Settings, sessions: Sessions, claimed: Callable[..., Claim]) -> None:
    held = claimed()
    with sessions.begin() as session:
        JobRepository(session).give_back(held, 9, {})
    code = "from worker import tasks; tasks.told_to_end.set(); print(tasks.JobRunner(tasks.settings, 'cpu').run())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment_of(settings), capture_output=True, text=True, check=True
    )
    assert done.stdout == "None\n"
    claim(sessions, "job")

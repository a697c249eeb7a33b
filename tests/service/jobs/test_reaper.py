"""What a dead worker or a forgetful broker lost is found again."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from servers import PAIRS
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts, blocks_prefix, job_prefix
from service.jobs.queue import JobQueue, QueueDownError
from service.jobs.reaper import ORPHAN_SECONDS, Reaper
from service.jobs.repository import JobRepository, now
from service.jobs.states import JobState
from service.settings import Settings

pytestmark = pytest.mark.parametrize("storage", PAIRS, indirect=True)

Sessions = sessionmaker[Session]


@pytest.fixture
def reaper(settings: Settings, sessions: Sessions, queue: JobQueue, artifacts: Artifacts) -> Reaper:
    return Reaper(settings, sessions, queue, artifacts)


def test_job_of_a_silent_worker_goes_back_to_the_queue_then_fails(
    reaper: Reaper,
    sessions: Sessions,
    queue: JobQueue,
    artifacts: Artifacts,
    add_job: Callable[[], str],
    tmp_path: Path,
) -> None:
    job_id = add_job()
    (tmp_path / "block").write_bytes(b"learned")
    artifacts.put_file(blocks_prefix(job_id) + "0", tmp_path / "block")
    for attempt in (1, 2, 3):
        assert artifacts.keys(blocks_prefix(job_id)) != []  # for the next attempt
        with sessions.begin() as session:
            assert JobRepository(session).claim(job_id, "dead", timedelta(seconds=-1)) is not None
        reaper.round()
        assert queue.depth("cpu") == min(attempt, 2)
    with sessions() as session:
        job = JobRepository(session).get(job_id)
        assert job.state == JobState.FAILED
        assert job.error is not None
        assert job.error["code"] == "worker_lost"
        assert "3 times" in job.error["detail"]
    assert artifacts.keys(blocks_prefix(job_id)) == []


def test_unannounced_job_is_announced_once(
    reaper: Reaper, settings: Settings, sessions: Sessions, queue: JobQueue, add_job: Callable[[], str]
) -> None:
    job_id = add_job()
    reaper.round()
    assert queue.depth("cpu") == 0  # its submitter may be about to announce it
    with sessions.begin() as session:
        JobRepository(session).get(job_id).created_at = now() - timedelta(seconds=settings.renudge_seconds + 1)
    reaper.round()
    assert queue.depth("cpu") == 0  # nobody would hear of it
    with sessions.begin() as session:
        JobRepository(session).note_worker("a", "cpu", "", timedelta(minutes=1))
        JobRepository(session).note_worker("b", "cpu", "", timedelta(minutes=1))
    reaper.round()
    reaper.round()
    assert (queue.depth("cpu"), queue.depth("gpu")) == (1, 0)


def test_files_without_a_job_are_swept_when_old(
    reaper: Reaper,
    artifacts: Artifacts,
    add_job: Callable[[], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = add_job()
    (tmp_path / "model").write_bytes(b"x")
    for name in (known, "orphan", "other"):
        artifacts.put_file(f"jobs/{name}/attempt-1/model", tmp_path / "model")
    reaper.sweep_orphans()
    assert len(artifacts.keys("jobs")) == 3  # uploads under way, perhaps
    later = time.time() + ORPHAN_SECONDS + 60
    monkeypatch.setattr(time, "time", lambda: later)
    reaper.sweep_orphans()
    assert artifacts.keys("jobs") == [f"jobs/{known}/attempt-1/model"]


def test_jobs_are_deleted_once_they_have_been_kept_long_enough(
    settings: Settings,
    sessions: Sessions,
    queue: JobQueue,
    artifacts: Artifacts,
    add_job: Callable[[], str],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    jobs = {name: add_job() for name in ("old", "recent", "running", "queued")}
    for name, job_id in jobs.items():
        artifacts.put_file(f"{job_prefix(job_id)}model", tmp_path / "file")
        if name == "queued":
            continue
        with sessions.begin() as session:
            claim = JobRepository(session).claim(job_id, "worker", timedelta(seconds=60))
            assert claim is not None
            if name != "running":
                JobRepository(session).finish(claim, JobState.FAILED, "intake")
    with sessions.begin() as session:
        JobRepository(session).get(jobs["old"]).finished_at = now() - timedelta(seconds=3601)
    for keep, left in ((None, set(jobs)), (3600.0, set(jobs) - {"old"})):
        Reaper(settings.model_copy(update={"keep_seconds": keep}), sessions, queue, artifacts).round()
        with sessions() as session:
            assert JobRepository(session).existing(list(jobs.values())) == {jobs[name] for name in left}
        assert {name for name, job_id in jobs.items() if artifacts.keys(job_prefix(job_id))} == left


def test_absent_broker_is_named(settings: Settings) -> None:
    queue = JobQueue(settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"}))
    with pytest.raises(QueueDownError, match="cannot be reached"):
        queue.announce("x", ["cpu"])
    with pytest.raises(QueueDownError, match="cannot be reached"):
        queue.depth("cpu")
    queue.close()

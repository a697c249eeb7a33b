"""Of two writers, one wins: claims, fences and the ways a job ends."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.errors import CursorError, JobNotFoundError, JobStateError
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import Claim, JobRepository, now
from service.jobs.states import JobState

MINUTE = timedelta(minutes=1)
PAST = timedelta(seconds=-1)
ERROR = {"code": "worker_lost"}

AddJob = Callable[..., str]
Sessions = sessionmaker[Session]


def claim(sessions: Sessions, job_id: str, lease: timedelta = MINUTE) -> Claim:
    with sessions.begin() as session:
        taken = JobRepository(session).claim(job_id, "me", lease)
    assert taken is not None
    return taken


def state(sessions: Sessions, job_id: str) -> JobState:
    with sessions() as session:
        return JobRepository(session).get(job_id).state


def test_of_many_claims_on_a_job_one_wins(sessions: Sessions, add_job: AddJob) -> None:
    jobs = [add_job() for _ in range(10)]

    def try_all(owner: str) -> list[str]:
        won = []
        for job_id in jobs:
            with sessions.begin() as session:
                if JobRepository(session).claim(job_id, owner, MINUTE) is not None:
                    won.append(job_id)
        return won

    with ThreadPoolExecutor(4) as pool:
        winners = [job_id for won in pool.map(try_all, "abcd") for job_id in won]
    assert sorted(winners) == jobs


def test_an_outlived_worker_can_write_nothing(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    old = claim(sessions, job_id, PAST)
    with sessions.begin() as session:
        assert JobRepository(session).take_back(job_id, 1, 3, ERROR) == JobState.QUEUED
    new = claim(sessions, job_id)
    artifact = ArtifactRecord(job_id=job_id, name="report", key="k", format="json", size=1, sha256="0")
    with sessions.begin() as session:
        repository = JobRepository(session)
        assert (old.attempt, new.attempt) == (1, 2)
        assert repository.renew(old, MINUTE, "save", None) is None
        assert repository.finish(old, JobState.SUCCEEDED, "save", artifacts=[artifact]) is None
        assert repository.give_back(old, 3, ERROR) is None
    with sessions.begin() as session:
        repository = JobRepository(session)
        assert repository.renew(new, MINUTE, "save", None) == JobState.RUNNING
        assert repository.get(job_id).artifacts == []
        assert repository.finish(new, JobState.SUCCEEDED, "save", artifacts=[artifact]) == JobState.SUCCEEDED
        assert repository.finish(new, JobState.FAILED, "save") is None


def test_only_an_expired_lease_is_taken_back(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    claim(sessions, job_id)
    with sessions.begin() as session:
        assert JobRepository(session).expired() == []
        assert JobRepository(session).take_back(job_id, 1, 3, ERROR) is None
    assert state(sessions, job_id) == JobState.RUNNING


def test_the_last_attempt_fails_with_a_reason(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    for attempt in (1, 2, 3):
        claim(sessions, job_id, PAST)
        with sessions.begin() as session:
            assert JobRepository(session).expired() == [(job_id, attempt)]
            ended = JobRepository(session).take_back(job_id, attempt, 3, ERROR)
        assert ended == (JobState.FAILED if attempt == 3 else JobState.QUEUED)
    with sessions() as session:
        job = JobRepository(session).get(job_id)
        assert (job.error, job.lease_owner) == (ERROR, None)
        assert job.finished_at is not None


def test_cancelling_ends_as_cancelled_whatever_the_worker_says(sessions: Sessions, add_job: AddJob) -> None:
    for ending in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED):
        job_id = add_job()
        held = claim(sessions, job_id)
        with sessions.begin() as session:
            assert JobRepository(session).cancel(job_id).state == JobState.CANCELLING
        with sessions.begin() as session:
            assert JobRepository(session).renew(held, MINUTE, "x", None) == JobState.CANCELLING
            assert JobRepository(session).finish(held, ending, "save") == JobState.CANCELLED


def test_cancelling_job_of_a_dead_worker_is_cancelled(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    claim(sessions, job_id, PAST)
    with sessions.begin() as session:
        JobRepository(session).cancel(job_id)
        assert JobRepository(session).take_back(job_id, 1, 3, ERROR) == JobState.CANCELLED


def test_cancel_of_queued_and_finished(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    with sessions.begin() as session:
        assert JobRepository(session).cancel(job_id).state == JobState.CANCELLED
        assert JobRepository(session).cancel(job_id).state == JobState.CANCELLED
        assert JobRepository(session).claim(job_id, "me", MINUTE) is None
    other = add_job()
    held = claim(sessions, other)
    with sessions.begin() as session:
        JobRepository(session).finish(held, JobState.FAILED, "nearest", ERROR)
        with pytest.raises(JobStateError, match="already failed"):
            JobRepository(session).cancel(other)
        with pytest.raises(JobNotFoundError):
            JobRepository(session).cancel("nobody")


def test_a_held_job_is_not_deleted(sessions: Sessions, add_job: AddJob) -> None:
    artifact = ArtifactRecord(name="model", key="k", format="onnx", size=1, sha256="0")
    job_id = add_job([artifact])
    held = claim(sessions, job_id)
    with sessions.begin() as session, pytest.raises(JobStateError, match="is running"):
        JobRepository(session).delete(job_id)
    with sessions.begin() as session:
        JobRepository(session).finish(held, JobState.FAILED, "nearest", ERROR)
        JobRepository(session).delete(job_id)
    with sessions() as session:
        assert session.get(ArtifactRecord, (job_id, "model")) is None
        with pytest.raises(JobNotFoundError):
            JobRepository(session).delete(job_id)


def test_pages_are_newest_first_and_complete(sessions: Sessions, add_job: AddJob) -> None:
    jobs = [add_job() for _ in range(7)]
    same_time = now()
    with sessions.begin() as session:
        for job_id in jobs[2:5]:  # the cursor must tell equal times apart
            session.get_one(JobRecord, job_id).created_at = same_time
    with sessions() as session:
        repository = JobRepository(session)
        whole = [job.id for job in repository.page(100).jobs]
        assert sorted(whole) == jobs
        assert whole[0] == jobs[4]
        paged, cursor = [], None
        while True:
            page = repository.page(2, cursor)
            paged += [job.id for job in page.jobs]
            cursor = page.cursor
            if cursor is None:
                break
        assert paged == whole
        assert repository.page(100, state=JobState.RUNNING).jobs == []
        with pytest.raises(CursorError, match="nonsense"):
            repository.page(2, "nonsense")


def test_queue_position(sessions: Sessions, add_job: AddJob) -> None:
    first, second, third = add_job(), add_job(), add_job()
    claim(sessions, first)
    with sessions() as session:
        repository = JobRepository(session)
        positions = [repository.queue_position(repository.get(job)) for job in (first, second, third)]
    assert positions == [None, 0, 1]

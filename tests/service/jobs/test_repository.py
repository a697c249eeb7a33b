"""Of two writers, one wins: claims, fences and the ways a job ends."""

from __future__ import annotations

import base64
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone

import pytest
from job_rows import MINUTE, claim, state
from servers import DATABASES
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.errors import CursorError, JobNotFoundError, JobStateError
from service.jobs.records import ArtifactRecord, JobRecord, WorkerRecord
from service.jobs.repository import MOST_HANDED_ON, JobRepository, now
from service.jobs.states import JobState
from service.jobs.tallies import Tallies

pytestmark = pytest.mark.parametrize("storage", DATABASES, indirect=True)

PAST = timedelta(seconds=-1)
ERROR = {"code": "worker_lost"}

AddJob = Callable[..., str]
Sessions = sessionmaker[Session]


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


def test_what_a_worker_hands_on_does_not_count_against_the_job(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    for _ in range(5):
        held = claim(sessions, job_id)
        with sessions.begin() as session:
            assert JobRepository(session).hand_on(held) == JobState.QUEUED
            assert JobRepository(session).hand_on(held) is None
    for ends in (JobState.QUEUED, JobState.FAILED):
        held = claim(sessions, job_id)
        with sessions.begin() as session:
            assert JobRepository(session).give_back(held, 2, ERROR) == ends
    assert held.attempt == 7
    with sessions() as session:
        assert [series.count for series in Tallies(session).all() if series.what == "retry"] == [1]


def test_a_job_that_too_many_workers_hand_on_may_be_why_they_end(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    for number in range(MOST_HANDED_ON + 1):
        held = claim(sessions, job_id, PAST)
        with sessions.begin() as session:
            assert (JobRepository(session).hand_on(held) is None) == (number == MOST_HANDED_ON)
    with sessions.begin() as session:
        assert JobRepository(session).take_back(job_id, held.attempt, 1, ERROR) == JobState.FAILED


def test_a_cancelled_job_is_not_handed_on(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    held = claim(sessions, job_id)
    with sessions.begin() as session:
        JobRepository(session).cancel(job_id)
        assert JobRepository(session).hand_on(held) == JobState.CANCELLED


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


def test_a_job_cancelled_between_two_attempts_is_counted(sessions: Sessions, add_job: AddJob) -> None:
    """One that was never begun is not: it has no duration."""
    begun, fresh = add_job(), add_job()
    with sessions.begin() as session:
        claim = JobRepository(session).claim(begun, "worker", timedelta(seconds=60))
        assert claim is not None
        assert JobRepository(session).give_back(claim, 9, {}) == JobState.QUEUED
        for job_id in (begun, begun, fresh):
            assert JobRepository(session).cancel(job_id).state == JobState.CANCELLED
    with sessions() as session:
        (series,) = Tallies(session).all()
    assert (series.what, series.state, series.count) == ("job", "cancelled", 1)


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


def test_times_keep_their_instant(sessions: Sessions, add_job: AddJob) -> None:
    india = timezone(timedelta(hours=5, minutes=30))
    before = datetime.now(india)
    job_id = add_job()
    first = claim(sessions, job_id, PAST)
    with sessions.begin() as session:
        JobRepository(session).take_back(job_id, first.attempt, 3, ERROR)
    claim(sessions, job_id)
    with sessions.begin() as session:
        session.execute(update(JobRecord).values(nudged_at=before))
    with sessions() as session:
        job = JobRepository(session).get(job_id)
        times = (job.nudged_at, job.created_at, job.started_at, job.lease_expires_at)
    assert all(at is not None and at.utcoffset() == timedelta(0) for at in times)
    assert times[0] == before
    assert sorted(times) == list(times)
    assert now() < times[3] < now() + MINUTE
    cancelled = add_job()
    with sessions.begin() as session:
        ended = JobRepository(session).cancel(cancelled)
        assert ended.finished_at is not None
        assert ended.created_at <= ended.finished_at <= now()


@pytest.mark.parametrize("job_id", ["a\0b", "\0", "x" * 10_000, "\N{SNOWMAN}", "'; DROP TABLE jobs; --"])
def test_an_id_that_was_made_up_is_no_job(sessions: Sessions, add_job: AddJob, job_id: str) -> None:
    add_job()
    with sessions() as session:
        repository = JobRepository(session)
        for call in (repository.get, repository.cancel, repository.delete):
            with pytest.raises(JobNotFoundError):
                call(job_id)
        assert repository.claim(job_id, "me", MINUTE) is None
        cursor = base64.urlsafe_b64encode(f"{now().isoformat()} {job_id.split(' ')[0]}".encode()).decode()
        assert len(repository.page(2, cursor).jobs) == 1


def test_documents_come_back_as_they_went(sessions: Sessions, add_job: AddJob) -> None:
    document = {"text": "a\0b \N{SNOWMAN}\ud800 'q' %s :x", "list": [1, 1e300, None, True], "": {}}
    held = claim(sessions, add_job())
    with sessions.begin() as session:
        repository = JobRepository(session)
        repository.renew(held, MINUTE, "reconstruct", document)
        assert repository.get(held.job_id).progress == document
        repository.renew(held, MINUTE, "reconstruct", None)
        assert repository.get(held.job_id).progress is None
        assert session.scalar(select(func.count()).where(JobRecord.progress.is_(None))) == 1


def test_of_very_many_ids_the_jobs_are_found(sessions: Sessions, add_job: AddJob) -> None:
    known = {add_job(), add_job()}
    with sessions() as session:
        assert JobRepository(session).existing([*(f"none-{n}" for n in range(70_000)), *known]) == known


def test_a_workers_signs_of_life(sessions: Sessions) -> None:
    for name in ("a", "b", "a"):
        with sessions.begin() as session:
            JobRepository(session).note_worker(name, "cpu", "2 CPU cores", MINUTE)
    with sessions.begin() as session:
        session.execute(update(WorkerRecord).where(WorkerRecord.name == "b").values(seen_at=now() - 2 * MINUTE))
        JobRepository(session).note_worker("a", "cpu", "2 CPU cores", MINUTE)
    with sessions() as session:
        assert [worker.name for worker in JobRepository(session).workers()] == ["a"]


def test_pages_are_complete_when_the_clocks_are_put_back(sessions: Sessions, add_job: AddJob) -> None:
    jobs = [add_job() for _ in range(4)]
    first = datetime(2026, 10, 25, 0, 15, tzinfo=UTC)  # 2:15 in Berlin, as an hour later
    with sessions.begin() as session:
        for number, job_id in enumerate(jobs):
            session.get_one(JobRecord, job_id).created_at = first + number * timedelta(minutes=30)
    paged: list[str] = []
    with sessions() as session:
        page = JobRepository(session).page(1)
        while page.cursor is not None:
            paged += [job.id for job in page.jobs]
            page = JobRepository(session).page(1, page.cursor)
    assert [*paged, *(job.id for job in page.jobs)] == jobs[::-1]


def test_queue_position(sessions: Sessions, add_job: AddJob) -> None:
    first, second, third = add_job(), add_job(), add_job()
    claim(sessions, first)
    with sessions() as session:
        repository = JobRepository(session)
        positions = [repository.queue_position(repository.get(job)) for job in (first, second, third)]
    assert positions == [None, 0, 1]

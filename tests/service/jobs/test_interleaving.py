"""What another transaction commits between two statements, as PostgreSQL's READ COMMITTED lets it.

SQLite lets nobody write between two statements of a writer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta

import pytest
from job_rows import MINUTE, claim, state
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.errors import JobNotFoundError, JobStateError
from service.jobs.repository import JobRepository
from service.jobs.states import JobState

pytestmark = pytest.mark.parametrize("storage", ["postgresql-folder"], indirect=True)

PAST = timedelta(seconds=-1)
ERROR = {"code": "worker_lost"}

AddJob = Callable[..., str]
Sessions = sessionmaker[Session]
Intervene = Callable[..., "Iterator[Future[object]]"]


@pytest.fixture
def intervene(engine: Engine, sessions: Sessions) -> Iterator[Intervene]:
    """Has another transaction act once the first statement of this one is through, or the first that begins with
    ``after``, and waits for it to commit, unless it waits itself for a lock that this one holds."""
    pool = ThreadPoolExecutor(1)

    @contextmanager
    def after_a_statement(call: Callable[[JobRepository], object], after: str = "") -> Iterator[Future[object]]:
        other: Future[object] = Future()

        def act() -> None:
            try:
                with sessions.begin() as session:
                    result = call(JobRepository(session))
                other.set_result(result)
            except Exception as error:
                other.set_exception(error)

        begun = False

        @event.listens_for(engine, "after_cursor_execute")
        def listen(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            nonlocal begun
            if not begun and statement.startswith(after):
                begun = True
                wait([pool.submit(act)], timeout=0.5)

        try:
            yield other
        finally:
            event.remove(engine, "after_cursor_execute", listen)

    yield after_a_statement
    pool.shutdown()


@pytest.mark.parametrize("ending", [JobState.SUCCEEDED, JobState.FAILED])
def test_a_cancel_while_a_job_ends_is_told_the_truth(
    sessions: Sessions, add_job: AddJob, intervene: Intervene, ending: JobState
) -> None:
    held = claim(sessions, add_job())
    with intervene(lambda other: other.cancel(held.job_id)) as cancel, sessions.begin() as session:
        ended = JobRepository(session).finish(held, ending, "save")
    assert ended == state(sessions, held.job_id) == ending
    with pytest.raises(JobStateError, match=f"already {ending}"):
        cancel.result(timeout=10)


@pytest.mark.parametrize(("max_attempts", "taken_for"), [(1, JobState.CANCELLED), (3, JobState.QUEUED)])
def test_a_cancel_while_a_job_is_taken_back_is_not_lost(
    sessions: Sessions, add_job: AddJob, intervene: Intervene, max_attempts: int, taken_for: JobState
) -> None:
    """It comes after the look whether the job may be tried again, and before the job fails where it may not."""
    held = claim(sessions, add_job(), PAST)
    with intervene(lambda other: other.cancel(held.job_id)) as cancel, sessions.begin() as session:
        assert JobRepository(session).take_back(held.job_id, 1, max_attempts, ERROR) == taken_for
    cancel.result(timeout=10)
    assert state(sessions, held.job_id) == JobState.CANCELLED


def test_a_cancel_while_a_job_is_handed_on_is_not_lost(
    sessions: Sessions, add_job: AddJob, intervene: Intervene
) -> None:
    held = claim(sessions, add_job())
    with intervene(lambda other: other.cancel(held.job_id)) as cancel, sessions.begin() as session:
        assert JobRepository(session).hand_on(held) == JobState.QUEUED
    cancel.result(timeout=10)
    assert state(sessions, held.job_id) == JobState.CANCELLED


def test_a_job_that_goes_back_to_the_queue_meanwhile_is_cancelled(
    sessions: Sessions, add_job: AddJob, intervene: Intervene
) -> None:
    held = claim(sessions, add_job(), PAST)
    with (
        intervene(lambda other: other.take_back(held.job_id, 1, 3, ERROR)) as taken,
        sessions.begin() as session,
    ):
        JobRepository(session).cancel(held.job_id)
    assert taken.result(timeout=10) == state(sessions, held.job_id) == JobState.CANCELLED


def test_a_job_that_ends_meanwhile_is_deleted(sessions: Sessions, add_job: AddJob, intervene: Intervene) -> None:
    held = claim(sessions, add_job())
    with (
        intervene(lambda other: other.finish(held, JobState.FAILED, "save")) as ended,
        sessions.begin() as session,
    ):
        JobRepository(session).delete(held.job_id)
    assert ended.result(timeout=10) == JobState.FAILED
    with sessions() as session, pytest.raises(JobNotFoundError):
        JobRepository(session).get(held.job_id)


def test_a_claim_that_waits_for_another_comes_to_nothing(
    sessions: Sessions, add_job: AddJob, intervene: Intervene
) -> None:
    job_id = add_job()
    with intervene(lambda other: other.claim(job_id, "second", MINUTE)) as second, sessions.begin() as session:
        assert JobRepository(session).claim(job_id, "first", MINUTE) is not None
        assert not second.done()
    assert second.result(timeout=10) is None


@pytest.mark.parametrize("after", ["", "SELECT count(*)"])
def test_workers_that_take_an_owners_turn_at_once_keep_its_limit(
    sessions: Sessions, add_job: AddJob, intervene: Intervene, after: str
) -> None:
    """The other comes before this one has counted what the owner has under way, or before it takes what it may."""
    first, second = add_job(), add_job()
    with (
        intervene(lambda other: other.claim_next("other", MINUTE, "cpu", 1), after) as other,
        sessions.begin() as session,
    ):
        mine = JobRepository(session).claim_next("me", MINUTE, "cpu", 1)
    assert [claim for claim in (mine, other.result(timeout=10)) if claim is not None] != []
    assert {state(sessions, first), state(sessions, second)} == {JobState.RUNNING, JobState.QUEUED}

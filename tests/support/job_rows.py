"""A worker's claim on a job, and a job's state, each in a transaction of its own."""

from __future__ import annotations

from datetime import timedelta
from typing import NoReturn

from sqlalchemy.orm import Session, sessionmaker

from service.jobs.repository import Claim, JobRepository
from service.jobs.states import JobState

MINUTE = timedelta(minutes=1)


def claim(sessions: sessionmaker[Session], job_id: str, lease: timedelta = MINUTE) -> Claim:
    with sessions.begin() as session:
        taken = JobRepository(session).claim(job_id, "me", lease)
    assert taken is not None
    return taken


def not_overdue(lease: object, stop: BaseException) -> NoReturn:
    """For leases of work that stops when it is told to."""
    raise AssertionError(f"{lease} did not stop: {stop!r}")


def state(sessions: sessionmaker[Session], job_id: str) -> JobState:
    with sessions() as session:
        return JobRepository(session).get(job_id).state

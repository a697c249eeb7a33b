"""What has happened to jobs: events written in the transactions that make them happen, so that none is missed.

Numbers run from 1 without a gap: whoever writes one has just changed the job's row in the same transaction, and holds
it until the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.jobs.records import EventRecord
from service.jobs.states import FINISHED, JobState

EventKind = Literal["state", "stage", "block"]


@dataclass(frozen=True)
class Happening:
    """An event that has no number yet."""

    kind: EventKind
    data: dict[str, Any]


def entered(state: JobState, stage: str | None, attempt: int, error: dict[str, Any] | None = None) -> Happening:
    """A job is in another state."""
    return Happening("state", {"state": str(state), "stage": stage, "attempt": attempt, "error": error})


def is_last(event: EventRecord) -> bool:
    """Whether nothing comes after this event."""
    return event.kind == "state" and event.data["state"] in FINISHED


class JobEvents:
    """Events, within one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, job_id: str, at: datetime, *happenings: Happening) -> None:
        """Write down what has happened; the caller has changed the job's row in this transaction."""
        if not happenings:
            return
        last = self._session.scalar(select(func.max(EventRecord.number)).where(EventRecord.job_id == job_id)) or 0
        self._session.add_all(
            EventRecord(job_id=job_id, number=number, at=at, kind=happening.kind, data=happening.data)
            for number, happening in enumerate(happenings, last + 1)
        )
        self._session.flush()

    def after(self, job_id: str, number: int, limit: int) -> Sequence[EventRecord]:
        """The events after the one of this number, in order."""
        query = select(EventRecord).where(EventRecord.job_id == job_id, EventRecord.number > number)
        return self._session.scalars(query.order_by(EventRecord.number).limit(limit)).all()

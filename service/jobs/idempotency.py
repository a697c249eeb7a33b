"""Submissions that come twice are carried out once: the key goes in with the job, in one transaction.

So there is no state in between to be left behind by a crash, and of two requests at once the database lets one in.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta

from sqlalchemy import delete
from sqlalchemy.orm import Session

from service.jobs.errors import IdempotencyKeyReusedError, IdempotentJobDeletedError
from service.jobs.records import IdempotencyRecord, JobRecord
from service.jobs.repository import now
from service.settings import Settings


class IdempotencyKeys:
    """One owner's keys, within one session."""

    def __init__(self, session: Session, settings: Settings, owner: str | None) -> None:
        self._session, self._owner = session, owner
        self._kept_for = timedelta(seconds=settings.idempotency_seconds)

    def has(self, key: str) -> bool:
        """Whether this key stands for a job."""
        return self._find(key) is not None

    def job_of(self, key: str, fingerprint: str) -> str | None:
        """The job that came of this key; None if it has not been used, or so long ago that it is forgotten.

        Raises:
            IdempotencyKeyReusedError: it was used for something else.
            IdempotentJobDeletedError: the job is gone.
        """
        record = self._find(key)
        if record is None:
            return None
        if record.fingerprint != fingerprint:
            raise IdempotencyKeyReusedError(
                f"The Idempotency-Key {key!r} was used for another request, of job {record.job_id}.",
                "Use a new key for a new job.",
            )
        if self._session.get(JobRecord, record.job_id) is None:
            raise IdempotentJobDeletedError(
                f"The job {record.job_id} of the Idempotency-Key {key!r} has been deleted.",
                "Use a new key to have it run again.",
            )
        return record.job_id

    def of_form(self, token: str, fingerprint: str) -> str:
        """The key of a form that may be changed and sent again.

        It is the form's token, and another, always the same one, for each thing more that is asked for with it; one
        whose job has been deleted is passed over, so that the form makes a new one.
        """
        key = token
        while (record := self._find(key)) is not None:
            if record.fingerprint == fingerprint and self._session.get(JobRecord, record.job_id) is not None:
                break
            key = hashlib.sha256(f"{key}\0{fingerprint}".encode()).hexdigest()
        return key

    def add(self, key: str, fingerprint: str, job_id: str) -> None:
        """Bind a key to a job.

        Raises:
            IntegrityError: another request was first; nothing of this transaction must be kept.
        """
        identity = self._id(key)
        forgotten = IdempotencyRecord.created_at < now() - self._kept_for
        self._session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.id == identity, forgotten))
        self._session.add(
            IdempotencyRecord(id=identity, owner=self._owner, fingerprint=fingerprint, job_id=job_id, created_at=now())
        )
        self._session.flush()

    def _find(self, key: str) -> IdempotencyRecord | None:
        record = self._session.get(IdempotencyRecord, self._id(key), populate_existing=True)
        return record if record is not None and record.created_at >= now() - self._kept_for else None

    def _id(self, key: str) -> str:
        return hashlib.sha256(f"{self._owner or ''}\0{key}".encode()).hexdigest()


def forget(session: Session, before: datetime) -> None:
    """Delete the keys of all owners that are older than this."""
    session.execute(delete(IdempotencyRecord).where(IdempotencyRecord.created_at < before))

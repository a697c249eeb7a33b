"""Whom jobs belong to, what each may use, and what each uses."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.artifacts import UPLOADS
from service.jobs.errors import JobQuotaError, StorageQuotaError
from service.jobs.records import ArtifactRecord, JobRecord, OwnerRecord, UploadRecord
from service.jobs.states import HELD, JobState
from service.settings import Settings

T = TypeVar("T")

JOB_RETRY_SECONDS = 30
"""When to ask again where too many jobs wait: the soonest that makes sense, for who knows when one is done."""


@dataclass(frozen=True)
class Limits:
    """What an owner may use."""

    jobs_queued: int
    jobs_running: int | None
    stored_bytes: int
    upload_bytes: int


@dataclass(frozen=True)
class Usage:
    """What an owner uses."""

    jobs_queued: int
    jobs_running: int
    stored_bytes: int


class OwnerUnknownError(Exception):
    """Nobody of this name has ever had a key."""


def ensure_owner(session: Session, name: str) -> None:
    """Put in an owner's row, if it is not there."""
    if session.get(OwnerRecord, name) is not None:
        return
    try:
        with session.begin_nested():
            session.add(OwnerRecord(name=name))
    except IntegrityError:  # another process was first
        pass


def hold_owner(session: Session, name: str) -> None:
    """Let nobody else who holds this owner go on until this transaction ends: an UPDATE locks its row, or all of
    SQLite, so that what is counted from here on stays true."""
    session.execute(update(OwnerRecord).where(OwnerRecord.name == name).values(name=OwnerRecord.name))


class Account:
    """One owner's limits and use, within one session; None is who comes without a key while there are none."""

    def __init__(self, session: Session, settings: Settings, owner: str | None) -> None:
        self._session, self._settings, self._owner = session, settings, owner

    def limits(self) -> Limits:
        """The owner's own limits, and the settings' where it has none."""
        own = self._session.get(OwnerRecord, self._owner or "", populate_existing=True) or OwnerRecord()
        default = self._settings
        return Limits(
            jobs_queued=_first(own.max_jobs_queued, default.max_jobs_queued),
            jobs_running=_first(own.max_jobs_running, default.max_jobs_running),
            stored_bytes=_first(own.max_stored_bytes, default.max_stored_bytes),
            upload_bytes=_first(own.max_upload_bytes, default.max_upload_bytes),
        )

    def usage(self) -> Usage:
        """What is in use now; files count once for each job they were sent with, and once as uploads."""
        mine = JobRecord.owner == self._owner
        rows = self._session.execute(select(JobRecord.state, func.count()).where(mine).group_by(JobRecord.state))
        jobs = {state: count for state, count in rows}  # noqa: C416  (dict() cannot tell their types)
        own = ArtifactRecord.key.not_like(f"{UPLOADS}%")
        size = self._session.scalar(select(func.sum(ArtifactRecord.size)).join(JobRecord).where(mine, own)) or 0
        size += self._session.scalar(select(func.sum(UploadRecord.size)).where(UploadRecord.owner == self._owner)) or 0
        return Usage(jobs.get(JobState.QUEUED, 0), sum(jobs.get(state, 0) for state in HELD), int(size))

    def check_job(self, size: int) -> None:
        """Whether one more job with files of this many bytes fits; holds the owner until the transaction ends.

        Raises:
            JobQuotaError: too many wait already.
            StorageQuotaError: its files would not fit.
        """
        hold_owner(self._session, self._owner or "")
        limits, usage = self.limits(), self.usage()
        check_queued(limits, usage)
        check_stored(limits, usage, size)

    def check_upload(self, size: int) -> None:
        """Whether an upload of this many bytes fits; holds the owner until the transaction ends.

        Raises:
            StorageQuotaError: it would not.
        """
        hold_owner(self._session, self._owner or "")
        check_stored(self.limits(), self.usage(), size)


def check_queued(limits: Limits, usage: Usage) -> None:
    """Raise JobQuotaError if no further job may wait."""
    if usage.jobs_queued >= limits.jobs_queued:
        raise JobQuotaError(
            f"{usage.jobs_queued} jobs wait already; {limits.jobs_queued} may.",
            "Send it again once one of them has begun, or cancel one.",
            limit=limits.jobs_queued,
            used=usage.jobs_queued,
            retry_after=JOB_RETRY_SECONDS,
        )


def check_stored(limits: Limits, usage: Usage, size: int) -> None:
    """Raise StorageQuotaError if this many bytes more do not fit."""
    if usage.stored_bytes + size > limits.stored_bytes:
        raise StorageQuotaError(
            f"The stored files take {usage.stored_bytes} of {limits.stored_bytes} bytes; {size} more do not fit.",
            "Delete jobs that are no longer needed (DELETE /jobs/ID), or ask the operator for a higher limit.",
            limit=limits.stored_bytes,
            used=usage.stored_bytes,
        )


class Room:
    """The room an owner has for the files of one job that is being sent; all there is where ``usage`` is None."""

    def __init__(self, limits: Limits, usage: Usage | None) -> None:
        self.limits, self._usage, self._sent = limits, usage, 0

    async def admit(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        """The chunks, as long as they fit.

        Raises:
            StorageQuotaError: they do not, together with those before.
        """
        async for chunk in chunks:
            self._sent += len(chunk)
            if self._usage is not None:
                check_stored(self.limits, self._usage, self._sent)
            yield chunk


class OwnerRepository:
    """All owners, for who runs the service; within one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def names(self) -> Sequence[str]:
        """Every owner, "" among them."""
        return self._session.scalars(select(OwnerRecord.name).order_by(OwnerRecord.name)).all()

    def set_limits(self, name: str, **limits: int | None) -> None:
        """Set some of an owner's limits (``max_...``); None goes back to the settings'.

        Raises:
            OwnerUnknownError: there is no such owner.
        """
        record = self._session.get(OwnerRecord, name)
        if record is None:
            raise OwnerUnknownError(f"There is no owner {name!r}. `aquant owners list` has those there are.")
        for limit, value in limits.items():
            setattr(record, limit, value)

    def adopt(self, name: str) -> int:
        """Give an owner the jobs that were made while there were no keys; how many those are."""
        adopted = self._session.scalars(
            update(JobRecord).where(JobRecord.owner.is_(None)).values(owner=name).returning(JobRecord.id)
        ).all()
        return len(adopted)


def _first(own: int | None, default: T) -> int | T:
    return default if own is None else own

"""Whose turn it is: the order in which queued jobs are taken, fair among their owners."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from service.jobs.owners import hold_owner
from service.jobs.records import JobRecord, OwnerRecord
from service.jobs.states import HELD, Device, JobState

_owner = func.coalesce(JobRecord.owner, "")


def next_jobs(session: Session, device: Device, max_running: int | None) -> Iterator[str]:
    """The queued jobs that a worker on this device may take, the one whose turn it is first.

    Next is the owner with the fewest jobs under way, and of those the one whose oldest job waits longest; an owner's
    own jobs go in the order they came. Jobs without an owner count as one owner's. Each owner's oldest is given, for
    a worker that loses the first to another worker. Owners with as many jobs under way as they may have, by their own
    limit or else ``max_running``, are left out.
    """
    under_way = (
        select(_owner.label("owner"), func.count().label("jobs"))
        .where(JobRecord.state.in_(HELD))
        .group_by(_owner)
        .subquery()
    )
    waiting = (
        select(_owner.label("owner"), func.min(JobRecord.created_at).label("since"))
        .where(*_for(device))
        .group_by(_owner)
        .subquery()
    )
    running = func.coalesce(under_way.c.jobs, 0)
    most = func.coalesce(OwnerRecord.max_jobs_running, max_running)
    owners = (
        select(waiting.c.owner, most)
        .outerjoin(under_way, under_way.c.owner == waiting.c.owner)
        .outerjoin(OwnerRecord, OwnerRecord.name == waiting.c.owner)
        .where(or_(most.is_(None), running < most))
        .order_by(running, waiting.c.since)
    )
    for owner, limit in session.execute(owners).all():
        if limit is not None and not _has_room(session, owner, limit):
            continue
        oldest = session.scalar(
            select(JobRecord.id)
            .where(*_for(device), _owner == owner)
            .order_by(JobRecord.created_at, JobRecord.id)
            .limit(1)
        )
        if oldest is not None:
            yield oldest


def _has_room(session: Session, owner: str, limit: int) -> bool:
    """Whether an owner may have one more job under way; no other worker can count them until the transaction ends."""
    hold_owner(session, owner)
    count = select(func.count()).select_from(JobRecord).where(JobRecord.state.in_(HELD), _owner == owner)
    return (session.scalar(count) or 0) < limit


def runs_on(device: Device) -> ColumnElement[bool]:
    """Jobs that may run on this device: those bound to it, and those bound to none yet."""
    return or_(JobRecord.device.is_(None), JobRecord.device == device)


def _for(device: Device) -> tuple[ColumnElement[bool], ...]:
    return JobRecord.state == JobState.QUEUED, runs_on(device)

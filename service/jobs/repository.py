"""All SQL on jobs: every change of state is one guarded UPDATE, so that two writers can never both win.

The caller owns the transaction (``with sessions.begin() as session``); nothing here commits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Update, and_, case, delete, func, literal, or_, select, true, tuple_, update
from sqlalchemy.orm import Session, lazyload

from aquant_core.config import QuantizationConfig
from service.jobs.errors import JobNotFoundError, JobStateError
from service.jobs.events import Happening, JobEvents, entered
from service.jobs.paging import Page, read_cursor, write_cursor
from service.jobs.records import ALIVE_SECONDS, ArtifactRecord, EventRecord, JobRecord, WorkerRecord
from service.jobs.rows import changed, in_pieces, known
from service.jobs.states import FINISHED, HELD, Device, JobState, sources
from service.jobs.tallies import Tallies
from service.jobs.turns import next_jobs, runs_on

MOST_HANDED_ON = 50
"""How often workers may hand a job on; one whose workers are told to end ever again may be the reason."""


@dataclass(frozen=True)
class Claim:
    """A worker's hold on a job: writes made under it fail once another attempt has begun."""

    job_id: str
    attempt: int
    owner: str


@dataclass(frozen=True)
class StateCount:
    """How many jobs are in a state, and since when the oldest of them is here."""

    state: JobState
    count: int
    oldest: datetime


def now() -> datetime:
    """The time as the database keeps it."""
    return datetime.now(UTC)


class JobRepository:
    """Jobs, within one session: everybody's, for worker, reaper and metrics; or, by :meth:`of`, one owner's.

    A user's request only ever has the second (``service.api.auth``): what it does to a job that is somebody else's
    ends as if there were none of this id.
    """

    def __init__(self, session: Session, scope: ColumnElement[bool] | None = None) -> None:
        self._session, self._scope = session, true() if scope is None else scope
        self._events = JobEvents(session)

    def of(self, owner: str | None) -> JobRepository:
        """The jobs of this owner alone; None owns what was made without a key."""
        return JobRepository(self._session, JobRecord.owner == owner)

    def add(self, job: JobRecord) -> None:
        """Put in a new job."""
        self._session.add(job)
        self._session.flush()
        self._events.add(job.id, job.created_at, entered(job.state, job.stage, job.attempt))

    def get(self, job_id: str) -> JobRecord:
        """The job of this id, as it is in the database now.

        Raises:
            JobNotFoundError: there is none.
        """
        query = select(JobRecord).where(JobRecord.id == job_id, self._scope)
        job = self._session.scalar(query.execution_options(populate_existing=True))
        if job is None:
            raise JobNotFoundError(job_id)
        return job

    def page(self, limit: int, cursor: str | None = None, state: JobState | None = None) -> Page:
        """Jobs from the newest on, after ``cursor``."""
        query = select(JobRecord).where(self._scope).limit(limit + 1)
        query = query.order_by(JobRecord.created_at.desc(), JobRecord.id.desc())
        if state is not None:
            query = query.where(JobRecord.state == state)
        if cursor is not None:
            created_at, job_id = read_cursor(cursor)
            last = tuple_(literal(created_at), literal(job_id, JobRecord.id.type))
            query = query.where(tuple_(JobRecord.created_at, JobRecord.id) < last)
        jobs = self._session.scalars(query).all()
        more = len(jobs) > limit
        return Page(jobs[:limit], write_cursor(jobs[limit - 1]) if more else None)

    def queue_position(self, job: JobRecord) -> int | None:
        """How many queued jobs are older and may run on the same device; None for a job that is not queued.

        An owner's own jobs go in this order; what others have waiting is no business of theirs.
        """
        if job.state != JobState.QUEUED:
            return None
        return self._session.scalar(
            select(func.count())
            .select_from(JobRecord)
            .where(
                self._scope,
                JobRecord.state == JobState.QUEUED,
                JobRecord.created_at < job.created_at,
                *([] if job.device is None else [runs_on(job.device)]),
            )
        )

    def existing(self, job_ids: Sequence[str]) -> set[str]:
        """Those of the ids that are jobs."""
        return known(self._session, JobRecord.id, job_ids)

    def same_work(self, fingerprint: str) -> JobRecord | None:
        """The latest job that has succeeded with this configuration and these files."""
        query = select(JobRecord).where(
            self._scope, JobRecord.fingerprint == fingerprint, JobRecord.state == JobState.SUCCEEDED
        )
        return self._session.scalar(query.order_by(JobRecord.created_at.desc()).limit(1))

    def run_before(self, job: JobRecord) -> JobRecord | None:
        """The job that this one is again, dry runs between them passed over; None unless it is here and succeeded."""
        seen = {job.id}
        while (earlier := (job.origin or {}).get("earlier_job")) is not None and earlier not in seen:
            seen.add(earlier)
            try:
                job = self.get(earlier)
            except JobNotFoundError:
                return None
            if not job.config.get("dry_run"):
                return job if job.state == JobState.SUCCEEDED else None
        return None

    def events_after(self, job_id: str, number: int, limit: int) -> tuple[JobRecord, Sequence[EventRecord]]:
        """A job, and what has happened to it after the event of this number.

        Raises:
            JobNotFoundError: there is no such job.
        """
        return self.get(job_id), self._events.after(job_id, number, limit)

    def signs_of_change(self, job_ids: Sequence[str]) -> dict[str, Any]:
        """For each of the jobs that is there, something that differs when its document does."""
        waiting = select(func.count(), func.min(JobRecord.created_at)).where(JobRecord.state == JobState.QUEUED)
        queue = (*self._session.execute(waiting).one(), *sorted(self.devices()))
        columns = (JobRecord.id, JobRecord.state, JobRecord.attempt, JobRecord.stage, JobRecord.progress)
        return {
            row.id: (tuple(row), queue if row.state == JobState.QUEUED else None)
            for some in in_pieces(job_ids)
            for row in self._session.execute(select(*columns).where(JobRecord.id.in_(some)))
        }

    # A worker's side: claim, renew, finish.

    def claim_next(self, owner: str, lease: timedelta, device: Device, max_running: int | None = None) -> Claim | None:
        """Take the job whose turn it is on this device; None if none waits for it that its owner may have running.

        ``owner`` is the worker, who will own the lease; ``max_running`` is for job owners without a limit of their own.
        """
        lost = True
        while lost:  # to another worker, meanwhile: there may be more
            lost = False
            for job_id in next_jobs(self._session, device, max_running):
                claim = self.claim(job_id, owner, lease, device)
                if claim is not None:
                    return claim
                lost = True
        return None

    def claim(self, job_id: str, owner: str, lease: timedelta, device: Device = "cpu") -> Claim | None:
        """Take a queued job for a new attempt, which binds it to the device; None if it is not there to be taken."""
        at = now()
        taken = self._move(
            JobState.RUNNING,
            JobRecord.id == job_id,
            runs_on(device),
            attempt=JobRecord.attempt + 1,
            device=device,
            lease_owner=owner,
            lease_expires_at=at + lease,
            started_at=func.coalesce(JobRecord.started_at, at),
            stage="intake",
            progress=None,
        )
        return Claim(job_id, self.get(job_id).attempt, owner) if taken else None

    def renew(
        self,
        claim: Claim,
        lease: timedelta,
        stage: str,
        progress: dict[str, Any] | None,
        happenings: Iterable[Happening] = (),
    ) -> JobState | None:
        """Extend a lease, note progress and what has happened; the job's state, or None where the claim was lost."""
        at = now()
        state = self._session.scalar(
            update(JobRecord)
            .where(_held_under(claim))
            .values(lease_expires_at=at + lease, stage=stage, progress=progress)
            .returning(JobRecord.state)
        )
        if state is not None:
            self._events.add(claim.job_id, at, *happenings)
        return state

    def finish(
        self,
        claim: Claim,
        state: JobState,
        stage: str,
        error: dict[str, Any] | None = None,
        artifacts: Iterable[ArtifactRecord] = (),
    ) -> JobState | None:
        """End a job under a claim, in this stage; the state it ended in, or None where the claim was lost.

        A job whose cancellation was asked for ends as cancelled, whatever came of the work.
        """
        held = _held_under(claim)
        # In this order: a cancel that comes in between turns running into cancelling, and never back.
        if self._move(state, held, JobRecord.state == JobState.RUNNING, stage=stage, error=error, **_ending()):
            self._session.add_all(artifacts)
            self._session.flush()
            return state
        return JobState.CANCELLED if self._move(JobState.CANCELLED, held, **_ending()) else None

    def give_back(self, claim: Claim, max_attempts: int, error: dict[str, Any]) -> JobState | None:
        """End an attempt that came to nothing: back to the queue, or failed with ``error`` after the last.

        Returns the state the job is in now, or None where the claim was lost.
        """
        return self._end_attempt(claim.job_id, claim.attempt, max_attempts, error, _held_under(claim))

    def hand_on(self, claim: Claim) -> JobState | None:
        """Back to the queue, because the worker was told to end: an attempt that is not counted against the job.

        Returns the state the job is in now, or None where the claim was lost, or where so many workers were told to
        end that the job may be why; its lease then runs out.
        """
        held = _held_under(claim)
        running = and_(JobRecord.state == JobState.RUNNING, JobRecord.handed_on < MOST_HANDED_ON)
        if self._move(JobState.QUEUED, held, running, handed_on=JobRecord.handed_on + 1, **_waiting()):
            return JobState.QUEUED
        return JobState.CANCELLED if self._move(JobState.CANCELLED, held, **_ending()) else None

    def take_back(self, job_id: str, attempt: int, max_attempts: int, error: dict[str, Any]) -> JobState | None:
        """As :meth:`give_back`, for a worker whose lease has run out; None if it has not."""
        return self._end_attempt(job_id, attempt, max_attempts, error, JobRecord.lease_expires_at < now())

    def _end_attempt(
        self, job_id: str, attempt: int, max_attempts: int, error: dict[str, Any], held: ColumnElement[bool]
    ) -> JobState | None:
        this = (JobRecord.id == job_id, JobRecord.attempt == attempt, held)
        running, cancelling = JobRecord.state == JobState.RUNNING, JobRecord.state == JobState.CANCELLING
        more = JobRecord.attempt - JobRecord.handed_on < max_attempts
        if self._move(JobState.QUEUED, *this, running, more, **_waiting()):  # in this order, as in finish()
            return JobState.QUEUED
        if self._move(JobState.FAILED, *this, running, error=error, **_ending()):
            return JobState.FAILED
        return JobState.CANCELLED if self._move(JobState.CANCELLED, *this, cancelling, **_ending()) else None

    # A user's side: cancel, delete.

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a queued job at once, ask the worker of a running one to stop.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: the job has already ended otherwise.
        """
        # One UPDATE for both: a job may go from either state to the other between two.
        queued = JobRecord.state == JobState.QUEUED
        self._change(
            update(JobRecord)
            .where(JobRecord.id == job_id, self._scope, JobRecord.state.in_((JobState.QUEUED, JobState.RUNNING)))
            .values(
                state=case((queued, _state(JobState.CANCELLED)), else_=_state(JobState.CANCELLING)),
                finished_at=case((queued, now())),
            )
        )
        job = self.get(job_id)
        if job.state not in (JobState.CANCELLING, JobState.CANCELLED):
            raise JobStateError(
                f"Job {job_id} has already {job.state}.", "A finished job can be deleted, not cancelled."
            )
        return job

    def delete(self, job_id: str) -> None:
        """Remove a job that no worker holds.

        Raises:
            JobNotFoundError: there is no such job.
            JobStateError: a worker is at it.
        """
        ended = delete(JobRecord).where(JobRecord.id == job_id, self._scope, JobRecord.state.not_in(HELD))
        if changed(self._session, ended):
            return
        job = self.get(job_id)
        if job.state in HELD:
            stopping = job.state == JobState.CANCELLING
            raise JobStateError(
                f"Job {job_id} is {job.state}.",
                "Delete it once it has stopped."
                if stopping
                else f"Cancel it first (POST /jobs/{job_id}/cancel) and delete it once it has stopped.",
            )
        self.delete(job_id)  # its worker has just let go of it

    # The reaper's side: what was lost.

    def expired(self) -> list[tuple[str, int]]:
        """Id and attempt of every held job whose lease has run out."""
        rows = self._session.execute(
            select(JobRecord.id, JobRecord.attempt).where(JobRecord.state.in_(HELD), JobRecord.lease_expires_at < now())
        )
        return [(job_id, attempt) for job_id, attempt in rows]

    def ended_before(self, before: datetime, limit: int) -> list[str]:
        """Jobs that ended before this time, the oldest first, no more than ``limit``."""
        query = select(JobRecord.id).where(JobRecord.state.in_(FINISHED), JobRecord.finished_at < before)
        return list(self._session.scalars(query.order_by(JobRecord.finished_at).limit(limit)))

    def unannounced_since(self, before: datetime, device: Device) -> list[str]:
        """Queued jobs for this device of which the broker was last told before this time, or never."""
        return list(
            self._session.scalars(
                select(JobRecord.id)
                .where(
                    JobRecord.state == JobState.QUEUED,
                    runs_on(device),
                    or_(
                        JobRecord.nudged_at < before,
                        and_(JobRecord.nudged_at.is_(None), JobRecord.created_at < before),
                    ),
                )
                .order_by(JobRecord.created_at)
            )
        )

    def note_announced(self, job_id: str) -> None:
        """Note that the broker has just been told of a job."""
        self._session.execute(update(JobRecord).where(JobRecord.id == job_id).values(nudged_at=now()))

    def note_worker(self, name: str, device: Device, detail: str, forget_after: timedelta) -> None:
        """Note a worker's sign of life and what it runs on, and forget those not seen for long."""
        self._session.merge(WorkerRecord(name=name, seen_at=now(), device=device, detail=detail[:255]))
        self._session.execute(delete(WorkerRecord).where(WorkerRecord.seen_at < now() - forget_after))

    def forget_worker(self, name: str) -> None:
        """Remove a worker that has stopped."""
        self._session.execute(delete(WorkerRecord).where(WorkerRecord.name == name))

    def workers(self) -> Sequence[WorkerRecord]:
        """Every worker known."""
        return self._session.scalars(select(WorkerRecord).order_by(WorkerRecord.name)).all()

    def devices(self) -> list[Device]:
        """The device of every worker that is alive."""
        alive = WorkerRecord.seen_at > now() - timedelta(seconds=ALIVE_SECONDS)
        return list(self._session.scalars(select(WorkerRecord.device).where(alive)))

    # What is told of all jobs together.

    def counts(self) -> list[StateCount]:
        """The jobs in each state that has any; read from the index alone."""
        rows = self._session.execute(
            select(JobRecord.state, func.count(), func.min(JobRecord.created_at)).group_by(JobRecord.state)
        )
        return [StateCount(*row) for row in rows]

    def held(self) -> Sequence[JobRecord]:
        """The jobs that workers are at: few, one for each worker."""
        return self._session.scalars(
            select(JobRecord).where(JobRecord.state.in_(HELD)).options(lazyload(JobRecord.artifacts))
        ).all()

    def _move(self, target: JobState, *where: ColumnElement[bool], **values: Any) -> bool:
        """Enter ``target`` if the job is in a state that may; whether it did."""
        enter = update(JobRecord).where(JobRecord.state.in_(sources(target)), *where)
        return self._change(enter.values(state=target, **values), values.get("error"))

    def _change(self, enter: Update, error: dict[str, Any] | None = None) -> bool:
        """Move one job's state; whether it was there to be moved. Its event and what is worth a tally come with it."""
        moved = self._session.execute(
            enter.returning(
                JobRecord.id,
                JobRecord.state,
                JobRecord.stage,
                JobRecord.attempt,
                JobRecord.handed_on,
                JobRecord.config,
                JobRecord.started_at,
                JobRecord.finished_at,
            ).execution_options(synchronize_session=False)
        ).one_or_none()
        if moved is None:
            return False
        job_id, state, stage, attempt, handed_on, config, started_at, finished_at = moved
        self._events.add(job_id, now(), entered(state, stage, attempt, error))
        if state == JobState.RUNNING and attempt - handed_on > 1:
            Tallies(self._session).add("retry")
        self._tally_end(state, config, started_at, finished_at)
        return True

    def _tally_end(
        self, state: JobState, config: dict[str, Any], started_at: datetime | None, finished_at: datetime | None
    ) -> None:
        """Count a job that was begun and has ended."""
        if state in FINISHED and started_at is not None and finished_at is not None:
            method = QuantizationConfig.model_validate(config).method
            Tallies(self._session).add("job", (finished_at - started_at).total_seconds(), method, state)


def _waiting() -> dict[str, Any]:
    return {"lease_owner": None, "lease_expires_at": None, "stage": None, "progress": None}


def _ending() -> dict[str, Any]:
    return {"finished_at": now(), "lease_owner": None, "lease_expires_at": None}


def _state(state: JobState) -> ColumnElement[JobState]:
    return literal(state, JobRecord.state.type)


def _held_under(claim: Claim) -> ColumnElement[bool]:
    return and_(
        JobRecord.id == claim.job_id,
        JobRecord.attempt == claim.attempt,
        JobRecord.lease_owner == claim.owner,
        JobRecord.state.in_(HELD),
    )

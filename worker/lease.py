"""Holds a job while it is worked on: renews the lease, writes progress, notices when to stop."""

from __future__ import annotations

import contextvars
import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import psutil
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.progress import Progress
from service.jobs.events import EventKind, Happening
from service.jobs.repository import Claim, JobRepository
from service.jobs.states import JobState
from service.settings import Settings
from worker.curve import RunningCurve

log = logging.getLogger(__name__)


STOP_SECONDS = 8.0
"""Work that is to stop looks for it at every step; what has not by then is in a step too long to wait for."""
HAND_ON_SECONDS = 1.5
"""The same where the worker ends, which waits for no longer than ``worker_soft_shutdown_timeout``."""
LOOK_SECONDS = 0.25
"""How soon it is noticed that the worker ends, however long a heartbeat is."""

told_to_end = threading.Event()
"""Set in a worker's child once the worker was told to end."""


class JobStopError(Exception):
    """Base of the reasons to stop a job midway; raised in the thread that works on it."""


class JobCancelledError(JobStopError):
    """Its user asked to cancel it."""


class LeaseLostError(JobStopError):
    """Another attempt holds the job, or it is gone; nothing may be written for it any more."""


class WorkerEndingError(JobStopError):
    """The worker was told to end; another goes on with the job."""


class JobTimeoutError(JobStopError):
    """The attempt has taken longer than this deployment allows."""


class JobMemoryError(JobStopError):
    """The process takes more memory than this deployment gives a job."""


class Lease:
    """A claim kept alive by a thread for as long as the ``with`` block runs.

    The working thread calls :meth:`report`, which is cheap: it leaves its progress for the next renewal and
    raises if the job has to stop.

    Args:
        claim: the hold on the job.
        settings: how long a lease lasts and how often it is renewed; a job's limits.
        sessions: of the database.
        on_overdue: called once, from the lease's thread, when the work was to stop and has not for a while.
    """

    def __init__(
        self,
        claim: Claim,
        settings: Settings,
        sessions: sessionmaker[Session],
        on_overdue: Callable[[Lease, JobStopError], None],
    ) -> None:
        self.claim = claim
        self._on_overdue = on_overdue
        self._sessions = sessions
        self._length = timedelta(seconds=settings.lease_seconds)
        self._every = settings.heartbeat_seconds
        self._memory_bytes = settings.job_memory_bytes
        self._deadline = time.monotonic() + settings.job_seconds
        self._renewed = time.monotonic()
        self._progress = Progress(stage="intake")
        self._forecast: dict[str, Any] | None = None
        self._gpu: dict[str, int] | None = None
        self._curve = RunningCurve()
        self._happenings: list[Happening] = []
        self._renewing = threading.Lock()
        self._stop: JobStopError | None = None
        self._done = threading.Event()
        within = contextvars.copy_context()  # its log lines are about the job, too
        self._thread = threading.Thread(target=within.run, args=(self._run,), name=f"lease-{claim.job_id}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def report(self, progress: Progress, gpu: dict[str, int] | None = None) -> None:
        """Note how far the work is, and what it takes of a GPU's memory.

        Raises:
            JobStopError: the work must stop here.
        """
        if progress.stage != self._progress.stage:
            self._note("stage", {"stage": progress.stage})
        self._gpu = gpu
        self._forecast = progress.forecast or self._forecast  # told once, shown to the end
        self._curve.add(progress)
        self._progress = progress
        self.check()

    def note_block(self, method: str, block: int, blocks: int, loss: float | None) -> None:
        """Note that a block is finished, and the loss it ended with."""
        self._note("block", {"method": method, "block": block, "blocks": blocks, "loss": _finite(loss)})

    def flush(self) -> None:
        """Renew now, so that everything noted is in the database before the attempt ends."""
        try:
            self._renew()
        except SQLAlchemyError as error:  # a missing stage or block is no reason to lose the work
            log.warning("job %s: its latest events could not be written: %s", self.claim.job_id, error)

    def check(self) -> None:
        """Raise if the work must stop here."""
        if self._stop is None and time.monotonic() > self._deadline:
            self._stop = JobTimeoutError()
        if self._stop is None and told_to_end.is_set():
            self._stop = WorkerEndingError()
        if self._stop is not None:
            raise self._stop

    @property
    def stage(self) -> str:
        """The stage reported last."""
        return self._progress.stage

    @property
    def stopping(self) -> bool:
        """Whether the work must stop."""
        try:
            self.check()
        except JobStopError:
            return True
        return False

    def _note(self, kind: EventKind, data: dict[str, Any]) -> None:
        """Leave an event for the next renewal."""
        self._happenings.append(Happening(kind, {**data, "attempt": self.claim.attempt}))

    def _run(self) -> None:
        stopping_since: float | None = None
        while not self._until_the_next_look():
            if self._memory_bytes is not None and self._stop is None and own_memory() > self._memory_bytes:
                self._stop = JobMemoryError()
            if not isinstance(self._stop, LeaseLostError):
                try:
                    self._renew()
                except SQLAlchemyError as error:
                    log.warning("job %s: the lease could not be renewed: %s", self.claim.job_id, error)
                    if time.monotonic() - self._renewed > self._length.total_seconds():
                        self._stop = LeaseLostError()
            if not self.stopping:
                continue
            stopping_since = stopping_since or time.monotonic()
            patience = HAND_ON_SECONDS if isinstance(self._stop, WorkerEndingError) else STOP_SECONDS
            if self._stop is not None and time.monotonic() - stopping_since > patience:
                log.warning("job %s did not stop within %.0f seconds", self.claim.job_id, patience)
                self._on_overdue(self, self._stop)
                return

    def _until_the_next_look(self) -> bool:
        """Wait for a heartbeat, or until the worker is told to end, for then there is less time; whether the work is
        done.
        """
        due = time.monotonic() + self._every
        while not self._done.wait(max(0.0, min(LOOK_SECONDS, due - time.monotonic()))):
            if time.monotonic() >= due or told_to_end.is_set():
                return False
        return True

    def _renew(self) -> None:
        with self._renewing:
            progress, happenings = self._progress, list(self._happenings)
            document = self._document(progress)
            with self._sessions.begin() as session:
                state = JobRepository(session).renew(self.claim, self._length, progress.stage, document, happenings)
            del self._happenings[: len(happenings)]
        self._renewed = time.monotonic()
        if state is None:
            self._stop = LeaseLostError()
        elif state == JobState.CANCELLING:
            self._stop = JobCancelledError()

    def _document(self, progress: Progress) -> dict[str, Any]:
        return {
            "method": progress.method,
            "block": progress.block,
            "blocks": progress.blocks,
            "iteration": progress.iteration,
            "iterations": progress.iterations,
            "loss": _finite(progress.loss),
            "curve": self._curve.document(),
            "eta_seconds": _finite(progress.eta_seconds),
            "forecast": self._forecast,
            **({} if self._gpu is None else {"gpu": self._gpu}),
        }


def own_memory() -> int:
    """Bytes of memory that this process alone takes: without files it maps, which the system can put back to disk."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))


def _finite(number: float | None) -> float | None:
    """JSON has no NaN and no infinity."""
    return number if number is not None and math.isfinite(number) else None

"""Watches the jobs of a stack while faults happen to it, for chaos.py."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from typing import Any

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from service.jobs.database import open_database
from service.jobs.records import JobRecord
from service.jobs.repository import now
from service.jobs.states import FINISHED, HELD, JobState
from service.settings import Settings

ENDED = JobRecord.state.in_(FINISHED)


class Watch:
    """Reads the job rows all the time: how long nobody renewed a lease, or nobody took a queued job; and whether a job
    that had ended changed again.
    """

    def __init__(self, settings: Settings) -> None:
        self.unfinished: set[str] = set()
        self.ended: dict[str, tuple[Any, ...]] = {}
        self.changed_after_end: list[str] = []
        self.longest_silence = self.longest_idle = 0.0
        self._lease_seconds = settings.lease_seconds
        self._engine = open_database(settings)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._engine.dispose()

    def until_all_ended(self, seconds: float) -> None:
        """Waits, but no longer than ``seconds``: what has not ended by then is stuck."""
        deadline = time.monotonic() + seconds
        while self.unfinished and time.monotonic() < deadline:
            time.sleep(0.2)

    def _run(self) -> None:
        idle_since: float | None = None
        for number in itertools.count():
            last = self._done.wait(0.25)
            # Those that have ended less often: they may be many.
            chosen = select(JobRecord) if number % 20 == 0 or last else select(JobRecord).where(~ENDED)
            try:
                with Session(self._engine) as session:
                    rows = list(session.scalars(chosen))
            except SQLAlchemyError:  # the database is a victim, too
                continue
            at = now()
            for row in rows:
                self._look_at(row)
                if row.state in HELD and row.lease_expires_at is not None:
                    silence = (at - row.lease_expires_at).total_seconds() + self._lease_seconds
                    self.longest_silence = max(self.longest_silence, silence)
            if last:
                return
            states = Counter(row.state for row in rows)
            idle = states[JobState.QUEUED] > 0 and not any(states[state] for state in HELD)
            idle_since = (idle_since or time.monotonic()) if idle else None
            if idle_since is not None:
                self.longest_idle = max(self.longest_idle, time.monotonic() - idle_since)

    def _look_at(self, row: JobRecord) -> None:
        if row.state not in FINISHED and row.id not in self.ended:
            self.unfinished.add(row.id)
            return
        seen = (row.state, row.attempt, row.finished_at, *sorted((file.name, file.sha256) for file in row.artifacts))
        if self.ended.setdefault(row.id, seen) != seen and row.id not in self.changed_after_end:
            self.changed_after_end.append(row.id)
        self.unfinished.discard(row.id)

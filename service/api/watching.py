"""Wakes those who wait for a job to change: one look at the database for all of them, a few times a second."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.repository import JobRepository

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.25
T = TypeVar("T")


async def to_its_end(call: Callable[..., T], *arguments: Any) -> T:
    """Run a call in a thread; if the task is cancelled, after the thread has given back what it holds.

    (asyncio's cancellation, unlike anyio's, would leave it behind, with a connection of a database that is closed.)
    """
    running = asyncio.ensure_future(run_in_threadpool(call, *arguments))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


class JobWatch:
    """Who waits for which job. Waiting takes neither a thread nor a connection, and looking only while someone waits.

    Who waits begins to do so before it reads the job, and reads it again when it is woken, now and then for nothing:
    at the first look in any case, since what was there before is not known.
    """

    def __init__(self, sessions: sessionmaker[Session]) -> None:
        self._sessions = sessions
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._seen: dict[str, Any] = {}
        self._wanted = asyncio.Event()

    @contextmanager
    def on(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set whenever the job may have changed."""
        changed = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(changed)
        self._wanted.set()
        try:
            yield changed
        finally:
            self._waiting[job_id].discard(changed)
            if not self._waiting[job_id]:
                del self._waiting[job_id]
                self._seen.pop(job_id, None)
            if not self._waiting:
                self._wanted.clear()

    async def run(self) -> None:
        """Look until the task is cancelled."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(LOOK_SECONDS)
            job_ids = list(self._waiting)
            if not job_ids:
                continue
            try:
                found = await to_its_end(self._look, job_ids)
            except SQLAlchemyError as error:
                log.warning("those who wait for jobs are woken, as the database does not answer: %s", error)
                found = {}
                self._seen.clear()
            for job_id in job_ids:
                if job_id not in self._waiting:  # nobody does any more
                    continue
                if job_id not in self._seen or self._seen[job_id] != found.get(job_id):
                    self._seen[job_id] = found.get(job_id)
                    for changed in self._waiting[job_id]:
                        changed.set()

    def _look(self, job_ids: Sequence[str]) -> dict[str, Any]:
        with self._sessions() as session:
            return JobRepository(session).signs_of_change(job_ids)

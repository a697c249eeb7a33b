"""Tells the workers that a job waits: those on any device it may run on."""

from __future__ import annotations

from sqlalchemy.orm import Session, sessionmaker

from service.jobs.errors import JobNotFoundError
from service.jobs.queue import JobQueue
from service.jobs.repository import JobRepository


def announce(job_id: str, sessions: sessionmaker[Session], queue: JobQueue) -> None:
    """Announce a queued job; one that has been deleted meanwhile needs none.

    Raises:
        QueueDownError: the broker cannot be reached; the reaper announces it later.
    """
    with sessions() as session:
        repository = JobRepository(session)
        try:
            job = repository.get(job_id)
        except JobNotFoundError:
            return
        # Where nobody listens, messages would only pile up; a worker that comes later is told by the reaper.
        devices = {job.device} if job.device is not None else set(repository.devices()) or {"cpu"}
    queue.announce(job_id, sorted(devices))
    with sessions.begin() as session:
        JobRepository(session).note_announced(job_id)

"""Brings back what was lost: jobs of dead workers, messages the broker dropped; deletes what is not to be kept:
files that no job owns, and jobs that have been kept long enough.
"""

from __future__ import annotations

import logging
import threading
import time
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts, ArtifactsDownError, blocks_prefix, job_prefix, upload_prefix
from service.jobs.announcement import announce
from service.jobs.database import DATABASE_DOWN
from service.jobs.errors import JobNotFoundError
from service.jobs.idempotency import forget
from service.jobs.queue import JobQueue, QueueDownError
from service.jobs.repository import JobRepository, now
from service.jobs.schemas import Problem
from service.jobs.states import FINISHED, JobState
from service.jobs.uploads import delete_unused, known_places
from service.jobs.uploads import expired as expired_uploads
from service.logs import about
from service.settings import Settings

log = logging.getLogger(__name__)

ORPHAN_SECONDS = 24 * 3600.0
"""Files without a job are an upload under way until they are this old."""
SWEEP_SECONDS = 3600.0
EXPIRED_AT_A_TIME = 100


def worker_lost(attempt: int) -> Problem:
    """Why a job failed whose workers died."""
    return Problem.of_job(
        "worker_lost",
        f"The worker stopped without a word while it ran this job, {attempt} times.",
        "Most often it ran out of memory: try a smaller model or fewer images, or a worker with more memory.",
    )


class Reaper:
    """A thread that looks for lost jobs; several may run at once, since every repair is a guarded UPDATE."""

    def __init__(
        self, settings: Settings, sessions: sessionmaker[Session], queue: JobQueue, artifacts: Artifacts
    ) -> None:
        self._settings, self._sessions, self._queue, self._artifacts = settings, sessions, queue, artifacts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)
        self._next_sweep = 0.0

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Stop, and wait for a round under way."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._settings.reaper_seconds):
            try:
                self.round()
            except QueueDownError as error:
                log.warning("%s Queued jobs wait until it is back.", error)
            except ArtifactsDownError as error:
                log.warning("%s", error)
            except DATABASE_DOWN as error:
                log.warning("the reaper waits for the database: %s", error)
            except (SQLAlchemyError, OSError):
                log.exception("a round of the reaper failed; the next one tries again")

    def round(self) -> None:
        """One look at everything that can be lost."""
        self.take_back_expired()
        self.announce_forgotten()
        self.delete_expired()
        self.delete_unused_uploads()
        self.forget_idempotency_keys()
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + SWEEP_SECONDS
            self.sweep_orphans()

    def take_back_expired(self) -> None:
        """Requeue, or fail after the last attempt, every job whose worker fell silent."""
        with self._sessions() as session:
            expired = JobRepository(session).expired()
        for job_id, attempt in expired:
            with self._sessions.begin() as session:
                error = worker_lost(attempt).model_dump()
                state = JobRepository(session).take_back(job_id, attempt, self._settings.max_attempts, error)
            with about(job_id=job_id, attempt=attempt):
                if state is not None:
                    log.warning("job %s lost its worker in attempt %d and is now %s", job_id, attempt, state)
                if state == JobState.QUEUED:
                    announce(job_id, self._sessions, self._queue)
                elif state in FINISHED:
                    self._artifacts.discard(blocks_prefix(job_id))

    def announce_forgotten(self) -> None:
        """Announce anew what is queued in the database while no message waits for the workers who could take it."""
        before = now() - timedelta(seconds=self._settings.renudge_seconds)
        with self._sessions() as session:
            repository = JobRepository(session)
            waiting = {device: repository.unannounced_since(before, device) for device in repository.devices()}
        for device, job_ids in waiting.items():
            if job_ids and self._queue.depth(device) == 0:
                for job_id in job_ids:
                    self._queue.announce(job_id, [device])
                    with self._sessions.begin() as session:
                        JobRepository(session).note_announced(job_id)

    def delete_expired(self) -> None:
        """Delete jobs that ended long enough ago, row first: files whose row is gone are swept at the latest."""
        if self._settings.keep_seconds is None:
            return
        before = now() - timedelta(seconds=self._settings.keep_seconds)
        with self._sessions() as session:
            expired = JobRepository(session).ended_before(before, EXPIRED_AT_A_TIME)
        for job_id in expired:
            try:
                with self._sessions.begin() as session:
                    JobRepository(session).delete(job_id)
            except JobNotFoundError:  # another reaper, or its user, was first
                continue
            self._artifacts.discard(job_prefix(job_id))
            log.info("job %s has been kept for %.0f seconds and is deleted", job_id, self._settings.keep_seconds)

    def delete_unused_uploads(self) -> None:
        """Delete uploads that were abandoned, and those that no job has used for long."""
        before = now() - timedelta(seconds=self._settings.upload_keep_seconds)
        with self._sessions() as session:
            unused = expired_uploads(session, before, EXPIRED_AT_A_TIME)
        for upload in unused:
            with self._sessions.begin() as session:
                gone = delete_unused(session, upload)
            if gone:
                self._artifacts.discard(upload_prefix(upload.place))
                log.info("upload %s is used by no job and is deleted", upload.sha256)

    def forget_idempotency_keys(self) -> None:
        """Delete the keys that stand for nothing any more."""
        with self._sessions.begin() as session:
            forget(session, now() - timedelta(seconds=self._settings.idempotency_seconds))

    def sweep_orphans(self) -> None:
        """Delete files of jobs and uploads that do not exist: a process died between writing files and row."""
        names, places = self._artifacts.folders("jobs"), self._artifacts.folders("uploads")
        with self._sessions() as session:
            jobs, uploads = JobRepository(session).existing(names), known_places(session, places)
        for name in set(names) - jobs:
            with about(job_id=name):
                self._sweep(job_prefix(name))
        for place in set(places) - uploads:
            self._sweep(upload_prefix(place))

    def _sweep(self, prefix: str) -> None:
        at = self._artifacts.written_at(prefix)
        if at is not None and at < time.time() - ORPHAN_SECONDS:
            log.info("deleting %s: nothing of this name is known", prefix)
            self._artifacts.delete_prefix(prefix)

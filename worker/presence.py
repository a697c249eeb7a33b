"""A worker's sign of life in the database, so that health probes need not ask a busy process."""

from __future__ import annotations

import logging
import os
import socket
import threading
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import sessionmaker

from service.jobs.database import open_database
from service.jobs.repository import JobRepository
from service.settings import Settings
from worker.probe import Found

log = logging.getLogger(__name__)

SIGN_SECONDS = 5.0
FORGET_AFTER = timedelta(hours=1)


def worker_name() -> str:
    """This process, among all workers."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Presence:
    """A thread of the worker's parent process that signs in every few seconds, busy or not."""

    def __init__(self, settings: Settings, found: Found) -> None:
        self._settings, self._found = settings, found
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Sign in, and go on doing so."""
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Sign out."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        engine = open_database(self._settings)
        sessions = sessionmaker(engine)
        name = worker_name()
        while True:
            try:
                with sessions.begin() as session:
                    JobRepository(session).note_worker(name, self._found.device, self._found.detail, FORGET_AFTER)
            except SQLAlchemyError as error:
                log.warning("the database did not take the worker's sign of life: %s", error)
            if self._stop.wait(SIGN_SECONDS):
                break
        try:
            with sessions.begin() as session:
                JobRepository(session).forget_worker(name)
        except SQLAlchemyError:
            log.warning("the worker could not sign out; it will be forgotten")
        engine.dispose()

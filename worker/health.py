"""The worker's health check, `python -m worker.health`: 0 if this machine's worker has signed in lately, else 1.

Its sign of life in the database, which it writes busy or not, says more than a question to a busy process.
"""

from __future__ import annotations

import socket

from sqlalchemy.exc import SQLAlchemyError

from service.jobs.database import session_on
from service.jobs.records import ALIVE_SECONDS
from service.jobs.repository import JobRepository, now
from service.settings import Settings


def check(settings: Settings, host: str) -> tuple[bool, str]:
    """Whether a worker of this host is alive, and why one would say so."""
    try:
        with session_on(settings) as session:
            workers = JobRepository(session).workers()
    except (SQLAlchemyError, OSError) as error:
        return False, f"the database cannot be asked: {type(error).__name__}"
    at = now()
    here = [(at - worker.seen_at).total_seconds() for worker in workers if worker.name.startswith(f"{host}:")]
    if not here:
        return False, f"no worker of {host} has signed in"
    return min(here) < ALIVE_SECONDS, f"the worker of {host} signed in {min(here):.1f} seconds ago"


def main() -> int:
    """Check this machine, and say what was found in one line."""
    healthy, why = check(Settings(), socket.gethostname())
    print(why)
    return 0 if healthy else 1


if __name__ == "__main__":
    raise SystemExit(main())

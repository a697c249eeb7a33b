"""The faults that chaos.py brings about: killed parts, cut connections, a full disk."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from supervised import Part, SupervisedStack

from service.jobs.database import session_on

DISK = "AQUANT_CHAOS_DISK"
"""Set where this process has a small disk of its own."""
OUTAGE_SECONDS = 2.0
"""How long the disk is full and the database locked."""


def kill(part: Part, how: signal.Signals) -> bool:
    """A signal to the part's own process."""
    family = part.family()
    with suppress(psutil.NoSuchProcess):
        if family:
            family[0].send_signal(how)
            return True
    return False


def kill_descendant(stack: SupervisedStack, draw: random.Random) -> bool:
    """A worker's child or what it has started: the job itself, or the check of its uploads."""
    below = [process for worker in stack.workers for process in worker.family()[1:]]
    with suppress(psutil.NoSuchProcess):
        if below:
            draw.choice(below).kill()
            return True
    return False


def cut_database(stack: SupervisedStack) -> bool:
    """PostgreSQL: every connection ended. SQLite: locked against all others for a while."""
    try:
        with session_on(stack.settings) as session:
            if session.get_bind().dialect.name == "postgresql":
                others = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
                session.execute(text(others))
            else:
                session.execute(text("begin exclusive"))
                time.sleep(OUTAGE_SECONDS)
        return True
    except SQLAlchemyError:
        return False


def fill_disk() -> bool:
    """No byte is left for a while."""
    filler = Path(os.environ[DISK]) / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(b"0")
    time.sleep(OUTAGE_SECONDS)
    filler.unlink()
    return True


FAULTS: dict[str, Callable[[SupervisedStack, random.Random], bool]] = {
    "worker killed": lambda stack, draw: kill(draw.choice(stack.workers), signal.SIGKILL),
    "worker's child killed": kill_descendant,
    "API killed": lambda stack, _: kill(stack.parts["api"], signal.SIGKILL),
    "broker killed": lambda stack, _: kill(stack.parts["broker"], signal.SIGKILL),
    "broker restarted": lambda stack, _: kill(stack.parts["broker"], signal.SIGTERM),
    "worker told to stop": lambda stack, draw: kill(draw.choice(stack.workers), signal.SIGTERM),
    "database cut": lambda stack, _: cut_database(stack),
    **({"disk full": lambda *_: fill_disk()} if DISK in os.environ else {}),
}

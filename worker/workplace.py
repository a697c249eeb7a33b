"""The folder a job is worked on in, removed whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.jobs.schemas import Problem

DISK_FULL = Problem.of_job(
    "disk_full",
    "The worker's disk had no space left, each time the job was tried.",
    "Submit it again once there is space; its operator finds how much a job needs in the documentation.",
)


def disk_is_full(error: BaseException | None) -> bool:
    """Whether it came of a disk without space; libraries written in other languages tell it in words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def workplace(root: Path, job_id: str, attempt: int) -> Iterator[Path]:
    """A fresh folder for one attempt, named for the process that owns it."""
    folder = root / f"{job_id}.{attempt}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_abandoned(root: Path) -> None:
    """Remove the folders whose processes are gone; ``root`` belongs to the workers of one machine."""
    if not root.is_dir():
        return
    for folder in root.iterdir():
        owner = folder.name.rpartition(".")[2]
        if owner.isdecimal() and not _alive(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()  # a folder with our own number was made by a namesake before us

"""Runs a program that reads untrusted files: a child with a bare environment, under a watch (see ``confinement``)."""

from __future__ import annotations

import contextlib
import contextvars
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STDERR_BYTES = 16 * 1024
"""How much of the end of a child's standard error is kept."""
LINE_BYTES = 256 * 1024
"""Longest line of a child's standard output; a longer one is cut."""
POLL_SECONDS = 0.1

# What a Python with torch needs to start; credentials and addresses of services are not among it.
_KEPT_VARIABLES = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
)


@dataclass(frozen=True)
class Limits:
    """What a child may take: wall clock and CPU in seconds, memory and file sizes in bytes."""

    wall_seconds: float
    cpu_seconds: int
    memory_bytes: int
    file_bytes: int
    open_files: int = 512


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        returncode: its exit status, or minus the signal that ended it.
        timed_out: its wall clock ran out.
        stopped: it was ended because its job had to stop.
        stderr: the end of what it wrote to standard error.
    """

    returncode: int
    timed_out: bool
    stopped: bool
    stderr: str


def run(
    argv: Sequence[str],
    folder: Path,
    limits: Limits,
    on_line: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Outcome:
    """Run a child in ``folder`` to its end; it must call ``confinement.confine`` before it touches an untrusted byte.

    ``on_line`` is called from another thread with each line of its standard output.
    """
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment |= {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "CUDA_VISIBLE_DEVICES": "",
        "ORT_DISABLE_TELEMETRY": "1",
    }
    child = subprocess.Popen(
        argv,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stderr is not None
    tail = bytearray()
    within = contextvars.copy_context()  # what is logged of a line is about the job, too
    readers = [
        threading.Thread(target=within.run, args=(_read_lines, child.stdout, on_line), daemon=True),
        threading.Thread(target=_read_tail, args=(child.stderr, tail), daemon=True),
    ]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + limits.wall_seconds
    timed_out = stopped = False
    try:
        while child.poll() is None:
            timed_out, stopped = time.monotonic() > deadline, should_stop()
            if timed_out or stopped:
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(POLL_SECONDS)
    finally:
        # The whole session, so that nothing the child started outlives it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        for reader in readers:
            reader.join()
        child.stdout.close()
        child.stderr.close()
    return Outcome(child.returncode, timed_out, stopped, tail.decode("utf-8", "replace"))


def _read_lines(stream: IO[bytes], on_line: Callable[[str], None]) -> None:
    while line := stream.readline(LINE_BYTES):
        on_line(line.decode("utf-8", "replace").rstrip("\n"))


def _read_tail(stream: IO[bytes], tail: bytearray) -> None:
    while chunk := stream.read1(4096):  # type: ignore[attr-defined]
        tail += chunk
        del tail[:-STDERR_BYTES]

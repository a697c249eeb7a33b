"""A part of the embedded stack: one process, how it is started and stopped, and when it is started again."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

STOP_SECONDS = 10.0
SOON_SECONDS = 60.0
"""A part that ends within so long of its start has not done its work in between."""
PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before a part that ended soon after its start is started again, the first time, the second, ..."""
_LOG_TAIL = 20
_PR_SET_PDEATHSIG = 1


class StackError(Exception):
    """A component did not start, or stopped by itself; the message ends with the last lines of its log."""


@dataclass(eq=False)
class Component:
    """One running part of the stack, whichever process plays it now."""

    name: str
    argv: Sequence[str]
    log: Path
    address: str
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Raise if it has stopped.

        Raises:
            StackError: with the end of its log.
        """
        if self.process.poll() is not None:
            raise self.ended("stopped by itself")

    def ended(self, how: str) -> StackError:
        """The error that says how it ended."""
        lines = self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
        status = self.process.returncode
        return StackError(f"The {self.name} {how} (status {status}). The end of {self.log}:\n" + "\n".join(lines))


class Keeper:
    """Starts a part again when it ends, after a pause; not for ever if it ends soon after each start."""

    def __init__(self, component: Component, now: float) -> None:
        self._component, self._started = component, now
        self._ends = 0
        self._due: float | None = None  # while it pauses

    def look(self, now: float, say: Callable[[str], None]) -> None:
        """Start the part, if it has ended and its pause is over.

        Args:
            now: seconds of a clock that runs on.
            say: is told what is done, a line each.

        Raises:
            StackError: it has ended soon after its start once more than there are pauses.
        """
        component = self._component
        if component.process.poll() is None:
            return
        if self._due is None:
            self._ends = self._ends + 1 if now - self._started < SOON_SECONDS else 1
            if self._ends > len(PAUSES):
                raise component.ended(
                    f"ended {self._ends} times, each time within {SOON_SECONDS:.0f} seconds of its start"
                )
            stop_component(component)  # what it left of its session
            pause = PAUSES[self._ends - 1]
            self._due = now + pause
            say(
                f"{component.name:<9} ended by itself (status {component.process.returncode}); "
                f"it is started again in {pause:.0f} s  (log: {component.log})"
            )
        if now >= self._due:
            component.process = _start(component.argv, component.log, component.environment)
            self._started, self._due = now, None
            say(f"{component.name:<9} started again")


def start_component(
    name: str, argv: Sequence[str], log: Path, address: str, environment: Mapping[str, str]
) -> Component:
    """Start a part in a session of its own; it dies with this process, whatever becomes of that."""
    return Component(name, argv, log, address, environment, _start(argv, log, environment))


def stop_component(component: Component) -> None:
    """SIGTERM, then SIGKILL to the whole session; afterwards no process of the component is left."""
    process = component.process
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start(argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    libc = ctypes.CDLL(None)

    def die_with_parent() -> None:
        # Not SIGTERM: a part that hangs in its shutdown would have nobody left to end it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    with log.open("ab") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            # Its own session: Ctrl-C reaches this process alone, which stops the parts in order.
            start_new_session=True,
            preexec_fn=die_with_parent,
        )

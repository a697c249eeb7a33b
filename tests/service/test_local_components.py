"""A part of the embedded stack that ends is started again after a pause, but not for ever."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from service.local_components import (
    PAUSES,
    SOON_SECONDS,
    Component,
    Keeper,
    StackError,
    start_component,
    stop_component,
)

RUNS = ["sleep", "600"]


@contextmanager
def running(folder: Path, argv: Sequence[str] = RUNS) -> Iterator[Component]:
    component = start_component("worker", argv, folder / "worker.log", "", {"PATH": "/usr/bin:/bin"})
    try:
        yield component
    finally:
        stop_component(component)


def end(component: Component) -> subprocess.Popen[bytes]:
    component.process.kill()
    component.process.wait()
    return component.process


def test_a_part_that_ended_is_started_again_after_its_pause(tmp_path: Path) -> None:
    lines: list[str] = []
    with running(tmp_path) as component:
        keeper = Keeper(component, 0.0)
        keeper.look(5.0, lines.append)
        assert lines == []
        ended = end(component)
        keeper.look(10.0, lines.append)
        assert [line.split("  (log")[0] for line in lines] == [
            "worker    ended by itself (status -9); it is started again in 1 s"
        ]
        keeper.look(10.5, lines.append)
        assert component.process is ended
        keeper.look(11.0, lines.append)
        assert component.process is not ended
        assert component.process.poll() is None
        keeper.look(12.0, lines.append)
        assert lines[1:] == ["worker    started again"]


def test_pauses_grow_while_it_ends_soon_and_begin_anew_when_it_has_lived(tmp_path: Path) -> None:
    def pause() -> float:
        """What is said of it, after which the part runs again."""
        nonlocal now
        lines: list[str] = []
        end(component)
        keeper.look(now, lines.append)
        seconds = float(lines[0].split(" again in ")[1].split()[0])
        now += seconds
        keeper.look(now, lines.append)
        return seconds

    now = 0.0
    with running(tmp_path) as component:
        keeper = Keeper(component, now)
        assert [pause() for _ in PAUSES] == list(PAUSES)
        now += SOON_SECONDS
        assert [pause() for _ in PAUSES] == list(PAUSES)
        end(component)
        with pytest.raises(StackError, match=rf"The worker ended {len(PAUSES) + 1} times.*\(status -9\)"):
            keeper.look(now, print)


def test_a_part_that_cannot_live_ends_the_stack_with_the_end_of_its_log(tmp_path: Path) -> None:
    now = 0.0
    with running(tmp_path, ["sh", "-c", "echo no such queue; exit 3"]) as component:
        keeper = Keeper(component, now)
        for _ in PAUSES:
            component.process.wait()
            keeper.look(now, print)
            now += max(PAUSES)
            keeper.look(now, print)
        component.process.wait()
        with pytest.raises(StackError, match=r"(?s)status 3.*worker\.log:.*no such queue"):
            keeper.look(now, print)


def test_what_an_ended_part_left_behind_ends_before_it_is_started_again(tmp_path: Path) -> None:
    """The child of a worker that was killed would hold the job, its memory and its GPU."""
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    with running(tmp_path, [sys.executable, "-c", code]) as component:
        while not (text := component.log.read_text()).endswith("\n"):
            component.check()
        child = psutil.Process(int(text))
        end(component)
        assert child.is_running()
        Keeper(component, 0.0).look(0.0, print)
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

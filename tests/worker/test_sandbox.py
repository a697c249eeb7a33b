"""A child in the sandbox cannot take more than it is given, nor outlive its job."""

from __future__ import annotations

import signal
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from worker import sandbox
from worker.sandbox import Limits

MIB = 2**20
LIMITS = Limits(wall_seconds=20, cpu_seconds=20, memory_bytes=512 * MIB, file_bytes=MIB)


def run(
    program: str, folder: Path, limits: Limits = LIMITS, stop_when: str | None = None
) -> tuple[sandbox.Outcome, list[str]]:
    """Run a program that confines itself first; it is stopped when it has said ``stop_when``."""
    lines: list[str] = []
    prelude = f"import os, sys, time\nfrom worker.sandbox import Limits, confine\nconfine({limits!r}, os.getppid())\n"
    argv = [sys.executable, "-c", prelude + textwrap.dedent(program)]
    outcome = sandbox.run(argv, folder, limits, lines.append, lambda: stop_when is not None and stop_when in lines)
    return outcome, lines


def test_lines_and_errors_come_back(tmp_path: Path) -> None:
    outcome, lines = run("print('one'); print('two'); sys.stderr.write('x' * 99999 + 'end'); sys.exit(3)", tmp_path)
    assert (outcome.returncode, outcome.timed_out, outcome.stopped, lines) == (
        3,
        False,
        False,
        ["one", "two"],
    )
    assert outcome.stderr.endswith("end")
    assert len(outcome.stderr) == sandbox.STDERR_BYTES


def test_memory(tmp_path: Path) -> None:
    outcome, _ = run("block = bytearray(600 * 2**20)", tmp_path)
    assert "MemoryError" in outcome.stderr


def test_file_size(tmp_path: Path) -> None:
    outcome, _ = run("open('big', 'wb').write(bytes(2 * 2**20))", tmp_path)
    assert "File too large" in outcome.stderr
    assert (tmp_path / "big").stat().st_size <= MIB


def test_cpu(tmp_path: Path) -> None:
    limits = Limits(wall_seconds=20, cpu_seconds=1, memory_bytes=512 * MIB, file_bytes=MIB)
    outcome, _ = run("while True: pass", tmp_path, limits)
    assert outcome.returncode in (-signal.SIGXCPU, -signal.SIGKILL)
    assert not outcome.timed_out


def test_wall_clock_ends_the_whole_family(tmp_path: Path) -> None:
    limits = Limits(wall_seconds=0.5, cpu_seconds=20, memory_bytes=512 * MIB, file_bytes=MIB)
    program = """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    outcome, lines = run(program, tmp_path, limits)
    assert (outcome.timed_out, outcome.returncode) == (True, -signal.SIGKILL)
    for line in lines:
        if psutil.pid_exists(int(line)):
            assert psutil.wait_procs([psutil.Process(int(line))], timeout=5)[1] == []


def test_stop(tmp_path: Path) -> None:
    outcome, _ = run("print('ready', flush=True); time.sleep(60)", tmp_path, stop_when="ready")
    assert (outcome.stopped, outcome.returncode) == (True, -signal.SIGKILL)


def test_secrets_stay_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUANT_BROKER_URL", "redis://:secret@host/0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    _, lines = run("print(sorted(os.environ), os.getcwd())", tmp_path)
    assert "AQUANT" not in lines[0]
    assert "AWS" not in lines[0]
    assert str(tmp_path) in lines[0]


def test_limits_cannot_be_raised_again(tmp_path: Path) -> None:
    _, lines = run(
        "from resource import *; print([getrlimit(what) for what in (RLIMIT_FSIZE, RLIMIT_CORE)])",
        tmp_path,
    )
    assert lines == [str([(MIB, MIB), (0, 0)])]

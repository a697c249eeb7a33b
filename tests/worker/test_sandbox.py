"""A child in the sandbox cannot take more than it is given, nor outlive its job."""

from __future__ import annotations

import os
import platform
import signal
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from worker import landlock, sandbox, seccomp
from worker.sandbox import Limits

MIB = 2**20
LIMITS = Limits(wall_seconds=20, cpu_seconds=20, memory_bytes=512 * MIB, file_bytes=MIB)


def confined(limits: Limits, folder: Path) -> str:
    """What a program begins with that confines itself."""
    return f"""
import os, sys, time
from pathlib import Path
from worker.confinement import confine
from worker.sandbox import Limits
inside = confine({limits!r}, os.getppid(), Path({str(folder)!r}))
"""


def run(
    program: str, folder: Path, limits: Limits = LIMITS, stop_when: str | None = None
) -> tuple[sandbox.Outcome, list[str]]:
    """Run a program that confines itself first; it is stopped when it has said ``stop_when``."""
    lines: list[str] = []
    argv = [sys.executable, "-c", confined(limits, folder) + textwrap.dedent(program)]
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
    limits = Limits(wall_seconds=5, cpu_seconds=20, memory_bytes=512 * MIB, file_bytes=MIB)
    program = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    lines: list[str] = []
    outcome = sandbox.run([sys.executable, "-c", program], tmp_path, limits, lines.append, lambda: False)
    assert (outcome.timed_out, outcome.returncode) == (True, -signal.SIGKILL)
    assert len(lines) == 1
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


ATTEMPTS = {
    "files": {
        "read a file outside": "open(SECRET).read()",
        "list the folder above": "os.listdir('..')",
        "write outside": "open(SECRET, 'w')",
        "go through a link": "open('link').read()",
        "read the parent's environment": "open(f'/proc/{os.getppid()}/environ').read()",
        "read the parent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb')",
        "make a link": "os.symlink(SECRET, 'another')",
        "rename out of the folder": "os.rename('own', SECRET + '.own')",
    },
    "system calls": {
        "open a socket": "__import__('socket').socket()",
        "run a program": "__import__('subprocess').run(['true'])",
        "become a program": "os.execv('/bin/true', ['true'])",
        "fork": "os.fork()",
        "signal the parent": "os.kill(os.getppid(), 0)",
        "change rights": "os.chmod(SECRET, 0o777)",
        "limit the parent": "__import__('resource').prlimit(os.getppid(), 7, (3, 3))",
        "hide memory": "os.memfd_create('x')",
    },
    "limits": {"raise a limit": "__import__('resource').setrlimit(1, (2**40, 2**40))"},
    "privileges": {"become another": "os.setuid(os.getuid() + 1)"},
}


@pytest.mark.parametrize(
    ("confinement", "attempt"), [(name, attempt) for name, attempts in ATTEMPTS.items() for attempt in attempts]
)
def test_what_the_child_cannot_do(tmp_path: Path, confinement: str, attempt: str) -> None:
    if confinement == "privileges" and os.geteuid() != 0:
        pytest.skip("only root could become another without the sandbox")
    outside, folder = tmp_path / "secret", tmp_path / "folder"
    outside.write_text("secret")
    folder.mkdir()
    (folder / "own").write_text("own")
    (folder / "link").symlink_to(outside)
    program = f"""
        SECRET = {str(outside)!r}
        print(*inside, sep=",")
        try:
            print("did", {ATTEMPTS[confinement][attempt]})
        except (OSError, ValueError) as error:  # ValueError: what Python makes of a limit's EPERM
            print("cannot:", error)
        print(open("own").read(), open("own", "w").write("written"))
    """
    outcome, lines = run(program, folder)
    assert outcome.returncode == 0, outcome.stderr
    if confinement not in lines[0].split(","):
        pytest.skip(f"this kernel or container does not confine a child's {confinement}")
    assert lines[1].startswith("cannot: [Errno 1]" if confinement == "system calls" else "cannot: "), lines
    assert lines[2] == "own 7"
    assert outside.read_text() == "secret"


def test_privileges_are_gone_for_good(tmp_path: Path) -> None:
    """Whoever runs the tests: its own user namespace, where there is one, gives a child all capabilities."""
    _, lines = run("print(Path('/proc/self/status').read_text())", tmp_path)
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert {int(status[f"Cap{which}"], 16) for which in ("Inh", "Prm", "Eff", "Amb")} == {0}


def test_what_this_kernel_offers_is_in_force(tmp_path: Path) -> None:
    _, lines = run("print(*inside, sep=',')", tmp_path)
    in_force = set(lines[0].split(","))
    assert in_force >= {"limits", "privileges"}
    assert ("files" in in_force) == (landlock.version() > 0)
    filtered = Path("/proc/sys/kernel/seccomp").exists() and platform.machine() in ("x86_64", "aarch64")
    assert ("system calls" in in_force) == filtered


def test_threads_and_libraries_work_inside(tmp_path: Path) -> None:
    program = """
        import ctypes, os, tempfile, threading
        thread = threading.Thread(target=print, args=("a thread",), kwargs={"flush": True})
        thread.start()
        thread.join()
        print(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(lambda number: number + 1)(2))
        with tempfile.TemporaryDirectory() as folder:
            print(os.path.dirname(folder) == os.getcwd(), len(os.urandom(4)))
    """
    outcome, lines = run(program, tmp_path)
    assert (outcome.returncode, lines) == (0, ["a thread", "3", "True 4"]), outcome.stderr


def test_the_filter_is_for_the_other_architecture_too() -> None:
    """64-bit ARM's filter cannot run here: it refuses by that machine's numbers, and jumps within itself."""
    code = seccomp._filter(1, 0xC00000B7, 4711)
    for index, (_, true, false, _) in enumerate(code):
        assert index + 1 + max(true, false) <= len(code)
    assert (0x15, 0, 1, 198) in code
    assert len(code) < 4096

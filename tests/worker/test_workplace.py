"""Work folders do not pile up."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from worker.workplace import clear_abandoned, disk_is_full, workplace


def test_folder_goes_whatever_happens(tmp_path: Path) -> None:
    def fail_midway() -> None:
        with workplace(tmp_path / "work", "job", 1) as folder:
            (folder / "half").write_bytes(b"x")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert list((tmp_path / "work").iterdir()) == []


def test_folders_of_dead_processes_are_cleared(tmp_path: Path) -> None:
    clear_abandoned(tmp_path / "none yet")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as living:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        for name in (f"job.1.{living.pid}", f"job.1.{dead.pid}", "something else"):
            (tmp_path / name).mkdir()
        clear_abandoned(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"job.1.{living.pid}", "something else"]


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (ValueError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (raised(RuntimeError("could not save"), OSError(errno.ENOSPC, "full")), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (MemoryError(), False),
        (None, False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error: BaseException | None, full: bool) -> None:
    assert disk_is_full(error) == full

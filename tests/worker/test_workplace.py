"""Work folders do not pile up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worker.workplace import clear_abandoned, workplace


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

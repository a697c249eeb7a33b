"""What the settings say of device and memory reaches the core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.settings import Settings
from worker.device import GpuMemory, resources


def test_settings_reach_the_core(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, device="cpu", memory_bytes=5, device_memory_bytes=7)
    given = resources(settings, tmp_path / "job")
    assert given.device == torch.device("cpu")
    assert (given.memory_bytes, given.device_bytes, given.folder) == (5, 7, tmp_path / "job")


@pytest.mark.parametrize(("there", "name"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool, name: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert resources(Settings(data_dir=tmp_path), tmp_path).device.type == name


def test_a_cpu_has_no_gpu_memory() -> None:
    assert GpuMemory(torch.device("cpu")).read() is None


@pytest.mark.gpu
def test_gpu_memory_is_read_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = GpuMemory(torch.device("cuda"))
    before = memory.read()
    assert before is not None
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert memory.read() == before
    monkeypatch.setattr(GpuMemory, "EVERY_SECONDS", 0.0)
    memory = GpuMemory(held.device)
    after = memory.read()
    assert after is not None
    assert after["total_bytes"] == before["total_bytes"] >= after["used_bytes"]
    assert after["used_bytes"] >= before["used_bytes"]
    assert after["peak_bytes"] >= len(held)

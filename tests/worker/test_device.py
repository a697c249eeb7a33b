"""What the settings say of device and memory reaches the core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.settings import GIB, Settings
from worker.device import GpuLostError, GpuMemory, gpu_is_full, gpu_is_lost, resources


def test_settings_reach_the_core(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, device="cpu", memory_bytes=5, device_memory_bytes=7, job_memory_bytes=GIB)
    given = resources(settings, "cpu", tmp_path / "job")
    assert given.device == torch.device("cpu")
    assert (given.memory_bytes, given.device_bytes, given.folder) == (5, 7, tmp_path / "job")
    assert given.limit_bytes == GIB
    assert resources(Settings(data_dir=tmp_path), "cpu", tmp_path).limit_bytes is None


def test_a_gpu_that_has_gone_is_missed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert resources(Settings(data_dir=tmp_path), "gpu", tmp_path).device.type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GpuLostError):
        resources(Settings(data_dir=tmp_path), "gpu", tmp_path)
    assert resources(Settings(data_dir=tmp_path), "cpu", tmp_path).device.type == "cpu"


@pytest.mark.parametrize(
    ("error", "lost", "full"),
    [
        (GpuLostError(), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True, False),
        (torch.OutOfMemoryError("CUDA out of memory."), False, True),
        (RuntimeError("shapes cannot be multiplied"), False, False),
    ],
)
def test_errors_of_the_gpu_are_told_from_errors_of_the_job(error: Exception, lost: bool, full: bool) -> None:
    assert (gpu_is_lost(error), gpu_is_full(error)) == (lost, full)


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

"""What the settings say of device and memory reaches the core."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from service.settings import Settings
from worker.device import resources


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

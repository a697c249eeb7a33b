"""Each worker of an embedded stack gets a GPU of its own, or its share of the rest."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from service.local_workers import TooFewGpusError, environments, visible_gpus
from service.settings import GIB, Settings


@pytest.fixture
def two_gpus(tmp_path: Path) -> dict[str, str]:
    """An environment whose nvidia-smi lists two."""
    command = tmp_path / "nvidia-smi"
    command.write_text('#!/bin/sh\n[ "$1" = -L ] && printf "GPU 0: H100 (UUID: a)\\nGPU 1: H100 (UUID: b)\\n"\n')
    command.chmod(0o755)
    return {"PATH": str(tmp_path), "OTHER": "kept"}


def test_gpus_are_those_that_may_be_seen(two_gpus: dict[str, str]) -> None:
    assert visible_gpus(two_gpus) == ["0", "1"]
    assert visible_gpus({**two_gpus, "CUDA_VISIBLE_DEVICES": "GPU-b"}) == ["GPU-b"]
    assert visible_gpus({**two_gpus, "CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({**two_gpus, "CUDA_VISIBLE_DEVICES": "-1"}) == []
    assert visible_gpus({"PATH": ""}) == []


def test_a_driver_that_does_not_answer_is_no_gpu(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed\nexit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert visible_gpus({"PATH": str(tmp_path)}) == []


def test_without_a_gpu_there_is_one_worker_that_has_everything(tmp_path: Path) -> None:
    assert environments(Settings(data_dir=tmp_path), {"PATH": ""}) == [{"PATH": ""}]


def test_one_worker_for_each_gpu(tmp_path: Path, two_gpus: dict[str, str]) -> None:
    found = environments(Settings(data_dir=tmp_path, memory_bytes=GIB), two_gpus)
    shared = {**two_gpus, "AQUANT_MEMORY_BYTES": str(GIB)}
    assert found == [{**shared, "CUDA_VISIBLE_DEVICES": "0"}, {**shared, "CUDA_VISIBLE_DEVICES": "1"}]


def test_workers_beyond_the_gpus_share_the_cores(tmp_path: Path, two_gpus: dict[str, str]) -> None:
    found = environments(Settings(data_dir=tmp_path, workers=4), two_gpus)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in found] == ["0", "1", None, None]
    assert [one.get("AQUANT_DEVICE") for one in found] == [None, None, "cpu", "cpu"]
    threads = {one.get("OMP_NUM_THREADS") for one in found[2:]}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert 4 * int(found[3]["AQUANT_MEMORY_BYTES"]) < psutil.virtual_memory().total


def test_threads_that_were_asked_for_are_kept(tmp_path: Path) -> None:
    found = environments(Settings(data_dir=tmp_path, workers=2), {"PATH": "", "OMP_NUM_THREADS": "7"})
    assert [one["OMP_NUM_THREADS"] for one in found] == ["7", "7"]


def test_more_workers_than_gpus_are_refused_where_each_must_have_one(tmp_path: Path, two_gpus: dict[str, str]) -> None:
    with pytest.raises(TooFewGpusError, match=r"3 workers, but there are 2 GPUs"):
        environments(Settings(data_dir=tmp_path, workers=3, device="cuda"), two_gpus)

"""A worker finds out what it can compute on before it takes a job."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from service.settings import Settings
from worker import probe
from worker.probe import NO_GPU, Found, NoUsableGpuError, find_device

HERE = torch.cuda.is_available()


def answers(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """There is a driver, and the child that tries it is this program."""
    run = subprocess.run
    monkeypatch.setattr(ctypes, "CDLL", lambda _: None)
    monkeypatch.setattr(subprocess, "run", lambda _, **options: run([sys.executable, "-c", code], **options))


@pytest.mark.skipif(HERE, reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(tmp_path: Path) -> None:
    found = find_device(Settings(data_dir=tmp_path))
    assert found.device == "cpu"
    assert NO_GPU in found.detail
    with pytest.raises(NoUsableGpuError, match="AQUANT_DEVICE is cuda"):
        find_device(Settings(data_dir=tmp_path, device="cuda"))


def test_a_worker_told_to_use_the_cpu_looks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, "raise SystemExit('it looked')")
    assert NO_GPU not in find_device(Settings(data_dir=tmp_path, device="cpu")).detail


def test_a_gpu_that_computes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, """print('noise'); print('{"gpu": "H100, 80 GiB", "why": ""}')""")
    assert find_device(Settings(data_dir=tmp_path)) == Found("gpu", "H100, 80 GiB")


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("""print('{"gpu": null, "why": "torch is built without CUDA"}')""", "torch is built without CUDA"),
        ("import os; os.abort()", "status -6"),
        ("print('nonsense')", "status 0"),
        ("import time; time.sleep(60)", "did not answer within"),
    ],
)
def test_a_gpu_that_does_not_compute_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, why: str
) -> None:
    answers(monkeypatch, code)
    monkeypatch.setattr(probe, "PROBE_SECONDS", 1.0 if "sleep" in code else 60.0)
    found = find_device(Settings(data_dir=tmp_path))
    assert found.device == "cpu"
    assert why in found.detail


def test_the_child_answers_for_this_machine() -> None:
    found = subprocess.run([sys.executable, "-m", "worker.probe"], capture_output=True, text=True, check=True)
    assert ('"gpu": null' in found.stdout) is not HERE

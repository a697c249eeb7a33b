"""The examples of running a checkpoint, each as a user starts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import aquant_core

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DIGITS = EXAMPLES / "digits"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network at W4A4, rounded to nearest."""
    config = aquant_core.QuantizationConfig(method="nearest", weight_bits=4, activation_bits=4)
    path = tmp_path_factory.mktemp("digits") / "quantized.safetensors"
    aquant_core.quantize(DIGITS / "plain.onnx", DIGITS / "calibration.npz", config).save(path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 test images with their labels."""
    path = tmp_path_factory.mktemp("digits") / "images.npz"
    with np.load(DIGITS / "evaluation.npz") as file:
        np.savez(path, images=file["images"][:300], labels=file["labels"][:300])
    return path


def run(example: str, checkpoint: Path, images: Path) -> list[str]:
    command = [sys.executable, str(EXAMPLES / f"{example}.py"), str(checkpoint), str(images)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def right(lines: list[str], images: Path) -> bool:
    """Whether the lines tell the first classes, which are the labels', and an accuracy near the float network's."""
    with np.load(images) as file:
        first = file["labels"][:10]
    share = float(lines[-1].removeprefix("top-1: ").removesuffix("% of 300 images"))
    return lines[-2] == "first classes: " + " ".join(map(str, first)) and share > 97


def test_on_the_cpu(checkpoint: Path, images: Path) -> None:
    lines = run("torch_cpu", checkpoint, images)
    assert len(lines) == 2
    assert right(lines, images)


@pytest.mark.gpu
def test_on_a_gpu(checkpoint: Path, images: Path) -> None:
    lines = run("torch_gpu", checkpoint, images)
    assert len(lines) == 2 + 7
    assert right(lines, images)


@pytest.mark.parametrize("example", ["torch_cpu", "torch_gpu"])
def test_they_are_short(example: str) -> None:
    assert len((EXAMPLES / f"{example}.py").read_text().splitlines()) <= 32

"""The example for onnxruntime runs by itself, on what the exporter wrote."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import aquant_core

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A quantized network as ONNX, and its accuracy as torch has it."""
    digits = EXAMPLES / "digits"
    config = {"weight_bits": 4, "activation_bits": 4, "method": "nearest"}
    result = aquant_core.quantize(digits / "plain.onnx", digits / "calibration.npz", config, digits / "evaluation.npz")
    path = tmp_path_factory.mktemp("onnx") / "quantized.onnx"
    aquant_core.write_onnx(result.model, path)
    images = aquant_core.read_images(digits / "evaluation.npz", "evaluation")
    assert images.labels is not None
    with torch.no_grad():
        return path, (result.model(images.images).argmax(1) == images.labels).float().mean().item()


def test_the_example_has_the_network_s_accuracy(exported: tuple[Path, float]) -> None:
    path, accuracy = exported
    script = EXAMPLES / "onnx_cpu.py"
    command = [sys.executable, str(script), str(path), str(EXAMPLES / "digits" / "evaluation.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"top-1: {accuracy:.2%}" in done.stdout
    assert len(script.read_text().splitlines()) <= 30


def test_the_example_needs_no_torch(exported: tuple[Path, float]) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import onnx_cpu; "
        f"onnx_cpu.main({str(exported[0])!r}, {str(EXAMPLES / 'digits' / 'evaluation.npz')!r}); "
        "print({'torch', 'aquant_core'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("set()\n")

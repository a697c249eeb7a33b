"""`aquant export` writes what the library writes, says what agrees, and names what is wrong."""

from __future__ import annotations

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import aquant_core
from aquant_core.cli import export
from aquant_core.model import QuantizedModel
from aquant_core.onnx_agreement import compare

ROOT = Path(__file__).parents[2]
app = typer.Typer()
app.command()(export)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    images = torch.rand(16, 1, 6, 6)
    config = {"weight_bits": 4, "activation_bits": 4, "method": "nearest"}
    aquant_core.quantize(network, images, config).save(tmp_path / "quantized.safetensors")
    np.savez(tmp_path / "images.npz", images=images.numpy())
    return tmp_path / "quantized.safetensors"


def test_writes_and_compares(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "quantized.onnx"
    command = [str(checkpoint), "-o", str(output), "--compare", str(tmp_path / "images.npz")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert f"{output.stat().st_size:,} bytes" in done.output
    assert "16 images in onnxruntime: 0 of" in done.output
    assert "16 predictions are the same" in done.output
    assert done.stderr == "reading\nwriting\ncomparing with onnxruntime\n"
    quiet = CliRunner().invoke(app, [*command, "--json"])
    assert quiet.stderr == ""
    found = json.loads(quiet.stdout)
    assert (found["path"], found["bytes"]) == (str(output), output.stat().st_size)
    assert (found["agreement"]["images"], found["agreement"]["share_differing"]) == (16, 0)
    aquant_core.write_onnx(aquant_core.load(checkpoint), tmp_path / "again.onnx")
    assert output.read_bytes() == (tmp_path / "again.onnx").read_bytes()


def test_how_far_it_is(checkpoint: Path, tmp_path: Path) -> None:
    model, told = aquant_core.load(checkpoint), []
    aquant_core.write_onnx(model, tmp_path / "q.onnx", lambda done, count: told.append((done, count)))
    assert told == [(done, 4) for done in range(4)]
    told.clear()
    assert isinstance(model, QuantizedModel)
    images = torch.rand(60, 1, 6, 6)
    compare(model, onnx.load(tmp_path / "q.onnx"), images, lambda done, count: told.append((done, count)))
    assert told == [(0, 60), (50, 60)]


def test_a_damaged_checkpoint_is_named_and_nothing_written(checkpoint: Path, tmp_path: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-10])
    done = CliRunner().invoke(app, [str(checkpoint), "-o", str(tmp_path / "quantized.onnx")])
    assert done.exit_code == 1
    assert str(checkpoint) in done.output
    assert not (tmp_path / "quantized.onnx").exists()


def test_a_folder_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [str(checkpoint), "-o", str(tmp_path / "missing" / "quantized.onnx")])
    assert done.exit_code == 1
    assert "No such file or directory" in done.output


def test_images_of_another_shape_are_refused_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "others.npz", images=np.zeros((16, 1, 7, 7), np.float32))
    command = [str(checkpoint), "-o", str(tmp_path / "quantized.onnx"), "--compare", str(tmp_path / "others.npz")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert "(1, 7, 7), the network takes (1, 6, 6)" in done.output
    assert not (tmp_path / "quantized.onnx").exists()


def test_is_a_command_of_aquant() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    entry = EntryPoint("export", project["entry-points"]["aquant.commands"]["export"], "aquant.commands")
    assert entry.load() is export

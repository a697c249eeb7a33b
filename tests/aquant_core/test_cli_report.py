"""The report that ``aquant quantize`` writes, and the command in it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
import typer
import uploads
from typer.testing import CliRunner

import aquant_core
from aquant_core.cli import quantize
from aquant_core.runtime import IntegerModel

CONFIG = '{"weight_bits": 2, "activation_bits": 2, "preset": "smoke", "iterations": 2}'
runner = CliRunner()
app = typer.Typer()
app.command()(quantize)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(uploads.onnx_model())
    (tmp_path / "images.npz").write_bytes(uploads.images())
    return tmp_path


def test_the_report_is_a_page_by_its_name(folder: Path) -> None:
    arguments = ["model.onnx", "--calibration", "images.npz", "--config", CONFIG, "--report", "report.html"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "reconstruct aquant block 1 of" in done.stderr
    page = (folder / "report.html").read_text()
    assert "aquant quantize model.onnx --calibration images.npz --config" in page
    assert IntegerModel(aquant_core.load("quantized.safetensors"))(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_the_command_in_the_report_repeats_the_run(folder: Path) -> None:
    (folder / "config.json").write_text(CONFIG)
    arguments = ["model.onnx", "--calibration", "images.npz", "--evaluation", "images.npz", "--report", "report.json"]
    assert runner.invoke(app, [*arguments, "--config", "config.json"]).exit_code == 0
    report = json.loads((folder / "report.json").read_text())
    first = (folder / "quantized.safetensors").read_bytes()
    assert report["size"]["checkpoint_bytes"] == len(first)
    program, command, *words = shlex.split(report["repeat"]["command"])
    assert (program, command) == ("aquant", "quantize")
    assert runner.invoke(app, [*words, "-o", "again.safetensors"]).exit_code == 0
    assert (folder / "again.safetensors").read_bytes() == first

"""``aquant quantize``: what it writes, and what it says when something is wrong."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
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


def test_checkpoint_and_page(folder: Path) -> None:
    arguments = ["model.onnx", "--calibration", "images.npz", "--config", CONFIG]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.split() == ["quantized.safetensors", "report.html"]
    assert "reconstruct aquant block 1 of" in done.stderr
    page = (folder / "report.html").read_text()
    assert "aquant quantize model.onnx --calibration images.npz --config" in page
    assert IntegerModel(aquant_core.load("quantized.safetensors")) is not None


def test_the_command_in_the_report_repeats_the_run(folder: Path) -> None:
    import shlex

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


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--config", "{oops"], 2, "neither JSON nor a file of it"),
        (["--config", "nowhere.json"], 2, "neither JSON nor a file of it"),
        (["--config", "[1]"], 2, "neither JSON nor a file of it"),
        (["--config", CONFIG, "-o", "no/folder.safetensors"], 2, "is not a folder"),
        (["--config", CONFIG, "--evaluation", "model.onnx"], 1, "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(folder: Path, arguments: list[str], code: int, words: str) -> None:
    done = runner.invoke(app, ["model.onnx", "--calibration", "images.npz", *arguments])
    assert done.exit_code == code
    assert words in " ".join(done.output.replace("│", " ").split())
    assert {path.name for path in folder.iterdir()} == {"model.onnx", "images.npz"}


def test_it_is_a_command_of_aquant() -> None:
    assert EntryPoint("quantize", "aquant_core.cli:quantize", "aquant.commands").load() is quantize

"""The core's commands: as `aquant` runs them, and what they say when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import installed
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
import typer
from hostile_files import npy_of
from onnx import helper
from typer.testing import CliRunner, Result

from aquant_core import cli, load
from aquant_core.checkpoint import read
from aquant_core.evaluation import logits_of, wilson_interval
from aquant_core.model import QuantizedModel
from aquant_core.networks import open_network
from aquant_core.report.summary import ending
from aquant_core.runtime import IntegerModel

CHECKPOINT = Path(__file__).parent / "checkpoints" / "format-2-border.safetensors"
EIGHT_BITS = CHECKPOINT.with_name("format-2-border_8_bit.safetensors")
BITS = ["--weight-bits", "4", "--activation-bits", "4", "--preset", "smoke"]

app = typer.Typer()
app.command("quantize")(cli.quantize)
app.command("eval")(cli.evaluate)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with labels, without, and float networks as ONNX; they take what the checkpoints take."""
    path = tmp_path_factory.mktemp("files")
    images = torch.rand(40, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    labels = load(CHECKPOINT)(images).argmax(1)
    labels[:10] = torch.where(labels[:10] == 3, 0, 3)  # so that 30 of 40 are right
    np.savez(path / "labelled.npz", images=images.numpy(), labels=labels.numpy())
    np.save(path / "images.npy", images.numpy())
    write_onnx(path / "float.onnx", 4)
    write_onnx(path / "fixed.onnx", 4, batch=2)
    write_onnx(path / "three.onnx", 3)
    return path


def write_onnx(path: Path, classes: int, batch: int | str = "batch") -> None:
    """A convolution, a ReLU and a classifier."""
    generator = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 1, 3, 3), "conv.bias": (4,), "fc.weight": (classes, 100), "fc.bias": (classes,)}
    weights = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["images", "conv.weight", "conv.bias"], ["maps"], strides=[1, 1]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("MaxPool", ["positive"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "fc.weight", "fc.bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "net",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [batch, 1, 12, 12])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, [batch, classes])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_accuracy_with_its_interval(folder: Path) -> None:
    done = run("eval", CHECKPOINT, "--images", folder / "labelled.npz", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    low, high = wilson_interval(0.75, 40)
    assert found == {
        "network": str(CHECKPOINT),
        "accuracy": {"top1": 0.75, "top5": 1.0, "n": 40, "interval": [round(low, 6), round(high, 6)]},
    }
    done = run("eval", CHECKPOINT, "--images", folder / "labelled.npz")
    assert done.stdout == f"top1       75.00 %  (95 %: {100 * low:.2f} % to {100 * high:.2f} %; 40 images)\n"


def test_agreement_of_a_checkpoint_with_onnx(folder: Path) -> None:
    arguments = ["eval", CHECKPOINT, "--images", folder / "images.npy", "--against", folder / "float.onnx"]
    found = json.loads(run(*arguments, "--json").stdout)
    images = torch.from_numpy(np.load(folder / "images.npy"))
    program = onnx.load(folder / "float.onnx")
    weights = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in program.graph.initializer}
    x = torch.relu(F.conv2d(images, weights["conv.weight"], weights["conv.bias"]))
    logits = F.linear(F.max_pool2d(x, 2).flatten(1), weights["fc.weight"], weights["fc.bias"])
    alike = float((logits.argmax(1) == logits_of(load(CHECKPOINT), images).argmax(1)).double().mean())
    assert "accuracy" not in found
    assert found["fidelity"]["agreement"] == pytest.approx(alike, abs=1e-6)
    assert found["fidelity"]["interval"] == [round(bound, 6) for bound in wilson_interval(alike, 40)]
    assert found["fidelity"]["against"] == str(folder / "float.onnx")
    assert run(*arguments).stdout.startswith(f"agreement  {100 * alike:.2f} %  (95 %: ")
    other_way = run("eval", folder / "float.onnx", "--images", folder / "images.npy", "--against", CHECKPOINT, "--json")
    assert json.loads(other_way.stdout)["fidelity"]["agreement"] == found["fidelity"]["agreement"]


def test_a_network_is_what_its_file_holds(folder: Path) -> None:
    cpu = torch.device("cpu")
    assert isinstance(open_network(CHECKPOINT, cpu).run, QuantizedModel)
    assert isinstance(open_network(CHECKPOINT, cpu, integers=True).run, IntegerModel)
    renamed = folder / "named.safetensors"
    renamed.write_bytes((folder / "float.onnx").read_bytes())
    assert open_network(renamed, torch.device("meta")).device == cpu
    assert list(open_network(renamed, cpu).input_shape) == [1, 12, 12]


def test_on_integers_it_decides_the_same(folder: Path) -> None:
    for arguments in (["--integers"], ["--integers", "--against", CHECKPOINT]):
        done = run("eval", CHECKPOINT, "--images", folder / "labelled.npz", "--json", *arguments)
        assert json.loads(done.stdout)["accuracy"]["top1"] == 0.75
    assert json.loads(done.stdout)["fidelity"]["agreement"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        ([CHECKPOINT, "--images", "images.npy"], 2, "has no labels: give --against"),
        ([CHECKPOINT, "--images", "labelled.npz", "--device", "tpu0"], 2, "'tpu0' is no device"),
        ([CHECKPOINT, "--images", "labelled.npz", "--device", "meta"], 2, "'meta' is neither cpu nor cuda"),
        ([CHECKPOINT, "--images", "labelled.npz", "--device", "cuda:99"], 2, "CUDA devices"),
        ([CHECKPOINT, "--images", "float.onnx"], 1, "The evaluation file cannot be read"),
        ([CHECKPOINT, "--images", "small.npz"], 1, "images are (1, 9, 9), the network takes (1, 12, 12)"),
        (["float.onnx", "--images", "small.npz"], 1, "images are (1, 9, 9), the network takes (1, 12, 12)"),
        (["images.npy", "--images", "labelled.npz"], 1, "images.npy is neither a checkpoint nor runs in onnxruntime"),
        (["fixed.onnx", "--images", "labelled.npz"], 1, "takes 2 images at a time"),
        (["three.onnx", "--images", "labelled.npz"], 1, "labels go up to 3, the network has 3 classes"),
        ([CHECKPOINT, "--images", "images.npy", "--against", "three.onnx"], 2, "the networks have 4 and 3 classes"),
        (["damaged", "--images", "labelled.npz"], 1, "Tensor 'stem.weight_zero_point' and its digest disagree"),
        (["absent", "--images", "labelled.npz"], 2, "does not exist"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_measured_is_named(
    arguments: list[Any], status: int, why: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(folder / "small.npz", images=np.zeros((20, 1, 9, 9), np.float32), labels=np.zeros(20, np.int64))
    content = CHECKPOINT.read_bytes()
    (folder / "damaged").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "1000")
    done = run("eval", *arguments)
    assert (done.exit_code, done.stdout) == (status, "")
    assert why in done.stderr


def test_a_network_is_quantized_and_then_measured(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "iterations": 2, "border": {"bits": 8}}))
    done = run(
        "quantize", folder / "float.onnx", "--calibration", folder / "images.npy", "--evaluation",
        folder / "labelled.npz", *BITS, "--seed", 4, "--config", tmp_path / "config.json", "-o", tmp_path / "q",
        "--report", tmp_path / "report.json", "--resume-from", tmp_path / "blocks",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    report, about = json.loads((tmp_path / "report.json").read_text()), read(tmp_path / "q").about
    assert (about["config"]["seed"], about["config"]["weight_bits"]) == (4, 4)  # options go over the file's
    assert about["config"]["border"]["bits"] == 8
    assert about["digests"] == report["digests"]
    top1 = report["accuracy"]["quantized"]["top1"]
    assert f"quantized  {100 * top1:.2f} % of 40" in done.stdout
    assert ending(report) == done.stdout.splitlines()[:-1]
    assert "reconstruct aquant block 1 of" in done.stderr
    assert "warning: " in done.stderr
    assert len(list((tmp_path / "blocks").iterdir())) >= 2
    measured = run("eval", tmp_path / "q", "--images", folder / "labelled.npz", "--json")
    assert json.loads(measured.stdout)["accuracy"] == report["accuracy"]["quantized"]


def test_without_labels_agreement_is_told(folder: Path, tmp_path: Path) -> None:
    done = run("quantize", folder / "float.onnx", "--calibration", folder / "images.npy", *BITS, "--method", "nearest",
               "-o", tmp_path / "q")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "quantized  decides as the float network on" in done.stdout


def test_programs_are_told_in_json(folder: Path, tmp_path: Path) -> None:
    done = run("quantize", folder / "float.onnx", "--calibration", folder / "images.npy", *BITS, "--method", "nearest",
               "-o", tmp_path / "q", "--report", tmp_path / "report.json", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert json.loads(done.stdout) == {
        "path": str(tmp_path / "q"),
        "bytes": (tmp_path / "q").stat().st_size,
        **{name: report[name] for name in ("accuracy", "fidelity", "size", "target", "warnings")},
    }


@pytest.mark.parametrize(("drop", "told"), [("100", "holds"), ("0", "does not hold, nor did any")])
def test_what_came_of_a_target_is_told(drop: str, told: str, folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "noise.npy", np.random.default_rng(0).normal(size=(400, 1, 12, 12)).astype(np.float32))
    two = {"weight_bits": 2, "activation_bits": 2}
    config = json.dumps({"sensitivity": False, "layers": {"conv": two, "fc": two}})  # nothing is left to raise
    done = run("quantize", folder / "float.onnx", "--calibration", folder / "images.npy", "--evaluation",
               tmp_path / "noise.npy", "--target", drop, "--method", "nearest", "--preset", "smoke", "--config", config,
               "-o", tmp_path / "q", "--report", tmp_path / "report.json")  # fmt: skip
    assert done.exit_code == 0, done.output
    target = json.loads((tmp_path / "report.json").read_text())["target"]
    bits = target["candidates"][target["chosen"]]["mean_weight_bits"]
    line = f"target     {drop} points lost at most: {target['drop']:.2f} with {bits:.2f} bits a weight {told}"
    assert any(printed.startswith(line) for printed in done.stdout.splitlines()), done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["--config", "list.json"], 2, "holds a list, not an object"),
        (["--config", "text"], 2, "text is neither JSON nor a file of it"),
        (["--config", "absent.json"], 2, "absent.json is neither JSON nor a file of it"),
        (["--config", '{"seed": }'], 2, "neither JSON nor a file of it"),
        (["--config", '{"seed": 1, "seed": 2}'], 2, 'names "seed" twice'),
        (["--target", "101"], 2, "less than or equal to 100"),
        (["-o", "absent/q"], 2, "there is no folder"),
        (["--report", "absent/report.json"], 2, "there is no folder"),
        (["--device", "cuda:99"], 2, "CUDA devices"),
        (["--device", "meta"], 2, "'meta' is neither cpu nor cuda"),
        (["--evaluation", "text"], 1, "The evaluation file cannot be read"),
        (["--evaluation", "vast.npy"], 1, "The memory of this machine does not do."),
        (["--resume-from", "blocks/below"], 1, "Not a directory"),
    ],
    ids=str,
)
def test_what_cannot_be_quantized_is_named(
    arguments: list[str], status: int, why: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "1000")
    Path("list.json").write_text("[1]")
    Path("text").write_text("no")
    Path("blocks").write_text("a file")
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 48}, 1, 12, 12), }}"
    Path("vast.npy").write_bytes(npy_of(header))
    done = run("quantize", folder / "float.onnx", "--calibration", folder / "images.npy", *BITS, *arguments)
    assert done.exit_code == status, done.output
    assert why in done.stderr
    assert not Path("quantized.safetensors").exists()


def aquant(path: Path, *arguments: object, program: str = "from service.cli import main; main()") -> Any:
    """`aquant` in a fresh interpreter, as if it were installed with what pyproject.toml declares."""
    known = os.pathsep.join([str(installed.metadata(path)), str(installed.ROOT)])
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": known, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_they_are_commands_of_aquant(folder: Path, tmp_path: Path) -> None:
    done = aquant(tmp_path, "eval", CHECKPOINT, "--images", folder / "labelled.npz", "--against", EIGHT_BITS, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["accuracy"]["top1"] == 0.75


def test_a_bad_configuration_is_told_in_a_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["--calibration", folder / "images.npy", "--weight-bits", 9, "--activation-bits", 4]
    done = aquant(tmp_path, "quantize", folder / "float.onnx", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "The configuration is not valid: weight_bits: must be 2 to 8, or 32 for float; got 9. "
        "Change what is named; the README has every key, --help the options.\n"
    )


def test_other_commands_import_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom service.cli import main\ntry: main()\nexcept SystemExit: pass\n"
        "print('heavy:', *{'torch', 'numpy', 'onnxruntime', 'safetensors'} & set(sys.modules))"
    )
    done = aquant(tmp_path, "--help", program=program)
    assert "quantize" in done.stdout
    assert "eval" in done.stdout
    assert done.stdout.splitlines()[-1] == "heavy:"


def test_without_the_core_s_extra_they_say_what_to_install(tmp_path: Path) -> None:
    program = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
        "from service.cli import main; main()"
    )
    done = aquant(tmp_path, "eval", "anything", "--images", "x", program=program)
    assert done.returncode == 1
    assert done.stderr == "`aquant eval` needs torch: pip install 'aquant-service[core]'.\n"


def test_a_dry_run_prints_the_plan_and_writes_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "q.safetensors"
    arguments = [folder / "float.onnx", "--calibration", folder / "images.npy", *BITS, "--dry-run", "-o", output]
    arguments += ["--report", tmp_path / "plan.html"]
    shown = run("quantize", *arguments).stdout
    assert shown.startswith("float.onnx: AQuant, 4-bit weights, 4-bit activations: what it would take")
    assert "\nmemory     up to " in shown
    result = run("quantize", *arguments, "--json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    assert (planned["dry_run"], planned["other_bits"]) == (True, ["conv", "fc"])
    assert "what it would take" in (tmp_path / "plan.html").read_text()
    assert not output.exists()

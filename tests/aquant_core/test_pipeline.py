"""``quantize`` from end to end on a small network: what it reports, what it repeats, how it is stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_runs import CALIBRATION, EVALUATION, QUICK, SHORT, make_images, make_net, run
from safetensors.torch import load_file

from aquant_core.capture_model import capture
from aquant_core.config import Method, QuantizationConfig
from aquant_core.errors import ImageSetError, UnknownLayerError
from aquant_core.evaluation import logits_digest, logits_of
from aquant_core.images import ImageSet
from aquant_core.methods import PRESETS
from aquant_core.pipeline import QuantizationResult, quantize
from aquant_core.progress import Progress


class CancelledError(Exception):
    """Raised by a test's callback."""


def saved_bytes(result: QuantizationResult, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


def test_report_is_json_and_agrees_with_the_model() -> None:
    result = run()
    report = json.loads(json.dumps(result.report, allow_nan=False))
    assert set(report) >= {
        "accuracy", "fidelity", "blocks", "layers", "size", "protocol", "seed", "versions", "digests", "seconds",
        "warnings", "config", "method", "preset",
    }  # fmt: skip
    logits = logits_of(result.model, EVALUATION.images)
    assert report["digests"]["logits"] == logits_digest(logits)
    assert EVALUATION.labels is not None
    correct = float((logits.argmax(1) == EVALUATION.labels).float().mean())
    assert report["accuracy"]["quantized"]["top1"] == pytest.approx(correct, abs=1e-6)
    assert set(report["accuracy"]) == {"float", "nearest", "quantized"}
    assert report["accuracy"]["quantized"]["n"] == report["evaluation"]["images"] == 20
    assert report["digests"]["calibration"] == CALIBRATION.digest()
    assert report["digests"]["evaluation"] == EVALUATION.digest()
    size = report["size"]
    assert size["border_parameters"] == sum(layer["border_parameters"] for layer in report["layers"])
    assert size["border_bytes"] == 2 * size["border_parameters"]
    assert report["preset"]["iterations"] == 60
    assert {"python", "torch", "numpy"} <= set(report["versions"])


def test_float_accuracy_is_the_float_networks() -> None:
    report = run(method="nearest").report
    assert EVALUATION.labels is not None
    with torch.inference_mode():
        correct = make_net()(EVALUATION.images).argmax(1) == EVALUATION.labels
    assert report["accuracy"]["float"]["top1"] == pytest.approx(float(correct.float().mean()), abs=1e-6)


@pytest.mark.parametrize("method", ["aquant", "qdrop_refactored", "qdrop", "adaround"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(method: Method, tmp_path: Path) -> None:
    first, second, other = (run(method=method, seed=seed, preset=SHORT) for seed in (5, 5, 6))
    contents = [
        saved_bytes(result, tmp_path / f"{index}.safetensors") for index, result in enumerate((first, second, other))
    ]
    assert hashlib.sha256(contents[0]).digest() == hashlib.sha256(contents[1]).digest()
    assert first.report["digests"] == second.report["digests"]
    for key in ("accuracy", "fidelity", "layers", "size", "config"):
        assert first.report[key] == second.report[key]
    # The header names the seed, so it is the tensors that must differ.
    tensors, others = (load_file(tmp_path / f"{index}.safetensors") for index in (0, 2))
    assert any(not torch.equal(tensors[name], others[name]) for name in tensors)
    assert first.report["digests"]["logits"] != other.report["digests"]["logits"]


def test_the_global_generator_neither_matters_nor_moves() -> None:
    captured = capture(make_net(), example=CALIBRATION.images[:2])
    config = QuantizationConfig(weight_bits=2, activation_bits=2)
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        digests.append(quantize(captured, CALIBRATION, config, EVALUATION, preset=SHORT).report["digests"])
        assert torch.equal(torch.get_rng_state(), before)
    assert digests[0] == digests[1]


def test_stages_come_in_order_and_progress_rises() -> None:
    told: list[Progress] = []
    run(told.append)
    stages = [progress.stage for progress in told]
    order = ["capture", "forecast", "nearest", "reconstruct", "evaluate", "sensitivity"]
    assert list(dict.fromkeys(stages)) == order
    assert stages == sorted(stages, key=order.index)
    steps = [progress for progress in told if progress.stage == "reconstruct"]
    positions = [(progress.block, progress.iteration) for progress in steps]
    assert positions == sorted(set(positions))
    assert positions == [(block, step) for block in (1, 2, 3) for step in (1, 11, 21, 31, 41, 51, 60)]
    assert {(progress.blocks, progress.iterations) for progress in steps} == {(3, 60)}
    assert all(progress.loss is not None and progress.loss >= 0 for progress in steps)
    assert all(progress.eta_seconds is not None and progress.eta_seconds >= 0 for progress in steps)
    assert steps[-1].eta_seconds == 0


@pytest.mark.parametrize("stage", ["capture", "forecast", "nearest", "reconstruct", "evaluate", "sensitivity"])
def test_an_exception_in_on_progress_ends_the_run_and_propagates(stage: str) -> None:
    told: list[str] = []
    raised = CancelledError("enough")

    def stop(progress: Progress) -> None:
        told.append(progress.stage)
        if progress.stage == stage:
            raise raised

    with pytest.raises(CancelledError) as caught:
        run(stop, preset=SHORT)
    assert caught.value is raised
    assert told.count(stage) == 1
    assert told[-1] == stage


def bits_of(result: QuantizationResult) -> dict[str, tuple[int, int]]:
    return {layer["name"]: (layer["weight_bits"], layer["activation_bits"]) for layer in result.report["layers"]}


def test_bits_of_first_last_and_overridden_layers() -> None:
    layers = {"first": {"weight_bits": 5}, "fc": {"activation_bits": 32}}
    result = run(method="nearest", weight_bits=3, activation_bits=4, first_last_bits=6, layers=layers)
    assert bits_of(result) == {"stem": (6, 6), "first": (5, 4), "second": (3, 4), "fc": (6, 32)}
    for name, (weight_bits, activation_bits) in bits_of(result).items():
        layer = result.model.layers[name]
        assert layer.weight is not None
        assert float(layer.weight.codes.max()) <= 2**weight_bits - 1
        assert (layer.activation_scale is None) == (activation_bits == 32)


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(32, 2), (2, 32), (32, 32)])
def test_one_side_may_stay_float(weight_bits: int, activation_bits: int) -> None:
    result = run(weight_bits=weight_bits, activation_bits=activation_bits)
    expected = tuple(8 if bits != 32 else 32 for bits in (weight_bits, activation_bits))
    assert bits_of(result)["stem"] == bits_of(result)["fc"] == expected
    assert bits_of(result)["first"] == (weight_bits, activation_bits)
    sqnr = {name: values["sqnr_db"] for name, values in result.report["fidelity"].items()}
    if weight_bits == activation_bits == 32:
        assert min(sqnr.values()) > 100
        return
    learned = [layer["border_parameters"] > 0 for layer in result.report["layers"]]
    assert learned == [activation_bits != 32] * 4
    blocks = result.report["blocks"]
    if activation_bits == 32:  # with float weights sixty steps on random images need not beat the searched step
        assert sum(b["error_after"] for b in blocks) < sum(b["error_before"] for b in blocks)


@pytest.mark.parametrize(
    ("changes", "name", "shortcut"),
    [
        ({}, "paper", "float"),
        ({"protocol": "qdrop"}, "qdrop", "low"),
        ({"protocol_switches": {"shortcut": "low"}}, "paper, shortcut low", "low"),
        ({"protocol_switches": {"shortcut": "float"}}, "paper", "float"),
        ({"method": "brecq"}, "paper, shortcut low", "low"),  # it carries a quantized value anyway
        ({"method": "brecq", "protocol": "all-low-bit"}, "all-low-bit", "low"),
    ],
)
def test_a_report_is_labelled_with_its_protocol(changes: dict[str, Any], name: str, shortcut: str) -> None:
    report = run(preset=replace(SHORT, iterations=1), first_last_bits=7, **changes).report
    config = QuantizationConfig.model_validate(report["config"])
    expected = config.resolved_protocol.model_dump() | {"name": name, "shortcut": shortcut, "first_last_bits": 7}
    where = "output" if changes.get("method") == "brecq" else "input"
    assert report["protocol"] == expected | {"activations_quantized_at": f"layer {where}"}
    assert report["comparison"][0]["shortcut"] == shortcut


@pytest.mark.parametrize("method", ["nearest", "a_rounding", "brecq"])
def test_eight_bits_are_near_float(method: Method) -> None:
    fidelity = run(method=method, weight_bits=8, activation_bits=8, preset=SHORT).report["fidelity"]["quantized"]
    assert fidelity["sqnr_db"] > 30
    assert fidelity["cosine"] > 0.999


def test_the_given_network_is_not_changed() -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    captured = capture(net, example=CALIBRATION.images[:2])
    digest = captured.digest()
    config = QuantizationConfig(weight_bits=2, activation_bits=2)
    quantize(captured, CALIBRATION, config, EVALUATION, preset=replace(QUICK, iterations=2))
    quantize(net, CALIBRATION, config, EVALUATION, preset=replace(QUICK, iterations=2))
    assert captured.digest() == digest
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_configured_iterations_go_over_the_presets() -> None:
    config = QuantizationConfig(weight_bits=2, activation_bits=2, preset="smoke", iterations=2)
    report = quantize(make_net(), CALIBRATION, config, EVALUATION).report
    assert report["preset"] == vars(PRESETS["smoke"]) | {"name": "smoke", "iterations": 2}
    assert {block["iterations"] for block in report["blocks"]} == {2}


def test_refusals_come_before_any_work() -> None:
    told: list[str] = []

    def listen(progress: Progress) -> None:
        told.append(progress.stage)

    with pytest.raises(UnknownLayerError, match="'head'"):
        run(listen, layers={"head": {"weight_bits": 4}})
    with pytest.raises(ImageSetError, match="too few"):
        run(listen, calibration=make_images(4, 1))
    with pytest.raises(ImageSetError, match="go up to 7"):
        run(listen, evaluation=ImageSet(EVALUATION.images, torch.full((20,), 7)))
    assert set(told) == {"capture"}

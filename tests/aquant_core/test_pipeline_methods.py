"""What each method learns in ``quantize``, alone and beside others on the same images."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pipeline_runs import CALIBRATION, EVALUATION, QUICK, SHORT, run
from torch import Tensor, nn

from aquant_core.config import Method
from aquant_core.evaluation import logits_digest, logits_of
from aquant_core.pipeline import QuantizationResult, quantize
from aquant_core.progress import Progress

LEARNED: list[Method] = ["brecq", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"]


@pytest.mark.parametrize("method", LEARNED)
def test_learning_lowers_the_error_of_the_blocks(method: Method) -> None:
    report = run(method=method).report
    blocks = report["blocks"]
    assert [block["layers"] for block in blocks] == [["stem"], ["first", "second"], ["fc"]]
    mean = {key: sum(block[key] for block in blocks) / len(blocks) for key in ("error_before", "error_after")}
    assert mean["error_after"] < mean["error_before"]
    # The one of 2 bits. Where outputs are quantized, the shortcut's and its own stay in the error.
    at_outputs = method in ("brecq", "qdrop")
    assert blocks[1]["error_after"] < (0.96 if at_outputs else 0.9) * blocks[1]["error_before"]
    for block in blocks:
        assert block["iterations"] == 60
        assert block["loss"]["iterations"] == [0, 10, 20, 30, 40, 50, 59]
        assert len(block["loss"]["values"]) == 7
    assert report["method"] == method
    assert report["protocol"]["activations_quantized_at"] == ("layer output" if at_outputs else "layer input")
    assert [value["name"] for value in report["values"]] == (VALUES if at_outputs else [])
    has_border = [layer["border_parameters"] for layer in report["layers"]]
    assert has_border == ([3 * 27, 3 * 54, 3 * 54, 3 * 6] if method == "aquant" else [0] * 4)


VALUES = ["input.quantize", "relu.quantize", "relu_1.quantize", "relu_2.quantize"]


def test_adaround_learns_layer_by_layer_and_weights_alone() -> None:
    result, plain = (run(method="adaround", preset=preset) for preset in (QUICK, replace(QUICK, iterations=1)))
    blocks = result.report["blocks"]
    assert [block["iterations"] for block in blocks] == [60, 120, 60]
    assert blocks[1]["layers"] == ["first", "second"]
    one_layer = [0, 10, 20, 30, 40, 50, 59]
    assert blocks[1]["loss"]["iterations"] == [*one_layer, *(60 + step for step in one_layer)]
    assert blocks[1]["error_after"] < blocks[1]["error_before"]
    steps, searched = ([value["step"] for value in each.report["values"]] for each in (result, plain))
    assert steps == searched
    assert [value["name"] for value in result.report["values"]] == VALUES
    assert result.report["digests"]["logits"] != plain.report["digests"]["logits"]


@pytest.mark.parametrize(("method", "learned"), [("brecq", VALUES), ("qdrop", VALUES), ("adaround", [])])
def test_the_step_of_an_output_moves_where_the_method_learns_it(method: Method, learned: list[str]) -> None:
    steps = []
    for scale_rate in (0.0, 1e-2):
        report = run(method=method, preset=replace(SHORT, scale_rate=scale_rate)).report
        assert all(layer["step"] is None and layer["input_from"] in VALUES for layer in report["layers"])
        assert [layer["activation_bits"] for layer in report["layers"]] == [8, 2, 2, 8]
        steps.append({value["name"]: value["step"] for value in report["values"]})
    assert [name for name in VALUES if steps[0][name] != steps[1][name]] == learned


def test_a_rounding_learns_nothing_and_flips_at_inference() -> None:
    result, nearest = run(method="a_rounding"), run(method="nearest")
    assert result.report["blocks"] == []
    for layer, to_nearest in zip(result.report["layers"], nearest.report["layers"], strict=True):
        assert layer["sqnr_db"]["input"] is None  # the flips are made inside the product
        for key in ("step", "zero_point", "weight_bits", "activation_bits"):
            assert layer[key] == to_nearest[key]
    fidelity = result.report["fidelity"]
    assert fidelity["nearest"] == nearest.report["fidelity"]["quantized"] != fidelity["quantized"]
    assert all(layer.a_rounding for layer in result.model.layers.values())
    for layer in result.model.layers.values():
        layer.a_rounding = False
    logits = logits_of(result.model, EVALUATION.images)
    assert logits_digest(logits) == nearest.report["digests"]["logits"]


def test_nearest_learns_nothing() -> None:
    stages: list[str] = []
    result = run(lambda progress: stages.append(progress.stage), method="nearest", sensitivity=False)
    assert stages == ["capture", "nearest", "evaluate"]
    assert result.report["sensitivity"] is None
    assert result.report["blocks"] == []
    fidelity = result.report["fidelity"]
    assert fidelity["nearest"] == fidelity["quantized"]


def test_a_quantized_shortcut_has_a_step_that_is_learned() -> None:
    switches = {"shortcut": "low"}
    plain, learned = (
        run(method=method, protocol_switches=switches, preset=SHORT).report["values"]
        for method in ("nearest", "aquant")
    )
    assert [value["name"] for value in plain] == ["relu.quantize"]
    assert [value["bits"] for value in plain] == [2]
    assert plain[0]["step"] != learned[0]["step"]


COMPARED: list[Method] = ["qdrop", "adaround", "nearest", "a_rounding", "qdrop_refactored"]


@pytest.fixture(scope="module")
def compared() -> tuple[QuantizationResult, list[Progress]]:
    told: list[Progress] = []
    return run(told.append, preset=SHORT, compare=COMPARED), told


@pytest.mark.parametrize("method", ["aquant", *COMPARED])
def test_a_compared_method_gives_what_it_gives_alone(
    method: Method, compared: tuple[QuantizationResult, list[Progress]]
) -> None:
    report, alone = compared[0].report, run(method=method, preset=SHORT).report
    rows = {row["method"]: row for row in report["comparison"]}
    assert list(rows) == ["aquant", *COMPARED]
    assert rows[method]["logits"] == alone["digests"]["logits"]
    (own,) = alone["comparison"]
    assert {**rows[method], "seconds": 0} == {**own, "seconds": 0}
    assert own["accuracy"] == alone["accuracy"]["quantized"]
    assert own["fidelity"] == alone["fidelity"]["quantized"]
    assert own["block_errors"] == {block["name"]: block["error_after"] for block in alone["blocks"]}
    assert own["border_parameters"] == alone["size"]["border_parameters"]
    if method == "aquant":
        assert report["digests"] == alone["digests"]
        assert report["accuracy"] == alone["accuracy"]
        assert [block["name"] for block in report["blocks"]] == ["stem", "first", "fc"]


def test_an_output_placed_method_may_lead() -> None:
    report = run(method="qdrop", compare=["aquant"], preset=SHORT).report
    for method in ("qdrop", "aquant"):
        (row,) = (row for row in report["comparison"] if row["method"] == method)
        assert row["logits"] == run(method=method, preset=SHORT).report["digests"]["logits"]
    # Nearest is the same whoever leads, also where nobody quantizes layers' inputs.
    nearest = run(method="nearest").report["fidelity"]["quantized"]
    assert report["fidelity"]["nearest"] == nearest
    assert run(method="qdrop", preset=SHORT).report["fidelity"]["nearest"] == nearest


def test_progress_names_the_methods(compared: tuple[QuantizationResult, list[Progress]]) -> None:
    result, told = compared
    learned = ["aquant", "qdrop", "adaround", "qdrop_refactored"]
    order = ["capture", "forecast", "nearest", "reconstruct", "evaluate", "sensitivity"]
    assert list(dict.fromkeys(p.stage for p in told)) == order
    by_stage = {stage: [p.method for p in told if p.stage == stage] for stage in ("capture", "nearest")}
    assert by_stage == {"capture": [None], "nearest": [None]}
    # One check before each of the four blocks, the mean's included.
    assert [p.method for p in told if p.stage == "forecast"] == [name for name in learned for _ in range(4)]
    assert [p.method for p in told if p.stage == "evaluate"] == ["aquant", *COMPARED]
    steps = [p for p in told if p.stage == "reconstruct"]
    # Block by block, in each every method; of six iterations the first and the last of each unit are told.
    expected = [
        (block, name, iteration, iterations)
        for block in (1, 2, 3)
        for name in learned
        for iteration, iterations in (
            [(1, 12), (6, 12), (7, 12), (12, 12)] if (name, block) == ("adaround", 2) else [(1, 6), (6, 6)]
        )
    ]
    assert [(p.block, p.method, p.iteration, p.iterations) for p in steps] == expected
    assert all(p.blocks == 3 for p in steps)
    assert all(p.eta_seconds is not None and p.eta_seconds >= 0 for p in steps)
    assert steps[-1].eta_seconds == 0
    forecasts = [p.forecast for p in told if p.forecast is not None]
    assert forecasts == [result.report["forecast"]]


def test_a_lone_method_is_named_too() -> None:
    told: list[Progress] = []
    run(told.append, preset=SHORT, method="brecq")
    assert {p.method for p in told if p.stage in ("forecast", "reconstruct", "evaluate")} == {"brecq"}


class PooledFirst(nn.Module):
    """The pooling stands between a convolution and its activation function, in a block without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(nn.functional.max_pool2d(self.stem(x), 2))
        logits: Tensor = self.fc(torch.relu(self.second(x)).mean((2, 3)))
        return logits


def test_a_value_made_in_a_block_without_layers_has_a_learned_step_too() -> None:
    torch.manual_seed(0)
    net = PooledFirst().eval()
    config = {"weight_bits": 2, "activation_bits": 2}
    searched, learned = (
        quantize(net, CALIBRATION, config | {"method": method}, EVALUATION, preset=SHORT).report
        for method in ("adaround", "qdrop")
    )
    assert [block["layers"] for block in learned["blocks"]] == [["stem"], [], ["second"], ["fc"]]
    assert [block["iterations"] for block in learned["blocks"]] == [6] * 4
    assert [block["iterations"] for block in searched["blocks"]] == [6, 0, 6, 6]
    steps = [{value["name"]: value["step"] for value in report["values"]} for report in (searched, learned)]
    assert len(steps[0]) == 3
    assert all(steps[0][name] != steps[1][name] for name in steps[0])
    by_layer = {layer["name"]: layer for layer in learned["layers"]}
    assert by_layer["second"]["activation_bits"] == 2
    assert by_layer["second"]["input_from"] in steps[1]

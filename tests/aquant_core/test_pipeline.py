"""``quantize`` from end to end on a small network: what it reports, what it repeats, how it is stopped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aquant_core.capture_model import capture
from aquant_core.config import Method, QuantizationConfig
from aquant_core.errors import ImageSetError, NonFiniteError, UnknownLayerError
from aquant_core.evaluation import logits_digest, logits_of
from aquant_core.images import ImageSet
from aquant_core.methods import PRESETS, Preset
from aquant_core.pipeline import QuantizationResult, quantize
from aquant_core.progress import Progress

LEARNED: list[Method] = ["brecq", "qdrop", "qdrop_refactored", "aquant_no_border", "aquant"]
QUICK = Preset(60, 16, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
SHORT = replace(QUICK, iterations=6, batch_size=8)


class Net(nn.Module):
    """A stem, a residual block and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.second(torch.relu(self.first(x))))
        return self.fc(x.mean((2, 3)))


class CancelledError(Exception):
    """Raised by a test's callback."""


def make_images(count: int, seed: int, labels: bool = False) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 12, 12, generator=generator)
    return ImageSet(images, torch.randint(5, (count,), generator=generator) if labels else None)


CALIBRATION, EVALUATION = make_images(48, 1), make_images(20, 2, labels=True)


def make_net() -> Net:
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 3, 12, 12))  # gives the norm statistics of its own
    return net.eval()


def run(
    on_progress: Any = None,
    evaluation: ImageSet | None = EVALUATION,
    preset: Preset | None = QUICK,
    calibration: ImageSet | Tensor = CALIBRATION,
    **changes: Any,
) -> QuantizationResult:
    config = QuantizationConfig(**{"weight_bits": 2, "activation_bits": 2} | changes)
    return quantize(make_net(), calibration, config, evaluation, on_progress, preset)


def saved_bytes(result: QuantizationResult, path: Path) -> bytes:
    result.save(path)
    return path.read_bytes()


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


def test_without_evaluation_images_some_are_held_back() -> None:
    report = run(evaluation=None, method="nearest").report
    assert report["evaluation"]["images"] == 48 // 8
    assert report["accuracy"] is None
    assert report["fidelity"]["quantized"]["n"] == 6
    assert any("6 calibration images held back" in warning for warning in report["warnings"])
    held_back = ImageSet(CALIBRATION.images[-6:])
    assert report["digests"]["evaluation"] == held_back.digest()
    assert report["digests"]["calibration"] == CALIBRATION.digest()
    labelled = run(evaluation=None, method="nearest", calibration=make_images(48, 1, labels=True)).report
    assert labelled["accuracy"]["quantized"]["n"] == 6


def test_what_is_held_back_is_not_learned_from() -> None:
    changed = CALIBRATION.images.clone()
    changed[-6:] = torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(9))
    first, second = (run(evaluation=None, calibration=images, preset=SHORT) for images in (CALIBRATION.images, changed))
    states = [result.model.state_dict() for result in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_tensor_will_do_for_calibration() -> None:
    by_set, by_tensor = run(method="nearest"), run(method="nearest", calibration=CALIBRATION.images)
    assert by_set.report["digests"] == by_tensor.report["digests"]


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


def test_images_by_path_and_config_as_a_dict(tmp_path: Path) -> None:
    CALIBRATION.save(tmp_path / "images.safetensors")
    values = {"weight_bits": 4, "activation_bits": 4, "method": "nearest"}
    by_path = quantize(make_net(), tmp_path / "images.safetensors", values)
    by_value = quantize(make_net(), CALIBRATION, QuantizationConfig.model_validate(values))
    assert by_path.report["digests"] == by_value.report["digests"]


def test_images_of_another_kind_are_refused() -> None:
    with pytest.raises(ImageSetError, match="calibration images are a list"):
        quantize(make_net(), [1, 2], {"weight_bits": 4, "activation_bits": 4})  # type: ignore[arg-type]


def test_labels_of_the_calibration_images_are_checked_too() -> None:
    labelled = ImageSet(CALIBRATION.images, torch.full((48,), 5))
    with pytest.raises(ImageSetError, match="calibration labels go up to 5, the network has 5 classes"):
        run(calibration=labelled)


def test_outputs_that_are_not_finite() -> None:
    images = EVALUATION.images.clone()
    images[3] *= 5e37  # finite itself, not behind the second convolution
    with pytest.raises(NonFiniteError, match="float network"):
        run(evaluation=ImageSet(images))


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


@pytest.mark.parametrize("what", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.nan), NonFiniteError, "1 of 20 {what} images hold NaN"),
        (lambda x: x[:0], ImageSetError, r"The {what} images are torch.float32 of shape \(0, 3, 12, 12\)"),
        (lambda x: x[0], ImageSetError, r"shape \(3, 12, 12\), not float32 \(N, C, H, W\)"),
        (lambda x: x.double(), ImageSetError, "torch.float64"),
    ],
)
def test_bad_tensors_are_named(what: str, spoil: Any, error: type[Exception], words: str) -> None:
    images = {"calibration": CALIBRATION.images, "evaluation": EVALUATION.images}
    images[what] = spoil(EVALUATION.images)
    with pytest.raises(error, match=words.format(what=what)):
        quantize(make_net(), images["calibration"], {"weight_bits": 2, "activation_bits": 2}, images["evaluation"])

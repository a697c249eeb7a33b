"""What raising a layer is said to gain and to cost: by hand, by laws, and against runs in which it is raised."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from aquant_core.config import QuantizationConfig
from aquant_core.images import ImageSet
from aquant_core.methods import Preset
from aquant_core.pipeline import quantize
from aquant_core.sensitivity import expected_gain

PRESET = Preset(30, 16, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)


class Net(nn.Module):
    """Two layers of low bits between a first and a last of eight; odd widths, so that codes end within a byte."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 9, 3, padding=1)
        self.wide = nn.Conv2d(9, 9, 3, stride=2, padding=1)
        self.other = nn.Conv2d(9, 11, 3, stride=2, padding=1)
        self.fc = nn.Linear(11, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.other(torch.relu(self.wide(torch.relu(self.stem(x))))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def make_images(count: int, seed: int) -> ImageSet:
    """Five classes: a bright square at one of five places, in noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    images = 0.6 * torch.randn(count, 1, 8, 8, generator=generator)
    for index, label in enumerate(labels.tolist()):
        images[index, 0, label : label + 3, (2 * label) % 6 : (2 * label) % 6 + 2] += 1 + 0.3 * label
    return ImageSet(images, labels)


CALIBRATION, EVALUATION = make_images(64, 1), make_images(400, 2)


@cache
def trained() -> Net:
    training = make_images(512, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(training.images), training.labels).backward()
        optimizer.step()
    return net.eval()


def run(evaluation: ImageSet = EVALUATION, **changes: Any) -> dict[str, Any]:
    config = QuantizationConfig.model_validate({"weight_bits": 2, "activation_bits": 2} | changes)
    return quantize(trained(), CALIBRATION, config, evaluation, preset=PRESET).report


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return run()


def test_the_reports_part(report: dict[str, Any]) -> None:
    sensitivity = json.loads(json.dumps(report["sensitivity"], allow_nan=False))
    assert (sensitivity["metric"], sensitivity["n"]) == ("top1", 400)
    layers = sensitivity["layers"]
    assert {layer["layer"] for layer in layers} == {"wide", "other"}  # first and last have 8 bits
    for layer in layers:
        assert (layer["bits"], layer["raised_bits"]) == ([2, 2], [4, 4])
        assert layer["interval"][0] <= layer["gain"] <= layer["interval"][1]
    assert [layer["gain"] for layer in layers] == sorted((layer["gain"] for layer in layers), reverse=True)
    assert 0 < sum(layer["error_share"] for layer in layers) < 1


# Weights of 9 x 9 x 3 x 3 and 11 x 9 x 3 x 3: 729 codes are 183 bytes at 2 bits, 365 at 4; 891 are 223 and 446.
@pytest.mark.parametrize(("layer", "bytes_more"), [("wide", 182), ("other", 223)])
def test_a_raised_layer_costs_and_gains_what_was_said(layer: str, bytes_more: int, report: dict[str, Any]) -> None:
    (said,) = (entry for entry in report["sensitivity"]["layers"] if entry["layer"] == layer)
    raised = run(layers={layer: {"weight_bits": 4, "activation_bits": 4}}, sensitivity=False)
    assert said["cost_bytes"] == raised["size"]["quantized_bytes"] - report["size"]["quantized_bytes"] == bytes_more
    gained = raised["accuracy"]["quantized"]["top1"] - report["accuracy"]["quantized"]["top1"]
    assert said["interval"][0] <= gained <= said["interval"][1]


def test_it_changes_nothing_else(report: dict[str, Any]) -> None:
    without = run(sensitivity=False)
    assert without["sensitivity"] is None
    assert without["digests"] == report["digests"]
    assert run()["sensitivity"] == report["sensitivity"]


def test_without_labels_it_is_agreement_that_is_gained(report: dict[str, Any]) -> None:
    blind = run(ImageSet(EVALUATION.images))
    assert blind["sensitivity"]["metric"] == "agreement"
    shares = [
        {entry["layer"]: entry["error_share"] for entry in one["sensitivity"]["layers"]} for one in (report, blind)
    ]
    assert shares[0] == shares[1]
    lost = 1 - blind["fidelity"]["quantized"]["agreement"]
    for entry in blind["sensitivity"]["layers"]:
        assert entry["gain"] == pytest.approx(lost * (1 - math.sqrt(1 - entry["error_share"])), abs=2e-6)


def test_layers_with_four_bits_are_tried_at_six_and_those_with_eight_not_at_all() -> None:
    layers = {"wide": {"weight_bits": 4, "activation_bits": 8}, "other": {"weight_bits": 8, "activation_bits": 8}}
    (entry,) = run(layers=layers)["sensitivity"]["layers"]
    assert (entry["layer"], entry["bits"], entry["raised_bits"]) == ("wide", [4, 8], [6, 8])
    assert entry["cost_bytes"] == 547 - 365
    assert run(weight_bits=8, activation_bits=32)["sensitivity"] == {"metric": "top1", "n": 400, "layers": []}


@pytest.mark.parametrize("method", ["nearest", "a_rounding", "adaround", "qdrop"])
def test_every_method_has_it(method: str) -> None:
    layers = run(method=method)["sensitivity"]["layers"]
    assert {entry["layer"] for entry in layers} == {"wide", "other"}
    assert all(entry["error_share"] > 0 for entry in layers)


def answers(right: int, wrong: int) -> Tensor:
    return torch.tensor([True] * right + [False] * wrong)


def test_expected_gain_by_hand() -> None:
    # 100 images; the float network has 98 right, the quantized one 82 of these: 0.16 lost. Without 3/4 of the error,
    # half of that is. By chance: 1.96 sqrt(16 + 1) / 100 = 0.080811. The loss itself: centre 16/102, spread
    # 1.96 sqrt(17 - 256/102) / 102 = 0.073150, so 0.083712 to 0.230013; half of its distances: 0.038144 and 0.035006.
    gain, low, high = expected_gain(0.75, answers(98, 2), answers(82, 18))
    assert gain == pytest.approx(0.08)
    assert low == pytest.approx(0.08 - math.sqrt(0.06**2 + 0.038144**2 + 0.080811**2), abs=2e-6)
    assert high == pytest.approx(0.08 + math.sqrt(0.08**2 + 0.035006**2 + 0.080811**2), abs=2e-6)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 60), st.integers(0, 60))
def test_more_of_the_error_is_more_gain_within_what_was_lost(
    one: float, other: float, of_float: int, of_quantized: int
) -> None:
    right = answers(of_float, 60 - of_float), answers(of_quantized, 60 - of_quantized)
    (small, *_), (large, low, high) = (expected_gain(share, *right) for share in sorted((one, other)))
    lost = max(of_float - of_quantized, 0) / 60
    assert 0 <= small <= large <= lost + 1e-9
    assert low <= large <= high
    assert low < 0 or lost > 0

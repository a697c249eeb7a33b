"""Which numbers call for which warning, and which do not."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from aquant_core.caveats import caveats

ACCURACY = {"top1": 0.9, "n": 5000, "interval": [0.89, 0.91]}
PART = {
    "name": "conv", "weight_bits": 2, "activation_bits": 2, "clipped_share": 0.02, "clipped_share_calibration": 0.02,
    "dead_channels": {"float": 1, "quantized": 1},
}  # fmt: skip
BLOCK = {
    "name": "block", "layers": ["conv"], "iterations": 20, "error_before": 2.0, "error_after": 1.0,
    "error_held_out": 1.2,
}  # fmt: skip
FINE: dict[str, Any] = {
    "accuracy": {"quantized": ACCURACY},
    "fidelity": {"quantized": ACCURACY},
    "gap": {"interval": [-0.01, 0.02], "calibration": {"agreement": 0.95}, "held_out": {"agreement": 0.945}},
    "blocks": [BLOCK],
    "layers": [PART],
    "values": [],
    "scales": {"differ": False},
}
LOGITS = {"aquant": torch.zeros(2, 3)}


def told(changes: dict[str, Any]) -> list[str]:
    """Of a report with changes by path, say ``blocks.0.iterations``."""
    report = deepcopy(FINE)
    for path, value in changes.items():
        *parents, last = (int(step) if step.isdigit() else step for step in path.split("."))
        place: Any = report
        for step in parents:
            place = place[step]
        place[last] = value
    return caveats(report, LOGITS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"accuracy.quantized.interval": [0.87, 0.93]},
            "Accuracy was measured on 5000 images, so it is known to ± 3.0",
        ),
        ({"accuracy": None, "fidelity.quantized.interval": [0.87, 0.93]}, "Agreement was measured"),
        ({"gap.interval": [0.001, 0.05]}, "95.0% of the calibration images and on 94.5% of the others"),
        ({"blocks.0.error_after": 2.1}, "Learning raised the error of block"),
        ({"blocks.0.error_held_out": 1.6}, "The error of block is more than 1.5 times as high"),
        ({"layers.0.clipped_share": 0.041}, "What conv gets from the evaluation images"),
        ({"layers.0.dead_channels": {"float": 1, "quantized": 2}}, "whole input channels of conv to 0"),
    ],
)
def test_a_warning(changes: dict[str, Any], words: str) -> None:
    (warning,) = told(changes)
    assert words in warning


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers.0.weight_bits": 8, "layers.0.activation_bits": 8, "blocks.0.error_after": 2.1},  # next to nothing
        {"blocks.0.iterations": 0, "blocks.0.error_after": 2.0, "blocks.0.error_held_out": 9.0},  # nothing was learned
        {"layers.0.clipped_share": 0.009, "layers.0.clipped_share_calibration": 0.001},  # nine times next to nothing
        {"layers.0.clipped_share": 0.5, "layers.0.clipped_share_calibration": 0.3},  # so it was calibrated
        {"layers.0.clipped_share": None, "layers.0.dead_channels": None},  # a float input
    ],
)
def test_none(changes: dict[str, Any]) -> None:
    assert told(changes) == []


def test_images_scaled_differently_make_other_advice_wrong() -> None:
    spoilt = {
        "gap.interval": [0.001, 0.05],
        "blocks.0.error_after": 2.1,
        "blocks.0.error_held_out": 9.0,
        "layers.0.clipped_share": 0.9,
        "layers.0.dead_channels": {"float": 1, "quantized": 2},
    }
    assert len(told(spoilt)) == 5
    assert told(spoilt | {"scales.differ": True}) == []
    (warning,) = told(spoilt | {"scales.differ": True, "accuracy.quantized.interval": [0.87, 0.93]})
    assert "so it is known to" in warning


def test_many_layers_are_counted() -> None:
    parts = [PART | {"name": f"conv{n}", "clipped_share": 0.3} for n in range(8)]
    (warning,) = told({"layers": parts})
    assert "conv0, conv1, conv2, conv3, conv4 and 3 more" in warning


def test_networks_of_no_use() -> None:
    logits = {"aquant": torch.tensor([[1.0, float("nan")]]), "qdrop": torch.ones(1, 2)}
    (warning,) = caveats(FINE, logits)  # type: ignore[arg-type]
    assert warning.startswith("The outputs of aquant's network hold NaN or infinity")

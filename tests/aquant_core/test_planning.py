"""A plan says what a run would do, as that run then does it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from reports import Net

from aquant_core.config import QuantizationConfig
from aquant_core.errors import DryRunError, UnknownLayerError
from aquant_core.images import ImageSet
from aquant_core.methods import Preset
from aquant_core.pipeline import quantize
from aquant_core.planning import plan
from aquant_core.progress import Progress
from aquant_core.report.plan import Plan
from aquant_core.resources import Resources

SHORT = Preset(6, 8, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)


torch.manual_seed(0)
NET = Net().eval()
IMAGES = ImageSet(torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(1)))


def config(**changes: Any) -> QuantizationConfig:
    return QuantizationConfig(**{"weight_bits": 2, "activation_bits": 3, "dry_run": True} | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "paper"},  # with a fused border, alpha apart
        {"border": {"alpha": "learned"}, "layers": {"first": {"weight_bits": 4, "activation_bits": 32}}},
        {"method": "qdrop", "protocol": "qdrop", "compare": ["nearest"]},
        {"method": "nearest"},
        {"weight_bits": 32},
    ],
)
def test_the_run_is_as_planned(changes: dict[str, Any]) -> None:
    planned = plan(NET, IMAGES, config(**changes), preset=SHORT)
    report = quantize(NET, IMAGES, config(**changes, dry_run=False), preset=SHORT).report
    shown = Plan.model_validate_json(json.dumps(planned, allow_nan=False))
    assert shown.model_dump(mode="json", exclude_unset=True) == json.loads(json.dumps(planned))
    assert planned["size"] == report["size"]
    for row, done in zip(planned["layers"], report["layers"], strict=True):
        assert row == {key: done[key] for key in row}
    assert planned["values"] == [{key: value[key] for key in ("name", "bits")} for value in report["values"]]
    for key in ("method", "protocol", "preset", "settings", "seed", "versions", "evaluation", "device"):
        assert planned[key] == report[key]
    assert planned["warnings"] == report["warnings"][: len(planned["warnings"])]  # a run adds those of its results
    assert planned["digests"] == {name: digest for name, digest in report["digests"].items() if name != "logits"}
    assert planned["dry_run"] is True
    assert [layer for block in planned["blocks"] for layer in block["layers"]] == [
        row["name"] for row in report["layers"]
    ]
    learned = [block["name"] for block in planned["blocks"] if "seconds" in block]
    if planned["forecast"] is None:
        assert (learned, report["forecast"]) == ([], None)
    else:
        assert learned == [block["name"] for block in report["forecast"]["blocks"]]
        assert all(
            block["peak_bytes"] > 0 and block["placement"] == "memory" for block in planned["forecast"]["blocks"]
        )


def test_what_is_kept_at_other_bits_is_named() -> None:
    planned = plan(NET, IMAGES, config(layers={"second": {"weight_bits": 4}}), preset=SHORT)
    assert planned["other_bits"] == ["stem", "second", "fc"]
    bits = {row["name"]: (row["weight_bits"], row["activation_bits"]) for row in planned["layers"]}
    assert bits == {"stem": (8, 8), "first": (2, 3), "second": (4, 3), "fc": (8, 8)}


def test_it_ends_after_its_forecast() -> None:
    seen: list[Progress] = []
    planned = plan(NET, IMAGES, config(), on_progress=seen.append, preset=SHORT)
    assert list(dict.fromkeys(progress.stage for progress in seen)) == ["capture", "forecast"]
    assert seen[-1].forecast == planned["forecast"]


@pytest.mark.parametrize(
    ("resources", "standing"),
    [
        (Resources(memory_bytes=1 << 50), "within"),
        (Resources(memory_bytes=1 << 50, limit_bytes=1 << 50), "within"),
        (Resources(memory_bytes=0), "beyond_budget"),  # the process itself is more
        (Resources(memory_bytes=0, limit_bytes=1 << 50), "beyond_budget"),
        (Resources(memory_bytes=1 << 50, limit_bytes=1 << 20), "beyond_limit"),
    ],
)
def test_it_is_told_how_the_forecast_stands(resources: Resources, standing: str) -> None:
    planned = plan(NET, IMAGES, config(), preset=SHORT, resources=resources)
    assert (planned["budget_bytes"], planned["limit_bytes"]) == (resources.memory_bytes, resources.limit_bytes)
    assert Plan.model_validate(planned).standing == standing


def test_refusals_are_those_of_a_run() -> None:
    with pytest.raises(UnknownLayerError, match="nowhere"):
        plan(NET, IMAGES, config(layers={"nowhere": {}}))


def test_quantize_does_not_run_what_asks_for_a_forecast() -> None:
    with pytest.raises(DryRunError, match=r"aquant_core\.plan"):
        quantize(NET, IMAGES, config())


def test_of_a_search_it_is_said_that_this_is_one_network() -> None:
    planned = plan(NET, IMAGES, config(target={"max_accuracy_drop": 1}), preset=SHORT)
    assert "tries several networks" in planned["warnings"][-1]

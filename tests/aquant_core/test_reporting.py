"""What the report adds up, and that two runs alike give one report."""

from __future__ import annotations

from typing import Any

import pytest
import reports
from hypothesis import given
from hypothesis import strategies as st

from aquant_core.methods import Preset
from aquant_core.reporting import CURVE_POINTS, thinned

TIMES = {"seconds", "stages", "peak_bytes", "forecast"}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def test_two_runs_alike_give_one_report() -> None:
    first, second, other = (reports.run(compare=["nearest"], seed=seed) for seed in (3, 3, 4))
    assert without_times(first) == without_times(second)
    for key in ("layers", "blocks", "gap", "fidelity"):
        assert without_times(first)[key] != without_times(other)[key]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return reports.run(compare=["brecq", "nearest"])


def test_every_method_is_set_against_float_and_the_chosen_one_against_all(report: dict[str, Any]) -> None:
    pairs = [(each["method"], each["baseline"]) for each in report["differences"]]
    others = ["nearest", "brecq"]
    to_float = [("aquant", "float"), *((name, "float") for name in others)]
    assert pairs == [*to_float, *(("aquant", name) for name in others)]
    top1 = {row["method"]: row["accuracy"]["top1"] for row in report["comparison"]}
    top1["float"] = report["accuracy"]["float"]["top1"]
    assert top1["nearest"] == report["accuracy"]["nearest"]["top1"]
    for each in report["differences"]:
        assert each["top1"] == pytest.approx(top1[each["method"]] - top1[each["baseline"]], abs=1e-6)
        assert each["interval"][0] < each["top1"] < each["interval"][1]


def test_the_gap_is_of_as_many_calibration_images_as_were_evaluated(report: dict[str, Any]) -> None:
    gap = report["gap"]
    assert gap["calibration"]["n"] == gap["held_out"]["n"] == 20  # of 40
    assert gap["held_out"] == report["fidelity"]["quantized"]
    assert gap["agreement"] != 0
    assert gap["agreement"] == pytest.approx(gap["calibration"]["agreement"] - gap["held_out"]["agreement"])
    assert gap["interval"][0] <= gap["agreement"] <= gap["interval"][1]
    assert set(gap["accuracy"]) == {"float", "quantized"}


def test_operations_by_hand(report: dict[str, Any]) -> None:
    macs = {layer["name"]: layer["macs"] for layer in report["layers"]}
    # 12 x 12 images, halved by the stem: outputs, channels in, window.
    assert macs == {"stem": 36 * 6 * 3 * 9, "first": 36 * 6 * 6 * 9, "second": 36 * 6 * 6 * 9, "fc": 5 * 6}
    bits = {layer["name"]: layer["bit_operations"] for layer in report["layers"]}
    assert bits == {"stem": 64 * 5832, "first": 4 * 11664, "second": 4 * 11664, "fc": 64 * 30}
    assert report["operations"] == {
        "macs": 29190,
        "bit_operations": 468480,
        "float_bit_operations": 1024 * 29190,
        "border_evaluations": 36 * 27 + 2 * 36 * 54 + 6,
    }


def test_layers_say_where_their_input_is_quantized() -> None:
    report = reports.run(method="brecq")
    assert all(layer["sqnr_db"]["input"] is None is layer["distribution"] for layer in report["layers"])
    assert all(layer["sqnr_db"]["output"] is not None for layer in report["layers"])
    assert {layer["input_from"] for layer in report["layers"]} == {value["name"] for value in report["values"]}
    assert all(value["sqnr_db"] is not None and value["distribution"]["shift"] is None for value in report["values"])
    assert report["operations"]["bit_operations"] == 468480  # the widths are those of the values


def test_long_loss_curves_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    preset = Preset(40, 8, border_rate=1e-3, scale_rate=1e-4, rounding_rate=1e-3)
    whole = reports.run(preset=preset)["blocks"]
    monkeypatch.setattr("aquant_core.reporting.CURVE_POINTS", 4)
    for block, long in zip(reports.run(preset=preset)["blocks"], whole, strict=True):
        assert long["loss"]["iterations"] == [0, 10, 20, 30, 39]
        first, second, third, fourth, last = long["loss"]["values"]
        means = [(first + second) / 2, (third + fourth) / 2, last]
        assert block["loss"] == {"iterations": [10, 30, 39], "values": pytest.approx(means)}


@given(st.lists(st.floats(0, 100), min_size=1, max_size=1000), st.integers(1, CURVE_POINTS))
def test_a_thinned_curve_keeps_its_mean_and_its_ends(values: list[float], at_most: int) -> None:
    iterations = list(range(0, 10 * len(values), 10))
    steps, means = thinned(iterations, values, at_most)
    assert len(steps) == len(means) <= at_most
    assert steps[-1] == iterations[-1]
    if len(values) <= at_most:
        assert (steps, means) == (iterations, values)
    width = -(-len(values) // at_most)
    sizes = [len(values[start : start + width]) for start in range(0, len(values), width)]
    assert sum(m * n for m, n in zip(means, sizes, strict=True)) == pytest.approx(sum(values), abs=1e-6)

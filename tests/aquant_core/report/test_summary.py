"""The report in a terminal: it says what the report says, and what to do is true of it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import Any

import pytest
import reports
from old_reports import old_report
from pydantic import ValidationError

from aquant_core.config_reading import read_configuration
from aquant_core.report.advice import advice_of
from aquant_core.report.schema import Report
from aquant_core.report.summary import FIRST_LAYERS, ending, summary

LAYER = {
    "layer": "second", "bits": [2, 2], "raised_bits": [4, 6], "gain": 0.0123, "interval": [0.004, 0.021],
    "cost_bytes": 81, "error_share": 0.31,
}  # fmt: skip
TARGET = {
    "max_accuracy_drop": 0.8, "metric": "top1", "n": 1000, "held": True, "drop": 0.75, "interval": [0.1, 1.4],
    "candidates": [{"layers": {"first": [3, 2]}, "accuracy": 0.9, "drop": 0.75, "interval": [0.1, 1.4], "bytes": 900,
                    "mean_weight_bits": 2.5, "held": True}], "chosen": 0,
}  # fmt: skip


@pytest.fixture
def lossy(report: dict[str, Any]) -> dict[str, Any]:
    """A report of a network that lost accuracy, by one layer above all."""
    report["accuracy"]["float"]["top1"] = report["accuracy"]["quantized"]["top1"] + 0.05
    report["fidelity"]["quantized"]["agreement"] = 0.9
    report["sensitivity"] = {"metric": "top1", "n": 1000, "layers": [LAYER]}
    return report


def test_it_says_how_good_it_is_and_what_to_do(lossy: dict[str, Any]) -> None:
    lossy["warnings"] = ["Few images."]
    lossy["config"]["layers"] = {"first": {"weight_bits": 8}}
    lines = summary(lossy)
    assert lines[0] == "AQuant, 2-bit weights, 2-bit activations"
    (row,) = (line for line in lines if line.startswith("AQuant  "))
    (difference,) = (each for each in lossy["differences"] if (each["method"], each["baseline"]) == ("aquant", "float"))
    top1 = lossy["accuracy"]["quantized"]
    for number in (top1["top1"], *top1["interval"], difference["top1"], *difference["interval"]):
        assert f"{100 * number:.2f}" in row
    assert any(line.startswith("QDrop ") for line in lines)
    assert "Few images." in lines[lines.index("Before you rely on this:") + 1]
    assert any("second" in line and "W2A2" in line and "W4A6" in line and "+0.40 to +2.10" in line for line in lines)
    (advice,) = (line for line in lines if line.startswith("Raise second first, about +1.23 points"))
    option, value = shlex.split(advice)[-2:]
    assert option == "--config"
    given = read_configuration(value, {})
    assert given == {"layers": {"first": {"weight_bits": 8}, "second": {"weight_bits": 4, "activation_bits": 6}}}
    assert ending(lossy)[-1] == f"advice     {advice}"


def test_only_the_first_layers_are_named(lossy: dict[str, Any]) -> None:
    names = [f"layer{number}" for number in range(FIRST_LAYERS + 3)]
    lossy["sensitivity"]["layers"] = [LAYER | {"layer": name} for name in names]
    shown = "\n".join(summary(lossy))
    assert [name in shown for name in names] == [True] * FIRST_LAYERS + [False] * 3
    assert "and 3 more" in shown


def test_a_target_is_told(lossy: dict[str, Any]) -> None:
    lossy["target"] = TARGET
    lossy["config"] |= {"target": {"max_accuracy_drop": 0.8}, "compare": []}
    lossy["sources"]["model"] = "net.onnx"
    line = "target     0.8 points lost at most: 0.75 with 2.50 bits a weight holds"
    assert line in summary(lossy)
    assert line in ending(lossy)
    assert summary(lossy)[0] == "net.onnx: AQuant, bits searched by layer"
    lossy["target"] = TARGET | {"held": False}
    assert any("does not hold, nor did any network tried" in line for line in ending(lossy))


@pytest.mark.parametrize(
    ("changes", "headline", "words"),
    [
        ({}, "Raise second first", ""),
        ({"target": TARGET}, "Raise second first", "the other layers are those found for the target"),
        ({"chance": True, "share": 0.4}, "Raise second first", "40% of the error is its own"),
        ({"chance": True}, "No single layer stands out", "More bits for all of them, or a target"),
        ({"chance": True, "target": TARGET}, "No single layer stands out", "the target holds. Where less may be lost"),
        ({"chance": True, "target": TARGET | {"held": False}}, "No single layer stands out", "Allow a larger drop"),
        ({"chance": True, "lost": False}, "Nothing was lost", "top-1 is not below the float network's"),
        ({"chance": True, "lost": False, "target": TARGET}, "Nothing was lost", "no layer needs more bits"),
        ({"chance": True, "metric": "agreement"}, "No single layer stands out", "spread over many"),
        ({"chance": True, "metric": "agreement", "lost": False}, "Nothing was lost", "decides as the float network"),
        ({"differ": True}, "Which layer to raise is not known", "scaled differently"),
    ],
    ids=str,
)
def test_advice_is_true_of_the_report(
    lossy: dict[str, Any], changes: dict[str, Any], headline: str, words: str
) -> None:
    lossy["target"] = changes.get("target")
    lossy["scales"]["differ"] = changes.get("differ", False)
    lossy["sensitivity"]["metric"] = changes.get("metric", "top1")
    if "chance" in changes:
        share = changes.get("share", 0.3)
        lossy["sensitivity"]["layers"] = [LAYER | {"interval": [-0.001, 0.02], "error_share": share}]
    if not changes.get("lost", True):
        lossy["accuracy"]["float"]["top1"] = lossy["accuracy"]["quantized"]["top1"]
        lossy["fidelity"]["quantized"]["agreement"] = 1.0
    advice = advice_of(Report.model_validate(lossy))
    assert advice is not None
    assert advice.headline == headline
    assert words in advice.words
    assert (advice.layer is None) == (headline != "Raise second first")
    if advice.layers is not None:
        kept = {"first": {"weight_bits": 3, "activation_bits": 2}} if "target" in changes else {}
        assert advice.layers == {**kept, "second": {"weight_bits": 4, "activation_bits": 6}}


def test_none_where_nothing_was_measured(report: dict[str, Any]) -> None:
    for sensitivity in (None, {"metric": "top1", "n": 9, "layers": []}):
        report["sensitivity"] = sensitivity
        assert advice_of(Report.model_validate(report)) is None
        assert not any("layer" in line for line in (*summary(report), *ending(report)))


def test_without_labels_agreement_is_told(lossy: dict[str, Any]) -> None:
    lossy["accuracy"], lossy["differences"] = None, []
    for row in lossy["comparison"]:
        row["accuracy"] = None
    lines = summary(lossy)
    assert any(line.startswith("AQuant ") and "90.00 %" in line for line in lines)
    assert "top-1" not in lines[2]
    assert ending(lossy)[1] == "quantized  decides as the float network on 90.00 % of 20"


def test_an_older_report() -> None:
    shown = "\n".join([*summary(old_report()), *ending(old_report())])
    assert f"{100 * old_report()['accuracy']['quantized']['top1']:.2f} %" in shown


def test_a_plan() -> None:
    plan = reports.planned()
    plan |= {"budget_bytes": 10**12, "warnings": ["Few images."]}
    lines = summary(plan)
    assert lines[0] == "AQuant, 2-bit weights, 2-bit activations: what it would take (a dry run: nothing is quantized)"
    assert any(line.startswith("memory ") and "within the 1.00 TB that it may fill here" in line for line in lines)
    assert any(line.startswith("time       about ") for line in lines)
    assert any(line.startswith("size ") and "times smaller" in line for line in lines)
    assert lines[-1] == "- Few images."
    assert ending(plan) == lines[2:-3]
    plan |= {"limit_bytes": 1}
    assert any("beyond the 1 B above which a run is stopped here" in line for line in summary(plan))
    nothing = "\n".join(summary(reports.planned(method="nearest")))
    assert "nothing is learned" in nothing
    assert "memory" not in nothing


def test_names_move_no_cursor(lossy: dict[str, Any]) -> None:
    lossy["sensitivity"]["layers"] = [LAYER | {"layer": "\x1b[2Jnet\n"}]
    lossy["sources"]["model"] = "\x1b[2Jnet\n"
    assert all(line.isprintable() for line in (*summary(lossy), *ending(lossy)))
    value = shlex.split(ending(lossy)[-1].partition("again with ")[2])[1]
    assert list(json.loads(value)["layers"]) == ["\x1b[2Jnet\n"]


def test_what_is_no_report() -> None:
    for make in (summary, ending):
        with pytest.raises(ValidationError):
            make({"seed": 0})


def test_it_needs_the_base_install_alone() -> None:
    program = (
        "import sys\nfor name in ('jinja2', 'markupsafe', 'torch', 'numpy'): sys.modules[name] = None\n"
        "import aquant_core.report.summary"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""Which layer to raise, in words that are true of the report at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aquant_core.report.schema import Report, SensitiveLayer

MEASURES = {"top1": "top-1", "agreement": "agreement with the float network"}
"""What a metric is called in a sentence."""

MOST_OF_THE_ERROR = 1 / 3
"""A layer with this share of it stands out, whether or not the gain can be told from chance."""


@dataclass(frozen=True)
class Advice:
    """What to do about accuracy.

    Attributes:
        headline, words: the advice, and why, or what else there is to say of it.
        layer: the one to raise first, if one stands out.
        layers: the configuration's ``layers`` with that one raised.
        raising: whether more bits for a layer are any help at all.
    """

    headline: str
    words: str
    layer: SensitiveLayer | None = None
    layers: dict[str, Any] | None = None
    raising: bool = True


def advice_of(report: Report) -> Advice | None:
    """What the sensitivity says; None where it was not measured, or no layer could have more bits."""
    if report.sensitivity is None or not report.sensitivity.layers:
        return None
    if report.scales is not None and report.scales.differ:
        return Advice(
            "Which layer to raise is not known",
            "calibration and evaluation images were scaled differently, and no number of bits makes up for that.",
            raising=False,
        )
    first = report.sensitivity.layers[0]
    measure, images = MEASURES[report.sensitivity.metric], f"{report.sensitivity.n:,}"
    if _nothing_lost(report):
        return Advice(
            "Nothing was lost",
            f"on these {images} images {measure} is not below the float network's, so that no layer needs more bits."
            if report.sensitivity.metric == "top1"
            else f"on these {images} images it decides as the float network does, so that no layer needs more bits.",
            raising=False,
        )
    if first.interval[0] > 0:
        return _raise(first, report, [])
    if (first.error_share or 0.0) >= MOST_OF_THE_ERROR:
        unsure = f"{first.error_share:.0%} of the error is its own, but what that costs is within what chance does"
        return _raise(first, report, [unsure])
    if report.target is None:
        return Advice(
            "No single layer stands out",
            "the loss is spread over many. More bits for all of them, or a target, will do more than any one of these.",
        )
    if report.target.held:
        return Advice(
            "No single layer stands out",
            "the bits were searched, and the target holds. Where less may be lost, ask for a smaller drop.",
        )
    return Advice(
        "No single layer stands out",
        "the bits were searched, and no network tried holds the target. Allow a larger drop, or more iterations.",
    )


def _raise(first: SensitiveLayer, report: Report, words: list[str]) -> Advice:
    """With the rest as it was: what was searched for a target is given in its place."""
    if report.target is None:
        widths = {name: bits.model_dump(exclude_none=True) for name, bits in report.config.layers.items()}
    else:
        found = report.target.candidates[report.target.chosen].layers
        widths = {name: _override(bits) for name, bits in found.items()}
        words = [*words, "the other layers are those found for the target, which is to be left out"]
    layers = {**widths, first.layer: _override(first.raised_bits)}
    return Advice(f"Raise {first.layer} first", "; ".join(words), first, layers)


def _override(bits: list[int]) -> dict[str, int]:
    return {"weight_bits": bits[0], "activation_bits": bits[1]}


def _nothing_lost(report: Report) -> bool:
    assert report.sensitivity is not None
    if report.sensitivity.metric == "top1":
        return report.accuracy is not None and report.accuracy.quantized.top1 >= report.accuracy.float.top1
    return report.fidelity.quantized.agreement >= 1

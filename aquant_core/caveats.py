"""What a reader of the report should be warned of before believing or shipping anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from aquant_core.config import Method

WIDE_INTERVAL = 0.02
"""Half a 95 % interval that is too wide to choose by."""

RISE_OF_CLIPPING = 0.01
"""Share of a layer's inputs by which more are clipped than were in the calibration, and twice as many."""

OVERFITTED = 1.5
"""Times a block's error on calibration images that its error on others is suspicious."""

_NAMED = 5


def caveats(report: Mapping[str, Any], logits: Mapping[Method, Tensor]) -> list[str]:
    """Warnings that a finished run's numbers call for.

    Of images scaled differently blocks and layers say nothing: what would help there would not help.

    Args:
        report: all but the warnings.
        logits: (N, classes) of each method's network.
    """
    told = [*_not_finite(logits), *_of_the_interval(report)]
    if report["scales"]["differ"]:
        return told
    return [*told, *_of_the_gap(report), *_of_the_blocks(report), *_of_the_inputs(report)]


def _not_finite(logits: Mapping[Method, Tensor]) -> list[str]:
    return [
        f"The outputs of {method}'s network hold NaN or infinity: it is of no use as it is."
        for method, values in logits.items()
        if not values.isfinite().all()
    ]


def _of_the_interval(report: Mapping[str, Any]) -> list[str]:
    measured = report["fidelity" if report["accuracy"] is None else "accuracy"]["quantized"]
    low, high = measured["interval"]
    if (high - low) / 2 <= WIDE_INTERVAL:
        return []
    what = "Agreement" if report["accuracy"] is None else "Accuracy"
    return [f"{what} was measured on {measured['n']} images, so it is known to ± {50 * (high - low):.1f} points only."]


def _of_the_gap(report: Mapping[str, Any]) -> list[str]:
    gap = report["gap"]
    if gap["interval"][0] <= 0:
        return []
    return [
        f"The network agrees with the float one on {gap['calibration']['agreement']:.1%} of the calibration images "
        f"and on {gap['held_out']['agreement']:.1%} of the others: more calibration images would help."
    ]


def _of_the_blocks(report: Mapping[str, Any]) -> list[str]:
    warnings = []
    learned = [block for block in report["blocks"] if block["iterations"]]
    low_bits = {layer["name"] for layer in report["layers"] if layer["weight_bits"] < 8 or layer["activation_bits"] < 8}
    worse = [  # at 8 bits there is next to nothing to learn, and as little to lose
        block["name"]
        for block in learned
        if block["error_after"] > block["error_before"] and not low_bits.isdisjoint(block["layers"])
    ]
    if worse:
        warnings.append(f"Learning raised the error of {_named(worse)}: try another preset or more iterations.")
    overfitted = [block["name"] for block in learned if block["error_held_out"] > OVERFITTED * block["error_after"]]
    if overfitted:
        warnings.append(
            f"The error of {_named(overfitted)} is more than {OVERFITTED} times as high on images that were not "
            "learned from: more calibration images would help."
        )
    return warnings


def _of_the_inputs(report: Mapping[str, Any]) -> list[str]:
    warnings = []
    quantizers = [part for part in (*report["layers"], *report["values"]) if part["clipped_share"] is not None]
    outside = [
        part["name"]
        for part in quantizers
        if part["clipped_share"]
        > max(2 * part["clipped_share_calibration"], part["clipped_share_calibration"] + RISE_OF_CLIPPING)
    ]
    if outside:
        warnings.append(
            f"What {_named(outside)} gets from the evaluation images lies beyond its codes at least twice as often as "
            "in the calibration: the calibration images do not cover what the network sees."
        )
    dead = [part["name"] for part in quantizers if part["dead_channels"]["quantized"] > part["dead_channels"]["float"]]
    if dead:
        warnings.append(
            f"Quantization turned whole input channels of {_named(dead)} to 0 for every image looked at: "
            "it may need more bits."
        )
    return warnings


def _named(names: Iterable[str]) -> str:
    """The first few, and how many more."""
    names = list(names)
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")

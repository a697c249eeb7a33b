"""Whether calibration and evaluation images were scaled alike, and as a network is likely to want them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aquant_core.images import Kind

SCALES_DIFFER = 3.0
"""Times one set's standard deviation is the other's that no choice of images explains."""

NEGATIVE_SHARE = 0.01
"""Share of negative values beside a set without any, from which on one of the two was normalised."""

LIKE_BYTES = 50.0
"""A highest value above which floats that are all whole numbers look like pixels of image files, 0 to 255."""

_LOOKED_AT = 64
"""Images of which every value is looked at."""


def scales_of(calibration: Tensor, evaluation: Tensor) -> dict[str, Any]:
    """The report's ``scales``: what the values of either set are like, and whether they differ by more than chance."""
    sets = {"calibration": _scale_of(calibration), "evaluation": _scale_of(evaluation)}
    low, high = sorted(each["std"] for each in sets.values())
    less, more = sorted(each["negative_share"] for each in sets.values())
    return {**sets, "differ": high > SCALES_DIFFER * low > 0 or (less == 0 and more > NEGATIVE_SHARE)}


def _scale_of(images: Tensor) -> dict[str, float]:
    std, mean = torch.std_mean(images, correction=0)
    found = {"mean": mean, "std": std, "low": images.min(), "high": images.max()}
    negative = int(torch.count_nonzero(images < 0)) / images.numel()
    return {name: float(f"{float(value):.6g}") for name, value in found.items()} | {
        "negative_share": round(negative, 6)
    }


def of_different_scales(scales: Mapping[str, Any]) -> str:
    """The warning that the two sets were not scaled alike."""
    seen = " and ".join(f"the {what} images {_in_words(scales[what])}" for what in ("calibration", "evaluation"))
    one, other = (scales[what]["std"] for what in ("calibration", "evaluation"))
    times = max(one, other) / min(one, other) if min(one, other) > 0 else 1.0
    factor = f", a spread {times:.3g} times as large" if times > SCALES_DIFFER else ""
    return (
        f"Calibration and evaluation images are scaled differently: {seen}{factor}. Prepare both as the network was "
        "trained (uint8 is divided by 255, floats are taken as they are) and run again: until then the numbers say "
        "nothing of the quantization."
    )


def _in_words(scale: Mapping[str, float]) -> str:
    return f"go from {scale['low']:.4g} to {scale['high']:.4g} (mean {scale['mean']:.4g}, std {scale['std']:.4g})"


def like_bytes(images: Tensor, what: Kind) -> str | None:
    """The warning that floats look like pixels that nobody has scaled; None if they do not."""
    looked_at = images[:_LOOKED_AT]
    high = float(images.max())
    if high <= LIKE_BYTES or bool(torch.any((looked_at < 0) | (looked_at != looked_at.round()))):
        return None
    return (
        f"The {what} images are floats up to {high:g}, all of them whole numbers, like the pixels of image files: "
        "floats are taken as they are. If the network was trained on images from 0 to 1, give them as uint8, which is "
        "divided by 255, or divide them yourself."
    )

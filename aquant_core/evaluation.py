"""How good a quantized network is: accuracy where there are labels, likeness to the float one everywhere."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

_SMALL_IMAGE = 64 * 64

Z = 1.959964
"""Of a 95 % interval: the quantile of the normal distribution."""


def evaluation_batch_size(images: Tensor) -> int:
    """Images a batch: fixed by their size, since another batch may sum in another order."""
    return 256 if images.shape[2] * images.shape[3] <= _SMALL_IMAGE else 32


@torch.inference_mode()
def logits_of(model: Callable[[Tensor], Tensor], images: Tensor, device: torch.device | None = None) -> Tensor:
    """(N, classes) outputs of all images, on the CPU.

    Args:
        model: from images to outputs.
        images: (N, C, H, W); run batch by batch.
        device: where the model is, if not on the images' device.
    """
    batches = torch.split(images, evaluation_batch_size(images))
    return torch.cat([model(batch.to(device or batch.device)).cpu() for batch in batches]).flatten(1)


def logits_digest(logits: Tensor) -> str:
    """sha256 of the float32 little-endian logits."""
    return hashlib.sha256(logits.cpu().contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 as fractions, n, and top-1's 95 % interval (Wilson)."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = top == labels[:, None]
    count = len(labels)
    top1 = float(hits[:, 0].float().mean())
    return {
        "top1": round(top1, 6),
        "top5": round(float(hits.any(1).float().mean()), 6),
        "n": count,
        "interval": [round(bound, 6) for bound in wilson_interval(top1, count)],
    }


def wilson_interval(fraction: float, count: int) -> tuple[float, float]:
    """95 % interval of a fraction of ``count`` trials (Wilson 1927)."""
    centre = fraction + Z * Z / (2 * count)
    spread = Z * math.sqrt(fraction * (1 - fraction) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def paired_difference(ours: Tensor, theirs: Tensor) -> tuple[float, float, float]:
    """Difference of two accuracies on the same images and its 95 % interval (Agresti and Min 2005).

    The interval is Wald's of the two kinds of images that tell them apart, each counted half an image higher.

    Args:
        ours, theirs: (N,) whether each image was right.
    """
    count = len(ours)
    gained, lost = float((ours & ~theirs).sum()), float((theirs & ~ours).sum())
    centre = (gained - lost) / (count + 2)
    spread = Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (count + 2)) / (count + 2)
    return (gained - lost) / count, max(centre - spread, -1.0), min(centre + spread, 1.0)


def independent_difference(first: float, first_count: int, second: float, second_count: int) -> tuple[float, float]:
    """95 % interval of ``first - second``, fractions of two sets of images (Newcombe 1998, method 10)."""
    first_low, first_high = wilson_interval(first, first_count)
    second_low, second_high = wilson_interval(second, second_count)
    difference = first - second
    return (
        difference - math.hypot(first - first_low, second_high - second),
        difference + math.hypot(first_high - first, second - second_low),
    )


def fidelity(logits: Tensor, float_logits: Tensor) -> dict[str, Any]:
    """Share of equal decisions and its 95 % interval (Wilson), mean cosine of the logits, their
    signal-to-quantization-noise ratio in dB.
    """
    cosine = torch.nn.functional.cosine_similarity(logits, float_logits, dim=1)
    agreement = float((logits.argmax(1) == float_logits.argmax(1)).float().mean())
    return {
        "agreement": round(agreement, 6),
        "interval": [round(bound, 6) for bound in wilson_interval(agreement, len(logits))],
        "cosine": round(float(cosine.mean()), 6),
        "sqnr_db": round(sqnr_db(logits, float_logits), 3),
        "n": len(logits),
    }


def sqnr_db(approximate: Tensor, exact: Tensor) -> float:
    """10 log10 of the exact values' energy over the error's; 200 dB stands for no error."""
    return decibels(energy(exact), energy(approximate - exact))


def energy(values: Tensor) -> float:
    """Sum of squares."""
    return float(values.double().square().sum())


def decibels(signal: float, noise: float) -> float:
    """10 log10 of two energies' ratio; 200 dB stands for no noise."""
    ratio = math.inf if noise == 0 else max(signal, 1e-300) / noise
    if ratio == 0:  # of infinite noise
        return -math.inf
    return min(10 * math.log10(ratio), 200.0)


def decisions_to_meet(float_logits: Tensor, labels: Tensor | None) -> tuple[Literal["top1", "agreement"], Tensor]:
    """What a decision is measured by, and (N,) the right ones: the labels, or without them the float network's.

    A decision other than the float network's is at worst one that it had right: without labels a drop of accuracy
    comes out too high, never too low.
    """
    return ("agreement", float_logits.argmax(1)) if labels is None else ("top1", labels)

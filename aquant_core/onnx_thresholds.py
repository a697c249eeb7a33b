"""The border as thresholds of fp32 values, equal to direct evaluation for every finite one.

t - B rises with t (``cupy_kernels.thresholds``), but fp32's rounding of B makes it fall back, now and then, within a
few units in the last place of a threshold. So every fp32 t near enough to a threshold is evaluated, and where a code
comes too early, that is kept as an exception. A code depends on x through t alone, which rises with x even in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cupy_kernels.specification import SCALE_OF_BOUND, BorderSpecification
from cupy_kernels.thresholds import NoThresholdsError, codes_of, derive, numbers_at, places_of

MOST_LEVELS, MOST_LEVELS_WITHOUT_BORDER = 7, 3
"""Beyond that comparing costs onnxruntime more than evaluating, by its CPU kernels' times (docs/performance.md)."""

_MOST_NEIGHBOURS = 4096
_ROUNDING = 2.0**-24
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Thresholds:
    """A code is the number of ``levels`` that x exceeds, plus one for each exception that x lies in.

    Attributes:
        levels: (2^M - 1, C) fp32; C is 1 where there is no border.
        exceptions: pairs of (C,) fp32, above the first and up to the second; infinite where a channel has none.
    """

    levels: np.ndarray
    exceptions: list[tuple[np.ndarray, np.ndarray]]


def thresholds_of(border: np.ndarray | None, scale: np.float32, spec: BorderSpecification) -> Thresholds | None:
    """Thresholds in place of ``ceil(t - B)``, or None where there are none or they would not pay.

    Args:
        border: (P, C, 1), one border a channel, or None for B = 1/2.
        scale: s.
        spec: bits, zero-point and the border's switches.
    """
    if spec.levels > (MOST_LEVELS_WITHOUT_BORDER if border is None else MOST_LEVELS):
        return None
    coefficients = torch.zeros(2, 1, 1) if border is None else torch.from_numpy(border)
    of_t = replace(spec, zero_point=0, fused=False)  # codes of t itself: its step is 1, its zero-point 0
    try:
        found = derive(coefficients, torch.tensor(1.0), of_t, torch.float32)[0]  # (Q, C)
    except NoThresholdsError:
        return None
    neighbours = _neighbours(found, coefficients, of_t)
    turns = _turns(found, neighbours, coefficients, of_t) if neighbours <= _MOST_NEIGHBOURS else None
    if turns is None:
        return None
    last, early = turns
    return Thresholds(
        _largest_below(last, scale, spec.zero_point),
        [(_largest_below(a, scale, spec.zero_point), _largest_below(b, scale, spec.zero_point)) for a, b in early],
    )


def _neighbours(found: Tensor, border: Tensor, spec: BorderSpecification) -> int:
    """How many fp32 numbers on either side of a threshold rounding may put on the wrong one.

    B's error is at most that of v (eight roundings of terms up to the sum of |b|) by the bound's slope, and of the
    rational form (a dozen roundings of at most 1/2); t - B rises by at least 1 - dB/dt.
    """
    steepest = 1.0 if spec.bound == "clip" else SCALE_OF_BOUND / 4
    terms = border.abs().sum(0).max().item()
    error = _ROUNDING * (8 * terms * steepest + 7)
    b1, b2 = border[1], border[2] if len(border) == 3 else torch.zeros_like(border[1])
    slope = torch.maximum(b1, b1 + 2 * b2).clamp(min=0).max().item() * steepest / spec.levels
    reach = 2 * error / (1 - slope)
    nearest_to_zero = max(found.abs().min().item() - reach, float(np.finfo(np.float32).tiny))
    return int(reach / float(np.spacing(np.float32(nearest_to_zero)))) + 2


def _turns(
    found: Tensor, neighbours: int, border: Tensor, spec: BorderSpecification
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]] | None:
    """By level and channel: the last t before the code stays above the level, and pairs between which it is so early.

    Returns:
        (Q, C), and pairs of (C,); None where the code still changes at the ends of what is looked at.
    """
    levels, channels = found.shape
    level = torch.arange(levels)[:, None]
    above = torch.empty(2 * neighbours + 1, levels, channels, dtype=torch.bool)
    places = places_of(found)
    step = max(_AT_ONCE // found.numel(), 1)
    for start in range(0, len(above), step):
        offsets = torch.arange(start, min(start + step, len(above))) - neighbours
        t = numbers_at(places + offsets[:, None, None], torch.float32)  # (offsets, Q, C)
        above[start : start + step] = codes_of(t[None], border, torch.tensor(1.0), spec)[0] > level
    if above[0].any() or not above[-1].all():
        return None
    # Where the code changes between a number and the next: the last change is the threshold, pairs before it are early.
    changes = (above[1:] != above[:-1]).nonzero()  # rows of (offset, level, channel), by offset
    at: dict[tuple[int, int], list[int]] = {}
    for offset, row, column in changes.tolist():
        at.setdefault((row, column), []).append(offset - neighbours)
    last = torch.zeros_like(places)
    early: list[tuple[np.ndarray, np.ndarray]] = []
    used = [0] * channels
    for (row, column), offsets_of in at.items():
        last[row, column] = places[row, column] + offsets_of[-1]
        for first, second in zip(offsets_of[:-1:2], offsets_of[1:-1:2], strict=True):
            if used[column] == len(early):
                early.append((np.full(channels, np.inf, np.float32), np.full(channels, np.inf, np.float32)))
            for values, offset in zip(early[used[column]], (first, second), strict=True):
                values[column] = numbers_at(places[row, column] + offset, torch.float32).item()
            used[column] += 1
    return numbers_at(last, torch.float32).numpy(), early


def _largest_below(t: np.ndarray, scale: np.float32, zero_point: int) -> np.ndarray:
    """The largest x whose fp32 x / s + z is at most t, by bisection over fp32's numbers in order."""
    infinity = int(places_of(torch.tensor(torch.inf)))
    low = torch.full(t.shape, -infinity, dtype=torch.int64)
    high = -low
    target, step = torch.from_numpy(t), torch.tensor(scale)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        below = numbers_at(middle, torch.float32) / step + zero_point <= target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return np.where(np.isinf(t), t, numbers_at(low, torch.float32).numpy())

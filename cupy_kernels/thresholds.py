"""The border without fusion as thresholds: a code is the number of thresholds below x, and no border is evaluated.

x -> q rises where t - B(t) does, that is where dB/dt < 1: then 2^M - 1 values of x, found once, say it all. Over fp16
inputs the result equals direct evaluation, since neighbouring fp16 values lie further apart than fp32 rounding reaches;
over fp32 inputs it may differ within a few units in the last place of a threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cupy_kernels.reference import bounded_shift
from cupy_kernels.specification import SCALE_OF_BOUND, BorderSpecification

MOST_LEVELS = 15
"""Up to 4 bits: beyond that comparing costs more than evaluating."""

STEEPEST = 0.99
"""Of dB/dt; the rest is for rounding."""

NEAREST_TO_ZERO = 1 / 256
"""Where B changes at x = 0, it is this far from 0 and 1 there: a threshold closer to x = 0 would lie among fp16 values
that fp32's t - B does not tell apart.
"""

NEIGHBOURS = 16
"""Values on either side of a threshold whose codes are checked; rounding reaches no further (fp16)."""


_INTEGERS = {torch.float16: torch.int16, torch.float32: torch.int32}
"""Whose bits order the numbers above zero as their values do."""


class NoThresholdsError(ValueError):
    """No thresholds stand for a border: it is to be evaluated. The message says why, and for which position."""


def check_thresholds(border: Tensor, spec: BorderSpecification) -> None:
    """Whether thresholds can stand for the border of every position: no fusion, up to 4 bits, dB/dt below 1 everywhere,
    and no threshold next to x = 0.

    Args:
        border: (P, C, K).
        spec: bits, zero-point and the border's switches.

    Raises:
        NoThresholdsError: they cannot.
    """
    if spec.fused:
        raise NoThresholdsError("with fusion channel_mean a border depends on its whole window")
    if spec.levels > MOST_LEVELS:
        raise NoThresholdsError(f"codes up to {spec.levels} would take as many thresholds; {MOST_LEVELS} are the most")
    b0, b1, b2 = border[0], border[1], border[2] if len(border) == 3 else torch.zeros_like(border[1])
    slope = torch.maximum(b1, b1 + 2 * b2).clamp(min=0)  # of v in u, greatest at an end of [0, 1]
    steepest = 1.0 if spec.bound == "clip" else SCALE_OF_BOUND / 4
    slope = slope * (steepest / spec.levels)  # of B in t, at most
    _refuse(~(slope < STEEPEST), slope, "may rise with dB/dt = {:.4g}, {} is the most")
    u = spec.zero_point / spec.levels
    v = (b2 * u + b1) * u + b0
    e = bounded_shift(v, spec)
    closest = e.abs() if spec.zero_point else -e  # with z = 0 no threshold is negative
    apart = (closest <= 0.5 - NEAREST_TO_ZERO) | (e == bounded_shift(0.99 * v, spec))
    _refuse(~apart, e + 0.5, "is B = {:.4g} at x = 0, too close to an integer for fp32")


def _refuse(wrong: Tensor, values: Tensor, what: str) -> None:
    """Names the first of the (C, K) borders that are wrong, by its value."""
    if bool(wrong.any()):
        channel, position = (int(index) for index in wrong.nonzero()[0])
        raise NoThresholdsError(
            f"the border of channel {channel} at position {position} "
            f"{what.format(float(values[channel, position]), STEEPEST)} ({int(wrong.sum())} of {wrong.numel()} like it)"
        )


def derive(border: Tensor, scale: Tensor, spec: BorderSpecification, dtype: torch.dtype) -> Tensor:
    """Thresholds by position, level and channel: the largest x whose code is at most the level.

    Args:
        border: (P, C, K).
        scale: s, scalar tensor.
        spec: as above.
        dtype: of x: float16 or float32.

    Returns:
        (K, 2^M - 1, C) of ``dtype``; the code of x is how many of a channel's it exceeds.

    Raises:
        NoThresholdsError: there are none that give every value its code (fp16), or see ``check_thresholds``.
    """
    check_thresholds(border, spec)
    found = search(border, scale, spec, dtype)
    if dtype == torch.float16:
        beside = _neighbours(found)  # (K, Q, 2 n + 1, C)
        above = codes_of(beside, border, scale, spec) > _levels(spec, border.device)[..., None]
        wrong = (above != (beside > found[:, :, None])).any(2)  # (K, Q, C)
        at_fault = found.gather(1, wrong.to(torch.int8).argmax(1, keepdim=True))[:, 0]  # (K, C): the first of each
        _refuse(wrong.any(1).t(), at_fault.t(), "has another code than its threshold {:.4g} tells, beside it")
    return found


def search(border: Tensor, scale: Tensor, spec: BorderSpecification, dtype: torch.dtype) -> Tensor:
    """``derive`` without its checks: what comes out tells codes only where they rise with x."""
    infinity = places_of(torch.tensor(torch.inf, dtype=dtype, device=border.device))
    _, channels, positions = border.shape
    level = _levels(spec, border.device)  # (Q, 1)
    # Places: low has a code of at most the level, high a greater one.
    low = (-infinity).expand(positions, spec.levels, channels).clone()
    high = -low
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        above = codes_of(numbers_at(middle, dtype), border, scale, spec) > level
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return numbers_at(low, dtype)


def _levels(spec: BorderSpecification, device: torch.device) -> Tensor:
    return torch.arange(spec.levels, device=device)[:, None]


def _neighbours(thresholds: Tensor) -> Tensor:
    """(K, Q, 2 n + 1, C): each of (K, Q, C) finite or infinite values between its ``NEIGHBOURS``."""
    infinity = int(places_of(torch.tensor(torch.inf, dtype=thresholds.dtype)))
    steps = torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, device=thresholds.device)[:, None]  # (2 n + 1, 1)
    places = (places_of(thresholds)[:, :, None] + steps).clamp(-infinity, infinity)
    return numbers_at(places, thresholds.dtype)


def places_of(numbers: Tensor) -> Tensor:
    """The places of fp16 or fp32 numbers among all of their kind, by size: int64, 0 for zero, negative below it."""
    return numbers.abs().view(_INTEGERS[numbers.dtype]).to(torch.int64) * torch.where(numbers < 0, -1, 1)


def numbers_at(places: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of ``places_of``."""
    return torch.where(places < 0, -1.0, 1.0).to(dtype) * places.abs().to(_INTEGERS[dtype]).view(dtype)


def codes_of(x: Tensor, border: Tensor, scale: Tensor, spec: BorderSpecification) -> Tensor:
    """Codes by direct evaluation: (K, ..., C) values of x, each with the border of its position and channel."""
    shape = (border.shape[2], *[1] * (x.dim() - 2), border.shape[1])
    b = [coefficient.t().reshape(shape) for coefficient in border]
    t = (x.float() / scale + spec.zero_point).clamp_(-2.0, spec.levels + 2.0)
    u = t.clamp(0, spec.levels).mul_(1.0 / spec.levels)
    v = (u * b[2] + b[1]) * u + b[0] if len(b) == 3 else u * b[1] + b[0]
    return (t - (bounded_shift(v, spec) + 0.5)).ceil_().clamp_(0, spec.levels)

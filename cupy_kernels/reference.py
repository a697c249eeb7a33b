"""Border quantization in plain torch: the specification that every kernel is held to, code for code.

Symbols are the paper's: t = x / s + z, the activation in units of the step; u = clip(t, 0, Q) / Q with
Q = 2^M - 1; v = b2 u^2 + b1 u + b0 (Eq. 8); e its bounded shift (appendix B); B = 1/2 + e, or the channel's
mean of e over the window (Eq. 9); q = clip(ceil(t - B), 0, Q); x_hat = s (q - z).

Shapes: N images, C input channels, K positions of a window, L = H_out x W_out windows. The columns are never
unfolded first: each position is a strided view of one padded map, so a pass touches N C L numbers that stay
in cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cupy_kernels.specification import (
    SCALE_OF_BOUND,
    SIGMOID_LIMIT,
    SIGMOID_P0,
    SIGMOID_P1,
    SIGMOID_P2,
    SIGMOID_Q1,
    SIGMOID_Q2,
    BorderSpecification,
    Window,
)


def sigmoid_minus_half(w: Tensor) -> Tensor:
    """sigmoid(w) - 1/2 by the specification's fixed sequence of operations; any shape, fp32."""
    w = w.clamp(-SIGMOID_LIMIT, SIGMOID_LIMIT)
    z = w * w
    numerator = (z * SIGMOID_P2).add_(SIGMOID_P1).mul_(z).add_(SIGMOID_P0).mul_(w)
    denominator = z.mul(SIGMOID_Q2).add_(SIGMOID_Q1).mul_(z).add_(1.0)
    return numerator.div_(denominator)


def bounded_shift(v: Tensor, spec: BorderSpecification) -> Tensor:
    """e, the shift v kept within [-1/2, 1/2] (appendix B, "Bound the border range")."""
    if spec.bound == "steep":
        return sigmoid_minus_half(v * SCALE_OF_BOUND)
    if spec.bound == "stretched":
        return sigmoid_minus_half(v).mul_(SCALE_OF_BOUND).clamp_(-0.5, 0.5)
    return v.clamp(-0.5, 0.5)


def bounded_shift_slope(v: Tensor, e: Tensor, spec: BorderSpecification) -> Tensor:
    """de/dv, from v and e = bounded_shift(v); the sigmoid's slope is (1/2 + h)(1/2 - h)."""
    if spec.bound == "steep":
        return e.square().neg_().add_(0.25).mul_(SCALE_OF_BOUND)
    if spec.bound == "stretched":
        h = e / SCALE_OF_BOUND
        return h.square_().neg_().add_(0.25).mul_(SCALE_OF_BOUND).mul_(e.abs() < 0.5)
    return (v.abs() <= 0.5).to(v.dtype)


class Gradients(NamedTuple):
    """What ``backward`` returns: gradients of ``forward``'s tensors, None where the tensor was None."""

    x: Tensor
    scale: Tensor
    border: Tensor | None
    alpha: Tensor | None
    taps: Tensor | None


class _Positions:
    """The padded map of t and, for each position of the window, the views and values that belong to it."""

    def __init__(
        self,
        x: Tensor,  # (N, C, H, W)
        scale: Tensor,  # ()
        border: Tensor | None,  # (P, C, K)
        window: Window,
        spec: BorderSpecification,
    ) -> None:
        self.window, self.spec, self.border = window, spec, border
        self.size = window.output_size(x.shape[2], x.shape[3])
        t = x / scale  # (N, C, H, W)
        if spec.zero_point:
            t += spec.zero_point
        t.clamp_(-2.0, spec.levels + 2.0)  # far outside the codes nothing changes, but infinity gets an end code
        self.t = self._padded(t, float(spec.zero_point))  # (N, C, H + 2 pad, W + 2 pad)
        self.inside = self._padded(torch.ones_like(x[:1, :1]), 0.0)  # 0 where a slot is padding
        if border is not None:
            self.u = self.t.clamp(0, spec.levels).mul_(1.0 / spec.levels)

    def _padded(self, values: Tensor, fill: float) -> Tensor:
        vertical, horizontal = self.window.padding
        if vertical == horizontal == 0:
            return values
        return F.pad(values, (horizontal, horizontal, vertical, vertical), value=fill)

    def view(self, padded: Tensor, position: int) -> Tensor:
        """The (N, C, H_out, W_out) elements of ``padded`` that one position of the window slides over."""
        row, column = divmod(position, self.window.kernel_size[1])
        top, left = row * self.window.dilation[0], column * self.window.dilation[1]
        (step_y, step_x), (rows, columns) = self.window.stride, self.size
        return padded[
            :,
            :,
            top : top + step_y * (rows - 1) + 1 : step_y,
            left : left + step_x * (columns - 1) + 1 : step_x,
        ]

    def shift(self, position: int) -> tuple[Tensor, Tensor]:
        """v (Eq. 8) and e of one position, each (N, C, H_out, W_out)."""
        assert self.border is not None
        u = self.view(self.u, position)
        coefficients = self.border[:, :, position, None, None]  # (P, C, 1, 1)
        v = u * coefficients[-1]
        for coefficient in coefficients[1:-1].flip(0):
            v.add_(coefficient).mul_(u)
        v.add_(coefficients[0])
        return v, bounded_shift(v, self.spec)

    def mean_border(self, alpha: Tensor | None) -> Tensor:
        """Eq. 9's B, (N, C, H_out, W_out); the sum runs over positions in order, padded slots included."""
        total: Tensor | None = None
        for position in range(self.window.positions):
            e = self.shift(position)[1]
            if alpha is not None:
                e *= alpha[:, position, None, None]
            total = e if total is None else total.add_(e)
        assert total is not None
        return total.mul_(1.0 / self.window.positions).add_(0.5)

    def borders(self, alpha: Tensor | None) -> Iterator[Tensor | float]:
        """B of each position in order."""
        if self.border is None:
            yield from [0.5] * self.window.positions
        elif self.spec.fused:
            yield from [self.mean_border(alpha)] * self.window.positions
        else:
            for position in range(self.window.positions):
                yield self.shift(position)[1].add_(0.5)


def borders(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
) -> Iterator[tuple[Tensor | float, Tensor, Tensor]]:
    """For each position of the window in order: B, the t it decides on, and 1 or 0 where the slot is padding.

    B and t are (N, C, H_out, W_out), not to be written to; the mask is (1, 1, H_out, W_out).
    """
    positions = _Positions(x, scale, border, window, spec)
    for position, b in enumerate(positions.borders(alpha)):
        yield b, positions.view(positions.t, position), positions.view(positions.inside, position)


def codes(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
) -> Tensor:
    """Integer codes q of all im2col slots, uint8 (N, C K, L); a padded slot's code is z, so exactly 0.

    A NaN gets the code 0, and with a fused border so does the rest of its channel's window, padding aside.
    """
    positions = _Positions(x, scale, border, window, spec)
    out = x.new_empty(*x.shape[:2], window.positions, *positions.size, dtype=torch.uint8)
    for position, b in enumerate(positions.borders(alpha)):
        q = (positions.view(positions.t, position) - b).ceil_().clamp_(0, spec.levels).nan_to_num_(0.0)
        padding = positions.view(positions.inside, position) == 0
        out[:, :, position] = q.masked_fill_(padding, spec.zero_point).to(torch.uint8)
    return out.flatten(3).flatten(1, 2)


def forward(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
    rounding: float | Tensor,
    taps: Tensor | None = None,
) -> Tensor:
    """Quantized columns x_hat = s (q~ - z), with appendix Eq. 2's rounding schedule.

    Args:
        x: (N, C, H, W) fp32.
        scale: s, scalar tensor.
        border: (P, C, K) with the coefficients b0, b1 (, b2) first; None for B = 1/2.
        alpha: (C, K) weights of Eq. 9, or None for 1.
        window: geometry of im2col.
        spec: bits, zero-point and the border's switches.
        rounding: the schedule's alpha: 0 leaves t unrounded (clipped), 1 is quantization. A tensor where the
            step is replayed (CUDA graphs).
        taps: (C, K), the weight of a depthwise convolution: the columns' weighted sum is wanted, not they.

    Returns:
        (N, C K, L) fp32, a padded slot exactly 0; with ``taps`` (N, C, L).
    """
    positions = _Positions(x, scale, border, window, spec)
    rows = window.positions if taps is None else 1
    out = x.new_zeros(*x.shape[:2], rows, *positions.size)
    for position, b in enumerate(positions.borders(alpha)):
        t = positions.view(positions.t, position)
        x_hat = _softened(t, b, rounding).clamp_(0, spec.levels).sub_(spec.zero_point).mul_(scale)
        x_hat.masked_fill_(positions.view(positions.inside, position) == 0, 0.0)
        if taps is None:
            out[:, :, position] = x_hat
        else:
            out[:, :, 0] += x_hat.mul_(taps[:, position, None, None])
    return out.flatten(3).flatten(1, 2)


def _softened(t: Tensor, b: Tensor | float, rounding: float | Tensor) -> Tensor:
    """t + a (ceil(t - B) - t), appendix Eq. 2 before its clip."""
    rounded = (t - b).ceil_()
    finished = isinstance(rounding, float) and rounding == 1.0  # of a tensor this would have to be waited for
    return rounded if finished else rounded.sub_(t).mul_(rounding).add_(t)


def backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
    rounding: float | Tensor,
    taps: Tensor | None = None,
    columns: Tensor | None = None,
) -> Gradients:
    """Gradients of ``forward``; B is recomputed, nothing kept.

    ceil is straight-through, so inside the clip d q~/d t = 1 with B held fixed, d q~/d B = -a (appendix C).

    Args:
        grad: gradient of what ``forward`` returned; the other arguments are ``forward``'s.
        columns: (N, C K, L), filled with x_hat, if given.
    """
    positions = _Positions(x, scale, border, window, spec)
    grads = grad.reshape(*x.shape[:2], -1, *positions.size)
    written = None if columns is None else columns.view(*x.shape[:2], window.positions, *positions.size)
    grad_t = torch.zeros_like(positions.t)  # gradient of the padded map of t, summed over the windows
    grad_scale = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_taps = None if taps is None else torch.empty_like(taps)
    grad_border, grad_alpha = (None if t is None else torch.zeros_like(t) for t in (border, alpha))
    grad_b: Tensor | None = None  # of the fused B, summed over the positions
    for position, b in enumerate(positions.borders(alpha)):
        t = positions.view(positions.t, position)
        inside = positions.view(positions.inside, position)
        q = _softened(t, b, rounding)
        free = (q >= 0) & (q <= spec.levels)
        q.clamp_(0, spec.levels).sub_(spec.zero_point)
        g = grads[:, :, position if taps is None else 0] * inside
        if taps is not None and grad_taps is not None:
            grad_taps[:, position] = (q * g).sum((0, 2, 3)) * scale
            g *= taps[:, position, None, None]
        grad_scale += (q * g).sum(dtype=torch.float64)
        if written is not None:
            written[:, :, position] = q.mul_(scale).masked_fill_(inside == 0, 0.0)
        passed = g.mul_(free).mul_(scale)
        positions.view(grad_t, position).add_(passed)
        if border is None or grad_border is None:
            continue
        of_b = passed.mul_(-rounding)
        if spec.fused:
            grad_b = of_b if grad_b is None else grad_b.add_(of_b)
        else:
            _backward_of_shift(positions, position, of_b, None, border, grad_border, None, grad_t)
    if border is not None and grad_border is not None and grad_b is not None:
        grad_b.mul_(1.0 / window.positions)
        for position in range(window.positions):
            _backward_of_shift(positions, position, grad_b, alpha, border, grad_border, grad_alpha, grad_t)

    vertical, horizontal = window.padding
    inner = grad_t[:, :, vertical : vertical + x.shape[2], horizontal : horizontal + x.shape[3]]
    grad_x = inner / scale
    grad_scale -= (grad_x * x).sum(dtype=torch.float64) / scale
    return Gradients(grad_x, grad_scale.to(scale.dtype), grad_border, grad_alpha, grad_taps)


def _backward_of_shift(
    positions: _Positions,
    position: int,
    of_e: Tensor,  # (N, C, H_out, W_out), before alpha
    alpha: Tensor | None,
    border: Tensor,
    grad_border: Tensor,
    grad_alpha: Tensor | None,
    grad_t: Tensor,
) -> None:
    """Adds the gradients of one position's coefficients and alpha, and the part of t's that goes through u."""
    spec = positions.spec
    v, e = positions.shift(position)
    if alpha is not None and grad_alpha is not None:
        grad_alpha[:, position] = (of_e * e).sum((0, 2, 3))
        of_e = of_e * alpha[:, position, None, None]
    of_v = bounded_shift_slope(v, e, spec).mul_(of_e)
    u = positions.view(positions.u, position)
    power = of_v
    for degree in range(len(border)):
        grad_border[degree, :, position] = power.sum((0, 2, 3))
        power = power * u
    if spec.input_gradient:
        of_u = _slope_of_polynomial(u, border[:, :, position, None, None]).mul_(of_v)
        t = positions.view(positions.t, position)
        of_u.mul_((t > 0) & (t < spec.levels)).mul_(1.0 / spec.levels)
        positions.view(grad_t, position).add_(of_u)


def _slope_of_polynomial(u: Tensor, coefficients: Tensor) -> Tensor:
    """dv/du of Eq. 8."""
    if len(coefficients) == 2:
        return coefficients[1].expand_as(u).clone()
    return (u * (2.0 * coefficients[2])).add_(coefficients[1])

"""Uniform quantization: the search for step and zero-point, and learned weight rounding (AdaRound)."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SEARCH_NORM = 2.4
"""Exponent of the error that the search minimises (QDrop and BRECQ)."""

SHRINK_STEPS = 100
"""Ranges tried: the full one, and shorter ones in steps of a hundredth."""

HISTOGRAM_BINS = 8192

_ALL_ZERO_POINTS_UP_TO = 7
"""Up to this largest code every zero-point is tried for every range, above it only the implied one."""

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1
"""gamma and zeta of the rectified sigmoid (Louizos, Welling and Kingma 2017)."""


def largest_code(bits: int) -> int:
    """Q = 2^M - 1."""
    return int(2**bits - 1)


@dataclass(frozen=True)
class UniformGrid:
    """x_hat = scale (q - zero_point) for codes q from 0 to ``levels``; per output channel or tensor."""

    scale: Tensor
    zero_point: Tensor
    levels: int


def _grid_error(values: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """|x - x_hat|^2.4 of every value; the arguments broadcast."""
    q = torch.clamp(torch.round(values / scale) + zero_point, 0, levels)
    return (q.sub_(zero_point).mul_(scale).sub_(values)).abs_().pow_(SEARCH_NORM)


def _zero_points(low: Tensor, scale: Tensor, levels: int) -> list[Tensor]:
    if levels <= _ALL_ZERO_POINTS_UP_TO:
        return [torch.full_like(scale, z) for z in range(levels + 1)]
    return [torch.round(-low / scale).clamp(0, levels)]


def search_weight_grid(weight: Tensor, bits: int) -> UniformGrid:
    """Step and zero-point per output channel, asymmetric, by the least |w - w_hat|^2.4.

    Args:
        weight: (O, ...) float.
        bits: 2 to 8.

    Returns:
        A grid whose scale and zero_point have shape (O, 1).
    """
    flat, levels = weight.flatten(1), largest_code(bits)  # (O, I)
    low = flat.amin(1, keepdim=True).clamp(max=0)
    high = flat.amax(1, keepdim=True).clamp(min=0)
    extent = (high - low).clamp(min=1e-8)
    scales, zero_points = [], []
    for step in range(SHRINK_STEPS, 0, -1):
        scale = extent * (step / SHRINK_STEPS / levels)
        tried = _zero_points(low * (step / SHRINK_STEPS), scale, levels)
        scales += [scale] * len(tried)
        zero_points += tried
    grids = UniformGrid(torch.cat(scales, 1), torch.cat(zero_points, 1), levels)  # (O, G)
    errors = _errors_of_grids(flat, grids)
    best = torch.from_numpy(errors.cpu().numpy().argmin(1)).to(flat.device)[:, None]  # the first of equals
    return UniformGrid(grids.scale.gather(1, best), grids.zero_point.gather(1, best), levels)


def _errors_of_grids(rows: Tensor, grids: UniformGrid) -> Tensor:
    """|w - w_hat|^2.4 of (O, I) weights, summed over each row, for (O, G) grids."""
    if rows.device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        from cupy_kernels.grid_errors import grid_errors

        return grid_errors(rows, grids.scale, grids.zero_point, grids.levels)
    columns = zip(torch.split(grids.scale, 1, 1), torch.split(grids.zero_point, 1, 1), strict=True)
    return torch.cat([_grid_error(rows, *column, grids.levels).sum(1, keepdim=True) for column in columns], 1)


def search_activation_grid(values: Tensor, bits: int) -> UniformGrid:
    """Step and zero-point of a whole tensor, by the least |x - x_hat|^2.4 over a fine histogram of it.

    The zero-point is 0 where no value is negative.

    Args:
        values: any shape.
        bits: 2 to 8.

    Returns:
        A grid with scalar scale and zero_point, on the CPU.
    """
    levels = largest_code(bits)
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    extent = max(high - low, 1e-8)
    counts = torch.histc(values.float(), HISTOGRAM_BINS, low, low + extent).double().cpu()
    width = extent / HISTOGRAM_BINS
    centres = low + width * (torch.arange(HISTOGRAM_BINS, dtype=torch.float64) + 0.5)
    best = (math.inf, torch.tensor(extent / levels), torch.tensor(0.0))
    for step in range(SHRINK_STEPS, 0, -1):
        scale = torch.tensor(extent * step / SHRINK_STEPS / levels, dtype=torch.float64)
        start = torch.tensor(low * step / SHRINK_STEPS, dtype=torch.float64)
        candidates = [torch.zeros_like(scale)] if low == 0 else _zero_points(start, scale, levels)
        for zero_point in candidates:
            error = float((_grid_error(centres, scale, zero_point, levels) * counts).sum())
            if error < best[0]:
                best = (error, scale, zero_point)
    return UniformGrid(best[1].float(), best[2].float(), levels)


def rectified_sigmoid(variable: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), appendix Eq. 3."""
    return torch.clamp(torch.sigmoid(variable) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW, 0, 1)


class WeightRounding(nn.Module):
    """Weights whose rounding up or down is learned: W' = s clip(floor(W / s) + h(V), 0, Q), appendix Eq. 3.

    Attributes:
        codes: (O, I) whole numbers from 0 to ``levels``, as float.
        scale, zero_point: (O, 1), per output channel.
        variable: V, one per weight; None when the rounding is not learned (or no longer).
    """

    variable: nn.Parameter | None
    scale: Tensor
    zero_point: Tensor
    codes: Tensor
    ratio: Tensor | None

    def __init__(self, codes: Tensor, grid: UniformGrid, shape: torch.Size, ratio: Tensor | None = None) -> None:
        super().__init__()
        self.levels = grid.levels
        self.shape = shape
        self.register_buffer("scale", grid.scale)  # (O, 1)
        self.register_buffer("zero_point", grid.zero_point)  # (O, 1)
        self.register_buffer("codes", codes)  # (O, I), whole numbers from 0 to levels
        self.register_buffer("ratio", ratio)  # (O, I), W / s; needed for learning alone
        self.register_parameter("variable", None)

    @classmethod
    def nearest(cls, weight: Tensor, grid: UniformGrid) -> WeightRounding:
        """The (O, ...) weight rounded to nearest on the grid."""
        ratio = weight.flatten(1) / grid.scale
        codes = torch.clamp(torch.round(ratio) + grid.zero_point, 0, grid.levels)
        return cls(codes, grid, weight.shape, ratio)

    def learn(self) -> nn.Parameter:
        """Creates V such that h(V) is the fraction of W / s: the soft weight starts at W."""
        assert self.ratio is not None, "weights read from a checkpoint have no fractions to learn from"
        fraction = self.ratio - torch.floor(self.ratio)
        start = (fraction - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.variable = nn.Parameter(torch.log(start / (1 - start)))
        return self.variable

    def forward(self) -> Tensor:
        """The dequantized weight, of the original's shape; soft while it is being learned."""
        codes = self.codes
        if self.variable is not None and self.ratio is not None:
            soft = torch.floor(self.ratio) + rectified_sigmoid(self.variable) + self.zero_point
            codes = torch.clamp(soft, 0, self.levels)
        return ((codes - self.zero_point) * self.scale).reshape(self.shape)

    def regulariser(self, beta: float | Tensor) -> Tensor:
        """sum(1 - |2 h(V) - 1|^beta), appendix Eq. 4 without its lambda."""
        assert self.variable is not None
        return (1 - (2 * rectified_sigmoid(self.variable) - 1).abs().pow(beta)).sum()

    def harden(self) -> None:
        """Rounds up where h(V) >= 1/2, down elsewhere; V is dropped."""
        if self.variable is None or self.ratio is None:
            return
        with torch.no_grad():
            up = (self.variable >= 0).to(self.ratio.dtype)
            self.codes = torch.clamp(torch.floor(self.ratio) + up + self.zero_point, 0, self.levels)
        self.variable = None

"""A-rounding: roundings flipped until the error sums of each window are small (section 3 and appendix A).

It shows that nearest is not the best rounding of activations, and is far too slow for use: every window is sorted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aquant_core.quantizers import UniformGrid
from cupy_kernels.specification import Window

_COLUMN_BYTES = 64 << 20
"""Columns that exist at any one time."""


def a_rounded_convolution(
    x: Tensor, grid: UniformGrid, weight: Tensor, bias: Tensor | None, window: Window, groups: int
) -> Tensor:
    """A convolution, or a linear layer, whose input is quantized by ``a_round``.

    Args:
        x: (N, C, H, W), or (..., C) for a linear layer.
        grid: scale and zero-point of the input.
        weight: (O, C / groups, k_y, k_x), or (O, C).
        bias: (O,) or None.
        window, groups: of the convolution.

    Returns:
        (N, O, H_out, W_out), or (..., O).
    """
    if weight.dim() == 2:
        maps = x.reshape(-1, x.shape[-1], 1, 1)
        result = a_rounded_convolution(maps, grid, weight[:, :, None, None], bias, window, groups)
        return result.reshape(*x.shape[:-1], len(weight))
    size = window.output_size(x.shape[2], x.shape[3])
    column_bytes = x.shape[1] * window.positions * size[0] * size[1] * x.element_size()
    matrix = weight.reshape(groups, len(weight) // groups, -1)  # (G, O/G, C/G K)
    products = []
    for part in torch.split(x, max(_COLUMN_BYTES // column_bytes, 1)):
        x_hat = a_rounded_columns(part, grid, window, groups).mul_(grid.scale).flatten(2, 3)  # (n, G, C/G K, L)
        products.append((matrix @ x_hat).reshape(len(part), len(weight), *size))
    product = torch.cat(products)
    return product if bias is None else product + bias.reshape(1, -1, 1, 1)


def a_rounded_columns(x: Tensor, grid: UniformGrid, window: Window, groups: int) -> Tensor:
    """q - z of all im2col slots of (N, C, H, W) values: (N, G, C/G, K, L)."""
    t = (x / grid.scale + grid.zero_point).clamp(0, grid.levels) - grid.zero_point
    columns = F.unfold(t, window.kernel_size, window.dilation, window.padding, window.stride)  # (N, C K, L)
    return a_round(columns.reshape(len(x), groups, x.shape[1] // groups, window.positions, columns.shape[2]))


def a_round(t: Tensor) -> Tensor:
    """Whole numbers next to ``t`` whose errors nearly cancel, channel by channel and then over each window.

    Rounded to nearest (halves down) at first. In each channel, as many roundings are flipped against the sign of the
    error sum as bring it to at most 1/2. Then one rounding in each of as many channels as bring the window's error sum
    there, of those channels whose own sum has its sign, so that theirs stay below 1. Roundings whose fraction is
    nearest to one half come first, as their flipping costs least.

    Args:
        t: (..., C, K, L), activations in units of the step: C channels and K positions in each of L windows. What is
            clipped or padded is a whole number and never flipped.

    Returns:
        (..., C, K, L), each element floor or ceil of ``t``'s.
    """
    rounded = torch.ceil(t - 0.5)
    error = rounded - t
    # Appendix A, second step: the sums of channels.
    rounded = rounded - _flips(error, dim=-2)
    # Third step: the window's sum, by at most one flip in each channel, of what is now its first candidate.
    error = rounded - t
    window_sum = _sum(error, (-3, -2))  # (..., 1, 1, L)
    sign = window_sum.sign().to(t.dtype)
    gain = error * sign  # a flip against the sum is possible where this is positive
    best, place = gain.max(-2, keepdim=True)  # (..., C, 1, L)
    best = best * (_sum(error, -2).sign() * sign > 0)
    chosen = _first(best, _count(window_sum.abs()), dim=-3) & (best > 0)
    flips = torch.zeros_like(t).scatter_(-2, place, chosen.to(t.dtype))
    return rounded - flips * sign


def _sum(error: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """In float64, where these sums are exact or so nearly that their order does not matter."""
    return error.sum(dim, keepdim=True, dtype=torch.float64)


def _flips(error: Tensor, dim: int) -> Tensor:
    """+1 where a rounding is to be flipped down, -1 where up, else 0, so that each sum along ``dim`` is small."""
    total = _sum(error, dim)
    sign = total.sign().to(error.dtype)
    gain = error * sign
    chosen = _first(gain, _count(total.abs()), dim) & (gain > 0)
    return chosen.to(error.dtype) * sign


def _count(total: Tensor) -> Tensor:
    """Flips by 1 that bring a sum to at most 1/2."""
    return torch.ceil(total - 0.5).clamp(min=0).nan_to_num(0.0)


def _first(gain: Tensor, count: Tensor, dim: int) -> Tensor:
    """Whether an element is among the ``count`` largest along ``dim``; of equal ones the first come first."""
    gain, count = gain.movedim(dim, -1), count.movedim(dim, -1)  # (..., n), (..., 1)
    most = min(int(count.max()), gain.shape[-1]) if count.numel() else 0  # no images, no windows
    places = gain.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    taken = torch.arange(most, device=gain.device) < count
    return torch.zeros_like(gain, dtype=torch.bool).scatter_(-1, places, taken).movedim(-1, dim)

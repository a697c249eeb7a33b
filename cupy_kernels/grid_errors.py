"""How far rows of weights are from what many uniform grids make of them: one pass a grid, in a fused loop."""

from __future__ import annotations

import numpy as np
import torch
from numba import prange
from torch import Tensor

from cupy_kernels.cpu_arithmetic import inline, loop, round_to_even, total, use_torchs_threads

_ZERO, _FIFTH, _FOUR_FIFTHS = np.float32(0), np.float32(0.2), np.float32(0.8)
_GUESS = np.int32(0.8 * 126.955 * 2**23)
"""Exponent and mantissa of a float, as one integer, are nearly its logarithm: a fifth of it and this, the root's."""


@inline()
def _power(error):
    """|error|^2.4 as y y^(1/5) with y = error^2; the root by Newton's method, to about 1e-6."""
    y = error * error
    root = np.int32(np.float32(np.float32(y).view(np.int32)) * _FIFTH + np.float32(_GUESS)).view(np.float32)
    for _ in range(3):
        square = root * root
        root = root * _FOUR_FIFTHS + y * _FIFTH / (square * square)
    return y * root


@loop()
def _errors(row, scale, zero_point, levels, errors):
    for i in range(row.shape[0]):
        q = round_to_even(row[i] / scale) + zero_point
        q = levels if q > levels else q
        q = _ZERO if q < _ZERO else q
        errors[i] = _power((q - zero_point) * scale - row[i])


@loop(parallel=True, cache=True)
def _grid_errors(rows, scales, zero_points, levels, out):
    for row in prange(rows.shape[0]):
        errors = np.empty_like(rows[row])
        for grid in range(scales.shape[1]):
            _errors(rows[row], scales[row, grid], zero_points[row, grid], levels, errors)
            out[row, grid] = total(errors)


def grid_errors(rows: Tensor, scales: Tensor, zero_points: Tensor, levels: int) -> Tensor:
    """sum |w - w_hat|^2.4 of every row, for every grid.

    Args:
        rows: (O, I) fp32 on a CPU; |w / scale| well below 2^22.
        scales, zero_points: (O, G).
        levels: the largest code.

    Returns:
        (O, G).
    """
    use_torchs_threads()
    out = torch.empty(scales.shape)
    arrays = (tensor.contiguous().numpy() for tensor in (rows, scales, zero_points))
    _grid_errors(*arrays, np.float32(levels), out.numpy())
    return out

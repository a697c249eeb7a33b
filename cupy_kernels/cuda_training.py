"""Border quantization for reconstruction on a GPU: each direction one fused kernel, ``reference``'s signatures."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cupy_kernels.compilation import launch
from cupy_kernels.reference import Gradients
from cupy_kernels.specification import NUMBER_OF_BOUND, BorderSpecification, Window

_SUMS = 5
"""Of b0, b1, b2, alpha and the tap, by position."""
_THREADS = 128
"""Of a block of the backward, at most."""

MOST_POSITIONS = 256
"""Of a window; the sums of more of them would not fit into shared memory."""

SHARED_MAP_BYTES = 96 << 10
"""Up to here the plane of x's gradient is built in shared memory, with what is static: sm_80 and later grant 99 KiB."""


def static_bytes(positions: int) -> int:
    """Shared memory that the backward takes beside that plane, at most: sums by warp and coefficients, and where
    positions are few each thread's own sums.
    """
    by_thread = _THREADS if positions <= 9 else 0
    return 4 * positions * (_SUMS * (_THREADS // 32 + by_thread) + 4)


def border_constants(
    border: Tensor | None, alpha: Tensor | None, window: Window, spec: BorderSpecification
) -> dict[str, int]:
    """What ``border.cuh`` asks for."""
    return {
        "KERNEL_HEIGHT": window.kernel_size[0],
        "KERNEL_WIDTH": window.kernel_size[1],
        "BORDERED": border is not None,
        "TERMS": 3 if border is None else len(border),
        "BOUND": NUMBER_OF_BOUND[spec.bound],
        "FUSED": border is not None and spec.fused,
        "LEARNED_ALPHA": alpha is not None,
    }


def geometry(x: Tensor, window: Window) -> list[int]:
    """The arguments that ``border.cuh`` names GEOMETRY."""
    images, channels, height, width = x.shape
    return [
        images, channels, height, width, *window.output_size(height, width), *window.stride, *window.padding,
        *window.dilation,
    ]  # fmt: skip


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
    """``reference.forward`` for fp32 tensors on a GPU; ``rounding`` is 1 or a tensor.

    Raises:
        ValueError: a dtype or shape is wrong; the message names the tensor.
    """
    _check(x, scale, border, alpha, rounding, taps, window)
    x = x.contiguous()
    places = geometry(x, window)
    windows = places[4] * places[5]
    rows = window.positions if taps is None else 1
    out = x.new_empty(x.shape[0], x.shape[1] * rows, windows)
    given = _given(rounding)
    constants = border_constants(border, alpha, window, spec) | {"ROUNDED": given is None, "SUMMED": taps is not None}
    tensors = [x, scale, *_contiguous(border, alpha), given, *_contiguous(taps), out]
    grid = (math.ceil(x.shape[0] * windows / 256), x.shape[1])
    launch("border_columns.cu", constants, grid, 256, [*tensors, *places, float(spec.levels), float(spec.zero_point)])
    return out


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
    """``reference.backward``; the same inputs give the same bits.

    Raises:
        ValueError: a dtype or shape is wrong; the message names the tensor.
    """
    _check(x, scale, border, alpha, rounding, taps, window)
    rows, width = window.output_size(x.shape[2], x.shape[3])
    columns_size = x.shape[0] * x.shape[1] * rows * width * window.positions
    grad_size = columns_size if taps is None else columns_size // window.positions
    for name, tensor, size in (("grad", grad, grad_size), ("columns", columns, columns_size)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() != size):
            raise ValueError(f"{name} must be {size} float32 values, not {tensor.dtype} {tuple(tensor.shape)}")
    x, grad = x.contiguous(), grad.contiguous()
    images, channels, height, width = x.shape
    places = geometry(x, window)
    windows, plane_bytes = places[4] * places[5], 4 * height * width
    grad_x = torch.empty_like(x)
    of_scale = x.new_empty(images, channels, dtype=torch.float64)
    sums = x.new_empty(images, channels, window.positions, _SUMS)
    given = _given(rounding)
    in_shared_memory = plane_bytes + static_bytes(window.positions) <= SHARED_MAP_BYTES
    constants = border_constants(border, alpha, window, spec) | {
        "ROUNDED": given is None,
        "SUMMED": taps is not None,
        "INPUT_GRADIENT": spec.input_gradient,
        "WRITE_COLUMNS": columns is not None,
        "SHARED_MAP": in_shared_memory,
    }
    tensors = [
        grad, x, scale, *_contiguous(border, alpha), given, *_contiguous(taps), grad_x, of_scale, sums, columns
    ]  # fmt: skip
    launch(
        "border_gradients.cu",
        constants,
        (images * channels,),
        min(32 * math.ceil(windows / 32), _THREADS),
        [*tensors, *places, float(spec.levels), float(spec.zero_point)],
        plane_bytes if in_shared_memory else 0,
    )
    summed = sums.sum(0)  # (C, K, SUMS)
    return Gradients(
        grad_x,
        of_scale.sum().to(scale.dtype),
        None if border is None else summed[:, :, : len(border)].permute(2, 0, 1).contiguous(),
        None if alpha is None else summed[:, :, 3].contiguous(),
        None if taps is None else summed[:, :, 4].contiguous(),
    )


def _check(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    rounding: float | Tensor,
    taps: Tensor | None,
    window: Window,
) -> None:
    """Whether a kernel would read what it is given as what it is."""
    by_position = (x.shape[1], window.positions)
    tensors: list[tuple[str, Any, tuple[int, ...]]] = [
        ("x", x, x.shape), ("scale", scale, ()), ("alpha", alpha, by_position), ("taps", taps, by_position),
        ("border", border, by_position if border is None else (len(border), *by_position)), ("rounding", rounding, ()),
    ]  # fmt: skip
    for name, tensor, shape in tensors:
        if isinstance(tensor, Tensor) and (tensor.dtype != torch.float32 or tensor.shape != shape):
            raise ValueError(f"{name} must be float32 {tuple(shape)}, not {tensor.dtype} {tuple(tensor.shape)}")


def _given(rounding: float | Tensor) -> Tensor | None:
    """The schedule's alpha for a kernel to read; None where it is over."""
    if isinstance(rounding, Tensor):
        return rounding
    if rounding != 1.0:
        raise ValueError(f"rounding must be 1 or a tensor on the device, not the number {rounding}")
    return None


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]

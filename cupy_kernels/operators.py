"""The kernels as torch operators ``aquant::...``, so that torch.compile, export and CUDA graphs take them whole.

Learning goes by the kernels on a GPU and by the plain torch reference on a CPU, an integer layer by the route that it
was packed for. Geometry and grid travel as lists of integers; the wrappers below have ``reference``'s signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from cupy_kernels import cuda_inference, cuda_training, integer_reference, reference
from cupy_kernels.packing import PackedLayer, Route
from cupy_kernels.reference import Gradients
from cupy_kernels.specification import NUMBER_OF_BOUND, BorderSpecification, Window


def _flat_window(window: Window) -> list[int]:
    return [number for pair in astuple(window) for number in pair]


def _window(numbers: Sequence[int]) -> Window:
    a, b, c, d, e, f, g, h = numbers
    return Window((a, b), (c, d), (e, f), (g, h))


def _flat_grid(spec: BorderSpecification) -> list[int]:
    return [spec.levels, spec.zero_point, int(spec.fused), int(spec.input_gradient)]


def _specification(grid: Sequence[int], bound: str) -> BorderSpecification:
    levels, zero_point, fused, input_gradient = grid
    if bound not in NUMBER_OF_BOUND:
        raise ValueError(f"bound must be one of {', '.join(NUMBER_OF_BOUND)}, not {bound!r}")
    return BorderSpecification(levels, zero_point, bound, bool(fused), bool(input_gradient))


def _module(x: Tensor, window: Sequence[int]) -> ModuleType:
    """Kernels on a GPU, except for windows too large for them."""
    return cuda_training if x.is_cuda and _window(window).positions <= cuda_training.MOST_POSITIONS else reference


@torch.library.custom_op("aquant::border_columns", mutates_args=())
def border_columns(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    rounding: Tensor | None,
    taps: Tensor | None,
    window: Sequence[int],
    grid: Sequence[int],
    bound: str,
) -> Tensor:
    """``reference.forward``; without ``rounding`` the schedule is over."""
    module = _module(x, window)
    given = 1.0 if rounding is None else rounding
    columns: Tensor = module.forward(x, scale, border, alpha, _window(window), _specification(grid, bound), given, taps)
    return columns


@border_columns.register_fake
def _(
    x: Tensor,
    scale: Tensor,  # noqa: ARG001 - the operator's signature
    border: Tensor | None,  # noqa: ARG001
    alpha: Tensor | None,  # noqa: ARG001
    rounding: Tensor | None,  # noqa: ARG001
    taps: Tensor | None,
    window: Sequence[int],
    grid: Sequence[int],  # noqa: ARG001
    bound: str,  # noqa: ARG001
) -> Tensor:
    geometry = _window(window)
    rows, columns = geometry.output_size(x.shape[2], x.shape[3])
    positions = geometry.positions if taps is None else 1
    return x.new_empty(x.shape[0], x.shape[1] * positions, rows * columns)


@torch.library.custom_op("aquant::border_gradients", mutates_args=("columns",))
def border_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    rounding: Tensor | None,
    taps: Tensor | None,
    columns: Tensor | None,
    window: Sequence[int],
    grid: Sequence[int],
    bound: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``reference.backward``; a gradient that there is not is empty."""
    module = _module(x, window)
    given = 1.0 if rounding is None else rounding
    gradients = module.backward(
        grad, x, scale, border, alpha, _window(window), _specification(grid, bound), given, taps, columns
    )
    of_x, of_scale, of_border, of_alpha, of_taps = (
        x.new_empty(0) if gradient is None else gradient for gradient in gradients
    )
    return of_x.contiguous(), of_scale, of_border, of_alpha, of_taps


@border_gradients.register_fake
def _(
    grad: Tensor,  # noqa: ARG001 - the operator's signature
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    rounding: Tensor | None,  # noqa: ARG001
    taps: Tensor | None,
    columns: Tensor | None,  # noqa: ARG001
    window: Sequence[int],  # noqa: ARG001
    grid: Sequence[int],  # noqa: ARG001
    bound: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_border, of_alpha, of_taps = (
        x.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in (border, alpha, taps)
    )
    of_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return of_x, torch.empty_like(scale), of_border, of_alpha, of_taps


@torch.library.custom_op("aquant::integer_convolution", mutates_args=())
def integer_convolution(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    thresholds: Tensor | None,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    constant: Tensor,
    correction: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    groups: int,
    offset: int,
    route: str,
    window: Sequence[int],
    grid: Sequence[int],
    bound: str,
) -> Tensor:
    """``integer_reference.convolution`` by the route that the layer was packed for."""
    geometry, spec = _window(window), _specification(grid, bound)
    if route == "reference":
        out = integer_reference.convolution(
            x, scale, border, alpha, weight, multiplier, bias, residual, relu, groups, geometry, spec
        )
        return out.contiguous(memory_format=_layout(x, route))
    layer = PackedLayer(
        cast(Route, route), x.shape[1], geometry, groups, spec, offset, scale, border, alpha, thresholds, weight,
        multiplier, bias, constant, correction,
    )  # fmt: skip
    return cuda_inference.convolution(x, layer, residual, relu)


@integer_convolution.register_fake
def _(
    x: Tensor,
    scale: Tensor,  # noqa: ARG001 - the operator's signature
    border: Tensor | None,  # noqa: ARG001
    alpha: Tensor | None,  # noqa: ARG001
    thresholds: Tensor | None,  # noqa: ARG001
    weight: Tensor,  # noqa: ARG001
    multiplier: Tensor,
    bias: Tensor,  # noqa: ARG001
    constant: Tensor,  # noqa: ARG001
    correction: Tensor | None,  # noqa: ARG001
    residual: Tensor | None,  # noqa: ARG001
    relu: bool,  # noqa: ARG001
    groups: int,  # noqa: ARG001
    offset: int,  # noqa: ARG001
    route: str,
    window: Sequence[int],
    grid: Sequence[int],  # noqa: ARG001
    bound: str,  # noqa: ARG001
) -> Tensor:
    rows, columns = _window(window).output_size(x.shape[2], x.shape[3])
    out = x.new_empty(x.shape[0], multiplier.shape[0], rows, columns)
    return out.contiguous(memory_format=_layout(x, route))


def _layout(x: Tensor, route: str) -> torch.memory_format:
    """Of the outputs: channels last, except that plain torch and the matrix product keep x's own."""
    keeps = route in ("reference", "columns") and not cuda_inference.is_channels_last(x)
    return torch.contiguous_format if keeps else torch.channels_last


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
    """``reference.forward`` as an operator."""
    given, geometry = _tensor(rounding, x), _flat_window(window)
    columns: Tensor = border_columns(x, scale, border, alpha, given, taps, geometry, _flat_grid(spec), spec.bound)
    return columns


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
    """``reference.backward`` as an operator."""
    given = _tensor(rounding, x)
    of_x, of_scale, of_border, of_alpha, of_taps = border_gradients(
        grad, x, scale, border, alpha, given, taps, columns, _flat_window(window), _flat_grid(spec), spec.bound
    )
    return Gradients(
        of_x,
        of_scale,
        None if border is None else of_border,
        None if alpha is None else of_alpha,
        None if taps is None else of_taps,
    )


def _tensor(rounding: float | Tensor, x: Tensor) -> Tensor | None:
    """The schedule's alpha where it is still to be read; None where it is known to be 1."""
    if isinstance(rounding, Tensor):
        return rounding
    return None if rounding == 1.0 else x.new_full((), rounding)


def packed_convolution(x: Tensor, layer: PackedLayer, residual: Tensor | None, relu: bool) -> Tensor:
    """One packed layer as an operator."""
    out: Tensor = integer_convolution(
        x, layer.scale, layer.border, layer.alpha, layer.thresholds, layer.weight, layer.multiplier, layer.bias,
        layer.constant, layer.correction, residual, relu, layer.groups, layer.offset, layer.route,
        _flat_window(layer.window), _flat_grid(layer.spec), layer.spec.bound,
    )  # fmt: skip
    return out

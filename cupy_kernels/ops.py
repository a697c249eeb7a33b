"""The one door to border quantization, learned and applied: the operators, and the choice of who computes them."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cupy_kernels import operators, reference
from cupy_kernels.packing import PackedLayer, Route, route_of
from cupy_kernels.specification import BorderSpecification, Window

_forced_reference = False


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Within this context every call takes the plain torch reference, to compare a kernel with it."""
    global _forced_reference
    before, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = before


def implementation(x: Tensor) -> ModuleType:
    """The module that computes for ``x``: for fp32 kernels on a GPU with CuPy and fused loops on a CPU with numba, else
    the reference.
    """
    if _forced_reference or x.dtype != torch.float32:
        return reference
    if x.is_cuda and kernels_available(x.device):
        return operators
    if x.device.type == "cpu" and importlib.util.find_spec("numba") is not None:
        from cupy_kernels import cpu_loops

        return cpu_loops
    return reference


OLDEST = (8, 0)
"""Compute capability from which on the kernels' instructions are there."""


@functools.cache
def kernels_available(device: torch.device) -> bool:
    """Whether CuPy is there to compile the kernels and the GPU can run them; if not, says so once."""
    capability = torch.cuda.get_device_capability(device)
    if importlib.util.find_spec("cupy") is None:
        why = "CuPy is not installed (pip install cupy-cuda13x)"
    elif capability < OLDEST:
        why = f"{device} has compute capability {capability}, the kernels need {OLDEST}"
    else:
        return True
    warnings.warn(f"{why}, so plain torch computes on the GPU, several times slower.", RuntimeWarning, stacklevel=3)
    return False


class _BorderColumns(torch.autograd.Function):
    """Saves its inputs alone; the backward recomputes the border."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        border: Tensor | None,
        alpha: Tensor | None,
        window: Window,
        spec: BorderSpecification,
        rounding: float | Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, border, alpha)
        ctx.static = (window, spec, rounding)
        columns: Tensor = implementation(x).forward(x, scale, border, alpha, window, spec, rounding)
        return columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients = implementation(grads[0]).backward(grads[0], *ctx.saved_tensors, *ctx.static)
        return (*gradients[:4], None, None, None)


def border_columns(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
    rounding: float | Tensor = 1.0,
) -> Tensor:
    """Quantized im2col columns of ``x``, differentiable in x, scale, border, alpha (``reference.forward``).

    Returns:
        (N, C K, L) of x's dtype: s (q - z), exactly 0 where the window reaches into the padding.

    Raises:
        ValueError: a shape or dtype that the operator does not take, named.
    """
    check_border(x, scale, border, alpha, window, spec)
    result = _BorderColumns.apply(x, scale, border, alpha, window, spec, rounding)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


def check_border(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
) -> None:
    """Whether the shapes and dtypes fit together.

    Raises:
        ValueError: they do not; the message names the one that is wrong.
    """
    channels, positions = x.shape[1] if x.dim() == 4 else -1, window.positions
    if x.dim() != 4 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be a floating point (N, C, H, W) tensor, not {x.dtype} of shape {tuple(x.shape)}")
    if scale.dim() != 0:
        raise ValueError(f"scale must be a scalar tensor, not of shape {tuple(scale.shape)}")
    for name, tensor in (("scale", scale), ("border", border), ("alpha", alpha)):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, x is {x.dtype} on {x.device}")
    if border is not None and (border.shape[1:] != (channels, positions) or len(border) not in (2, 3)):
        raise ValueError(f"border must be (2 or 3, {channels}, {positions}), not {tuple(border.shape)}")
    if alpha is not None and (border is None or not spec.fused or alpha.shape != (channels, positions)):
        raise ValueError(f"alpha must be ({channels}, {positions}), beside a fused border; got {tuple(alpha.shape)}")


def border_codes(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    spec: BorderSpecification,
) -> Tensor:
    """The integer codes behind ``border_columns``, uint8 (N, C K, L)."""
    return reference.codes(x, scale, border, alpha, window, spec)


def integer_route(weight_shape: torch.Size, groups: int, device: torch.device) -> Route:
    """Who computes an integer convolution best on ``device``: (O, C / groups, k_y, k_x)."""
    by_kernel = device.type == "cuda" and not _forced_reference and kernels_available(device)
    return route_of(weight_shape, groups) if by_kernel else "reference"


def integer_convolution(x: Tensor, layer: PackedLayer, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """A convolution of quantized inputs in integers (``integer_reference.convolution``), by the layer's route.

    Args:
        x: (N, C, H, W) fp16 or fp32, any layout.
        layer: packed for x's dtype, on x's device.
        residual: (N, O, H_out, W_out) of x's dtype, added before ReLU.
        relu: whether negative outputs become 0.

    Returns:
        (N, O, H_out, W_out) of x's dtype; channels last where a kernel of ours multiplies, else of x's layout.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named.
    """
    if x.dim() != 4 or x.dtype not in (torch.float16, torch.float32) or x.shape[1] != layer.channels:
        raise ValueError(f"x must be float16 or float32 (N, {layer.channels}, H, W), not {x.dtype} {tuple(x.shape)}")
    if x.device != layer.weight.device:
        raise ValueError(f"x is on {x.device}, the layer on {layer.weight.device}")
    if layer.thresholds is not None and layer.thresholds.dtype != x.dtype:
        raise ValueError(f"the layer was packed for {layer.thresholds.dtype}, x is {x.dtype}")
    shape = (len(x), layer.out_channels, *layer.window.output_size(x.shape[2], x.shape[3]))
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"residual must be {x.dtype} {shape} on {x.device}, not {residual.dtype} {tuple(residual.shape)} on "
            f"{residual.device}"
        )
    return operators.packed_convolution(x, layer, residual, relu)

"""The one door to border quantization: a differentiable operator, and the choice of who computes it."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cupy_kernels import reference
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
    """The module that computes for ``x``: fused loops for fp32 on a CPU with numba, else the reference."""
    if (
        not _forced_reference
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and importlib.util.find_spec("numba") is not None
    ):
        from cupy_kernels import cpu_loops

        return cpu_loops
    return reference


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

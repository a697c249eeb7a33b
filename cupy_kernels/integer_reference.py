"""Integer inference in plain torch: the specification of the integer kernels, bit for bit.

The window's codes q - z and the weights' w_q - z_w are multiplied and summed exactly; then s_w s_x, the bias, the
residual and ReLU are applied in fp32, each operation rounded, and the result is rounded to the output's type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cupy_kernels import reference
from cupy_kernels.specification import BorderSpecification, Window


def convolution(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    weight: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
    groups: int,
    window: Window,
    spec: BorderSpecification,
) -> Tensor:
    """One quantized layer.

    Args:
        x: (N, C, H, W) fp32 or fp16. A NaN gets the code 0.
        scale, border, alpha, window, spec: see ``reference.forward``; a border of K = 1 under a larger window is one
            by channel: each pixel has one code.
        weight: (O, C / groups, k_y, k_x) int16, w_q - z_w.
        multiplier: (O,) fp32, s_w s_x.
        bias: (O,) fp32.
        residual: (N, O, H_out, W_out) of x's dtype, added before ReLU.
        relu: whether negative outputs become 0.
        groups: of the convolution.

    Returns:
        (N, O, H_out, W_out) of x's dtype.
    """
    most = spec.levels * int(weight.abs().max()) * weight[0].numel()
    exact = torch.float32 if most < 2**24 else torch.float64
    with torch.autocast(x.device.type, enabled=False):
        sums = _sums(x, scale, border, alpha, weight.to(exact), groups, window, spec)
    return finish(sums, multiplier, bias, residual, relu, x.dtype)


def _sums(
    x: Tensor,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    centred_weight: Tensor,
    groups: int,
    window: Window,
    spec: BorderSpecification,
) -> Tensor:
    """Sums of products of whole numbers, exact in the weight's type: (N, O, H_out, W_out)."""
    by_pixel = border is None or border.shape[2] == 1
    codes_of = Window() if by_pixel else window
    codes = reference.codes(x.float(), scale, border, alpha, codes_of, spec).to(centred_weight.dtype) - spec.zero_point
    if by_pixel:
        return F.conv2d(
            codes.view(x.shape), centred_weight, None, window.stride, window.padding, window.dilation, groups
        ).round()  # an algorithm that transforms its input, such as Winograd's, is exact up to that
    size, outputs = window.output_size(x.shape[2], x.shape[3]), len(centred_weight)
    matrix = centred_weight.reshape(groups, outputs // groups, -1)  # (G, O/G, C/G K)
    columns = codes.reshape(len(x), groups, matrix.shape[2], size[0] * size[1])  # (N, G, C/G K, L)
    return (matrix @ columns).view(len(x), outputs, *size)


def finish(
    sums: Tensor, multiplier: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, dtype: torch.dtype
) -> Tensor:
    """From (N, O, ...) exact sums to outputs of ``dtype``."""
    shape = (1, -1, *[1] * (sums.dim() - 2))
    value = sums.float() * multiplier.view(shape)
    value += bias.view(shape)
    if residual is not None:
        value += residual.float()
    return (value.relu_() if relu else value).to(dtype)

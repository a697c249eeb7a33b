"""One quantized layer as the integer kernels want it: parameters in their order, zero-points worked into constants.

Stored in int8 are q - o and w_q - o_w: the zero-points themselves up to 7 bits, 128 at 8 bits, where q - z does not
fit. With a = q - o, w = w_q - o_w, d = o - z, d_w = o_w - z_w and n slots a window,

    sum (q - z)(w_q - z_w) = sum a w + (d sum w + n d d_w) + d_w sum a,

where the bracket is a constant of the output channel and the last term vanishes up to 7 bits of weights.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cupy_kernels.specification import BorderSpecification, Window
from cupy_kernels.thresholds import NoThresholdsError, derive

Route = Literal["reference", "columns", "implicit", "depthwise"]
"""Who computes: plain torch; im2col and a library's matrix product; the implicit GEMM; the depthwise kernel."""

DEPTH, TILE = 32, 8
"""Channels and outputs of mma.sync's fragments."""

LARGEST_SUM = 2**31 - 1


@dataclass(frozen=True)
class PackedLayer:
    """A convolution with quantized weight and input, packed for one route.

    Attributes:
        route: what it is packed for.
        channels: of the input.
        window, groups, spec: as in ``integer_reference.convolution``.
        offset: o; codes are stored as q - o.
        scale: s of the input, scalar.
        border, alpha: by ``route``: as the reference's, or (K, C / 4, P, 4) and (K, C).
        thresholds: (K, C / 4, 2^M - 1, 4) of the input's dtype, (1, 1, 2^M - 1, 4) where all are the same, or None.
        weight: by ``route``: the reference's; (G, O/G padded, C/G K padded); fragments; (K, C).
        multiplier, bias: (O,) fp32.
        constant, correction: (O,) int32, the bracket above and d_w; correction is None where d_w is 0 everywhere.
        evaluated_because: why there are no thresholds, None where there are.
    """

    route: Route
    channels: int
    window: Window
    groups: int
    spec: BorderSpecification
    offset: int
    scale: Tensor
    border: Tensor | None
    alpha: Tensor | None
    thresholds: Tensor | None
    weight: Tensor
    multiplier: Tensor
    bias: Tensor
    constant: Tensor
    correction: Tensor | None
    evaluated_because: str | None = None

    @property
    def out_channels(self) -> int:
        return len(self.multiplier)

    @property
    def by_pixel(self) -> bool:
        """Whether a pixel has one code wherever in a window it stands, by a border of its channel."""
        if self.border is None or self.window.positions == 1:
            return False
        return (self.border.shape[2] if self.route == "reference" else len(self.border)) == 1

    def to(self, device: torch.device) -> PackedLayer:
        """The same on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: t.to(device) for name, t in values.items() if isinstance(t, Tensor)}
        return replace(self, **moved)


def offset_of(levels: int, zero_point: Tensor | int) -> Tensor | int:
    """o: what is taken from codes so that they fit into int8."""
    return zero_point if levels < 128 else 128 * torch.ones_like(zero_point) if isinstance(zero_point, Tensor) else 128


def pack(
    route: Route,
    codes: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor,
    weight_levels: int,
    bias: Tensor | None,
    scale: Tensor,
    border: Tensor | None,
    alpha: Tensor | None,
    window: Window,
    groups: int,
    spec: BorderSpecification,
    dtype: torch.dtype,
) -> PackedLayer:
    """Packs a layer.

    Args:
        route: see ``route_of``.
        codes: (O, C / groups, k_y, k_x) whole numbers from 0 to ``weight_levels``.
        weight_scale, weight_zero_point: (O,).
        weight_levels: 2^M - 1 of the weights.
        bias: (O,) or None.
        scale, border, alpha, window, spec: see ``reference.forward``.
        groups: of the convolution.
        dtype: of the inputs, float16 or float32.

    Raises:
        ValueError: a window's sum could pass the range of int32, or a parameter is not float32.
    """
    for name, tensor in (("scale", scale), ("weight_scale", weight_scale), ("border", border), ("alpha", alpha)):
        if tensor is not None and tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}; a layer is packed from its float32 parameters")
    slots = codes[0].numel()
    if spec.levels * weight_levels * slots > LARGEST_SUM:
        raise ValueError(f"{slots} products of codes up to {spec.levels} and {weight_levels} do not fit into int32")
    whole, zero_points = codes.round().to(torch.int32), weight_zero_point.round().to(torch.int32)
    weight_offset = offset_of(weight_levels, zero_points)
    assert isinstance(weight_offset, Tensor)
    offset = int(offset_of(spec.levels, spec.zero_point))
    stored = whole - weight_offset.view(-1, 1, 1, 1)  # w
    d, d_w = offset - spec.zero_point, weight_offset - zero_points
    constant = d * stored.flatten(1).sum(1, dtype=torch.int32) + slots * d * d_w
    correction = d_w if bool(d_w.any()) else None
    thresholds = evaluated_because = None
    if route == "reference":
        evaluated_because = "plain torch evaluates borders"
    elif dtype != torch.float16:
        evaluated_because = "thresholds equal evaluation over fp16 inputs alone"
    else:
        try:
            rising = torch.zeros(2, 4, 1, device=scale.device) if border is None else border
            thresholds = _by_fours(derive(rising, scale, spec, dtype))
        except NoThresholdsError as error:
            evaluated_because = str(error)
    if route == "reference":
        weight = (whole - zero_points.view(-1, 1, 1, 1)).to(torch.int16)
    else:
        weight = _PACKED[route](stored.to(torch.int8), groups, correction is not None)
        border = None if border is None else _by_fours(border.permute(2, 0, 1))
        alpha = None if alpha is None else alpha.t().contiguous()
    return PackedLayer(
        route, codes.shape[1] * groups, window, groups, spec, offset, scale, border, alpha, thresholds, weight,
        weight_scale * scale, torch.zeros_like(weight_scale) if bias is None else bias.float(), constant, correction,
        evaluated_because,
    )  # fmt: skip


def route_of(weight_shape: torch.Size, groups: int) -> Route:
    """The kernel for a layer on a GPU: (O, C / groups, k_y, k_x)."""
    outputs, group_channels = weight_shape[:2]
    if group_channels == 1 and outputs == groups:
        return "depthwise"
    return "implicit" if group_channels >= DEPTH // 2 and group_channels % 4 == 0 else "columns"


def _by_fours(parameters: Tensor) -> Tensor:
    """(K, rows, C) as (K, C / 4, rows, 4), padded."""
    padded = F.pad(parameters, (0, -parameters.shape[2] % 4)).contiguous()
    return padded.view(*padded.shape[:2], -1, 4).transpose(1, 2).contiguous()


def _matrix(weight: Tensor, groups: int, corrected: bool) -> Tensor:
    """(G, O/G padded to 16, C/G K padded to 16); if corrected, the row after the last weight is ones."""
    matrix = weight.reshape(groups, len(weight) // groups, -1)
    if corrected:
        matrix = F.pad(matrix, (0, 0, 0, 1), value=1)
    return F.pad(matrix, (0, -matrix.shape[2] % 16, 0, -matrix.shape[1] % 16)).contiguous()


def _fragments(weight: Tensor, groups: int, corrected: bool) -> Tensor:  # noqa: ARG001 - one signature for all
    """B of mma.m16n8k32, by group, 32 channels, position, 8 outputs and lane: (G, chunks, K, tiles, 32, 8) bytes.

    Lane 4 n + t holds, of output n, channels 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3.
    """
    outputs, channels = len(weight) // groups, weight.shape[1]
    w = weight.reshape(groups, outputs, channels, -1)
    w = F.pad(w, (0, 0, 0, -channels % DEPTH, 0, -outputs % TILE))
    w = w.reshape(groups, w.shape[1] // TILE, TILE, w.shape[2] // DEPTH, 2, 4, 4, w.shape[3])
    #      groups, chunks, K, tiles, n, t, half, byte
    return w.permute(0, 3, 7, 1, 2, 5, 4, 6).reshape(groups, w.shape[3], w.shape[7], w.shape[1], 32, 8).contiguous()


def _taps(weight: Tensor, groups: int, corrected: bool) -> Tensor:  # noqa: ARG001 - one signature for all
    """(K, C)"""
    return weight.flatten(1).t().contiguous()


_PACKED = {"columns": _matrix, "implicit": _fragments, "depthwise": _taps}

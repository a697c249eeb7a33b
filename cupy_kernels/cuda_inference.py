"""Launchers of the integer kernels: codes, product and epilogue of one packed layer on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cupy_kernels.compilation import launch
from cupy_kernels.cuda_training import geometry
from cupy_kernels.packing import PackedLayer
from cupy_kernels.specification import NUMBER_OF_BOUND, Window

_Arguments = list[Tensor | int | float | None]
_NEAREST, _BORDER, _THRESHOLDS, _CODES = range(4)
_ELEMENT = {torch.float32: 0, torch.float16: 1, torch.int8: 2}
_TILE_BYTES = 32 << 10
_ALIGNMENT = 16
"""Bytes that a kernel may load at once."""
_STAGE = 9
"""Positions of a window whose codes the implicit GEMM holds at a time."""


def convolution(x: Tensor, layer: PackedLayer, residual: Tensor | None, relu: bool) -> Tensor:
    """``integer_reference.convolution`` by the layer's route; channels last, or by ``columns`` in x's own layout.

    Args:
        x: (N, C, H, W) fp16 or fp32.
        layer: packed for x's dtype and device.
        residual: (N, O, H_out, W_out) of x's dtype, or None.
        relu: whether negative outputs become 0.
    """
    output_type = x.dtype
    if layer.route != "columns":
        x = x.contiguous(memory_format=torch.channels_last)
    elif not is_channels_last(x):
        x = x.contiguous()
    if x.data_ptr() % _ALIGNMENT:  # a view from the middle of something
        x = x.clone()
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    if layer.by_pixel:
        x = _codes_by_pixel(x, layer)
    rows, columns = layer.window.output_size(x.shape[2], x.shape[3])
    out = torch.empty(
        len(x), layer.out_channels, rows, columns, dtype=output_type, device=x.device, memory_format=layout
    )
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    epilogue: _Arguments = [layer.multiplier, layer.bias, layer.constant, layer.correction, residual, int(relu)]
    _ROUTES[layer.route](x, layer, out, epilogue)
    return out


def is_channels_last(x: Tensor) -> bool:
    """Whether a pixel's channels are neighbours in memory."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _quantizer(layer: PackedLayer, x: Tensor) -> int:
    if x.dtype == torch.int8:
        return _CODES
    if layer.thresholds is not None:
        return _THRESHOLDS
    return _NEAREST if layer.border is None else _BORDER


def _constants(layer: PackedLayer, window: Window, x: Tensor, out: Tensor | None, width: int) -> dict[str, int]:
    """What ``inference.cuh`` asks for."""
    quantizer = _quantizer(layer, x)
    bordered = quantizer == _BORDER
    border = layer.border if bordered else None
    return {
        "KERNEL_HEIGHT": window.kernel_size[0],
        "KERNEL_WIDTH": window.kernel_size[1],
        "BORDERED": bordered,
        "TERMS": 3 if border is None else border.shape[2],
        "BOUND": NUMBER_OF_BOUND[layer.spec.bound] if bordered else 0,
        "FUSED": bordered and layer.spec.fused,
        "LEARNED_ALPHA": bordered and layer.alpha is not None,
        "QUANTIZER": quantizer,
        "INPUT": _ELEMENT[x.dtype],
        "OUTPUT": 0 if out is None else _ELEMENT[out.dtype],
        "LEVELS": layer.spec.levels if quantizer == _THRESHOLDS else 1,
        "UNIFORM": quantizer == _THRESHOLDS and layer.border is None,
        "WIDTH": width,
        "CORRECTED": layer.correction is not None and out is not None,
    }


def _quantizer_arguments(layer: PackedLayer, x: Tensor) -> _Arguments:
    grid = [float(layer.spec.zero_point), float(layer.spec.levels), layer.offset]
    return [x, layer.scale, layer.border, layer.alpha, layer.thresholds, *grid]


def integer_columns(x: Tensor, layer: PackedLayer, window: Window, row_bytes: int, groups: int) -> Tensor:
    """Quantized im2col, int8 (G, N L or 32 if that is less, row_bytes): codes q - o, order (channel, position).

    Rows and columns beyond the windows and their slots are zeros.
    """
    places = geometry(x, window)
    rows, group_channels = len(x) * places[4] * places[5], x.shape[1] // groups
    # torch._int_mm takes no fewer than 17 rows.
    out = x.new_empty(groups, max(rows, 32), row_bytes, dtype=torch.int8)
    out[:, rows:] = 0
    channels = min(32, 1 << (group_channels - 1).bit_length())
    windows = min(1024 // channels, 64)
    while windows * channels * window.positions > _TILE_BYTES:
        if channels > 1:
            channels //= 2
        else:
            windows //= 2
    channels_last = is_channels_last(x)
    constants = _constants(layer, window, x, None, 1) | {
        "WINDOWS": windows,
        "CHANNELS": channels,
        "CHANNELS_LAST": channels_last,
        "LANES_ARE_CHANNELS": channels_last and channels == 32,
    }
    grid = (math.ceil(rows / windows), math.ceil(group_channels / channels), groups)
    launch(
        "integer_columns.cu", constants, grid, 256,
        [*_quantizer_arguments(layer, x), out, groups, row_bytes, out.shape[1], *places],
    )  # fmt: skip
    return out


def _codes_by_pixel(x: Tensor, layer: PackedLayer) -> Tensor:
    """Codes q - o of a whole map, int8 (N, C, H, W), channels last."""
    images, channels, height, width = x.shape
    codes = integer_columns(x, layer, Window(), channels, 1)[0, : images * height * width]
    return codes.view(images, height, width, channels).permute(0, 3, 1, 2)


def _by_columns(x: Tensor, layer: PackedLayer, out: Tensor, epilogue: _Arguments) -> None:
    columns = integer_columns(x, layer, layer.window, layer.weight.shape[2], layer.groups)
    products = [torch._int_mm(rows, matrix.t()) for rows, matrix in zip(columns, layer.weight, strict=True)]
    sums = products[0][None] if len(products) == 1 else torch.stack(products)
    constants = _constants(layer, Window(), x, out, 1) | {"CHANNELS_LAST": is_channels_last(out)}
    numbers = [layer.groups, layer.out_channels, sums.shape[1], sums.shape[2], len(out), out.shape[2] * out.shape[3]]
    launch(
        "integer_outputs.cu", constants, (math.ceil(out.numel() / 256),), 256, [sums, out, *epilogue, *numbers]
    )  # fmt: skip


def _depthwise(x: Tensor, layer: PackedLayer, out: Tensor, epilogue: _Arguments) -> None:
    width = 4 if x.shape[1] % 4 == 0 else 1
    launch(
        "integer_depthwise.cu", _constants(layer, layer.window, x, out, width),
        (math.ceil(out.numel() / width / 256),), 256,
        [*_quantizer_arguments(layer, x), layer.weight, out, *epilogue, *geometry(x, layer.window)],
    )  # fmt: skip


def _implicit(x: Tensor, layer: PackedLayer, out: Tensor, epilogue: _Arguments) -> None:
    places = geometry(x, layer.window)
    rows, group_outputs = len(x) * places[4] * places[5], layer.out_channels // layer.groups
    constants = _constants(layer, layer.window, x, out, 4)
    evaluates = constants["QUANTIZER"] == _BORDER
    windows, outputs = tile_of(group_outputs, rows * layer.groups, evaluates, _multiprocessors(x))
    constants |= {
        "WINDOWS": windows,
        "OUTPUTS": outputs,
        "STAGE": min(layer.window.positions, _STAGE),
        "PAIRED": group_outputs % 2 == 0,
    }
    launch(
        "integer_convolution.cu", constants,
        (math.ceil(rows / windows), layer.groups * math.ceil(group_outputs / outputs)), 256,
        [*_quantizer_arguments(layer, x), layer.weight, out, *epilogue, layer.groups, layer.out_channels, *places],
    )  # fmt: skip


def tile_of(group_outputs: int, rows: int, evaluates: bool, multiprocessors: int) -> tuple[int, int]:
    """Windows and output channels of one block of the implicit GEMM.

    As many outputs as there are, since each block quantizes its windows anew; then as many windows as its registers
    hold, since each loads thresholds and weights anew (64 where it evaluates a border, which takes more of them); less
    of either while blocks are too few for the device.
    """
    outputs = min(max(32, 1 << (group_outputs - 1).bit_length()), 256)
    windows = 64 if outputs == 256 or evaluates else 128
    while math.ceil(rows / windows) * math.ceil(group_outputs / outputs) < multiprocessors:
        if windows == 128:
            windows = 64
        elif outputs > 64:
            outputs //= 2
        else:
            break
    return windows, outputs


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


_ROUTES = {"columns": _by_columns, "depthwise": _depthwise, "implicit": _implicit}

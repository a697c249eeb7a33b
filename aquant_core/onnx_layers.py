"""Quantized layers in standard ONNX operators: the codes of the input, an integer product, scale and bias.

Three products, chosen by what onnxruntime's CPU kernels do best (docs/performance.md):

- ``MatMulInteger`` over im2col columns of codes, channels last: convolutions without groups, and linear layers. Exact
  in int32; int8 weights where no pair of products can pass int16, else uint8, so that CPUs without VNNI are exact too.
- ``ConvInteger``: grouped convolutions.
- ``Conv`` of x_hat and the dequantized weight: depthwise convolutions, those of few channels, such as the first, and
  layers of which only one side is quantized.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from torch import Tensor

from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.onnx_a_rounding import write_a_rounding
from aquant_core.onnx_border import BorderWriter
from aquant_core.onnx_graph import OnnxGraph
from aquant_core.onnx_windows import slices_of
from aquant_core.quantizers import largest_code
from cupy_kernels.specification import Window

FEWEST_CHANNELS = 8
"""Of a group: below it an integer convolution is no faster than a float one in onnxruntime."""

_LARGEST_PAIR = 32767
"""vpmaddubsw adds two products of uint8 and int8 in int16, saturating."""

CODES = ".codes"
"""What the name of a quantized value's codes ends in, after the layer's or the mark's."""

_PER_CHANNEL = (1, -1, 1, 1)


class Codes:
    """Integer codes in the graph, and what they stand for: x_hat = s (q - z).

    Attributes:
        name: of the codes, uint8.
        scale, zero_point, levels: s, z, and the largest code.
    """

    def __init__(self, name: str, quantizer: ActivationQuantizer) -> None:
        assert quantizer.activation_scale is not None
        self.name = name
        self.scale = np.float32(quantizer.activation_scale.detach().cpu())
        self.zero_point = quantizer.zero_point
        self.levels = largest_code(quantizer.activation_bits)

    def values(self, graph: OnnxGraph, output: str | None = None) -> str:
        """x_hat."""
        constants = [graph.constant(self.scale), graph.constant(self.zero_point, np.uint8)]
        return graph.add("DequantizeLinear", [self.name, *constants], output)


class LayerWriter:
    """Writes layers and marks.

    Attributes:
        graph: where to.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.graph = graph

    def mark(self, name: str, quantizer: ActivationQuantizer, x: str) -> Codes:
        """The codes of a value that is quantized where it is made."""
        writer = BorderWriter(self.graph, quantizer, quantizer.specification(fused=False))
        return Codes(writer.by_pixel(x, (), name + CODES), quantizer)

    def layer(
        self, name: str, layer: QuantizedLayer, x: str, codes: Codes | None, size: tuple[int, int], output: str
    ) -> None:
        """One layer.

        Args:
            name: the layer's.
            layer: hardened.
            x: its input.
            codes: of its input, where that is quantized already.
            size: (H, W) of the input; of no meaning for a linear layer.
            output: the name of its value.
        """
        window = layer.window
        if layer.activation_scale is not None:
            codes = self._codes(name, layer, x, size)
            if layer.has_border_by_position or layer.a_rounding:
                window = Window()  # the codes are columns: a convolution by pixels is left
        product = _Product(self.graph, name, layer, window)
        if layer.weight is None or codes is None or (layer.op == "conv2d" and product.channels < FEWEST_CHANNELS):
            product.float(x if codes is None else codes.values(self.graph), output)
        elif layer.groups > 1 and product.fits_one_zero_point:
            product.by_groups(codes, output)
        elif layer.groups > 1:
            product.float(codes.values(self.graph), output)
        else:
            product.matrix(codes, output)

    def _codes(self, name: str, layer: QuantizedLayer, x: str, size: tuple[int, int]) -> Codes:
        if layer.a_rounding:
            return Codes(write_a_rounding(self.graph, x, layer, size, name + CODES), layer)
        writer = BorderWriter(self.graph, layer, layer.specification(layer.is_fused))
        if layer.has_border_by_position:
            return Codes(writer.by_position(x, layer.window, size, name + CODES), layer)
        axes = (-1,) if layer.op == "linear" else _PER_CHANNEL
        return Codes(writer.by_pixel(x, axes, name + CODES), layer)


class _Product:
    """The product of a layer's input and weight, in one of three ways."""

    def __init__(self, graph: OnnxGraph, name: str, layer: QuantizedLayer, window: Window) -> None:
        self.graph, self.name, self.layer, self.window = graph, name, layer, window
        shape = tuple(layer.float_weight.shape)  # (O, I) or (O, C / groups, k_y, k_x)
        if window != layer.window:
            shape = (shape[0], shape[1] * layer.window.positions, 1, 1)
        self.shape = shape
        self.channels = shape[1]
        self.bias = None if layer.bias is None else _array(layer.bias)

    @property
    def fits_one_zero_point(self) -> bool:
        """Whether w_q - z_w of every channel can be kept in 8 bits about one zero-point."""
        return self.layer.weight_bits < 8

    def _weight_codes(self) -> np.ndarray:
        assert self.layer.weight is not None
        return _array(self.layer.weight.codes).astype(np.uint8).reshape(self.shape)

    def _zero_points(self) -> np.ndarray:
        assert self.layer.weight is not None
        return _array(self.layer.weight.zero_point).astype(np.uint8).reshape(-1)

    def _multiplier(self, codes: Codes) -> np.ndarray:
        """s_w s_x, (O,)."""
        assert self.layer.weight is not None
        return _array(self.layer.weight.scale).reshape(-1) * codes.scale

    def _convolution(self) -> dict[str, Any]:
        return {
            "kernel_shape": self.shape[2:],
            "strides": self.window.stride,
            "pads": self.window.padding * 2,
            "dilations": self.window.dilation,
            "group": self.layer.groups,
        }

    def float(self, x: str, output: str) -> None:
        """Conv or Gemm's product of fp32 values."""
        weight = self._float_weight()
        bias = [] if self.bias is None else [self.graph.constant(self.bias)]
        if self.layer.op == "conv2d":
            self.graph.add("Conv", [x, weight, *bias], output, **self._convolution())
            return
        transposed = self.graph.add("Transpose", [weight], perm=[1, 0])
        product = self.graph.add("MatMul", [x, transposed], None if bias else output)
        if bias:
            self.graph.add("Add", [product, *bias], output)

    def _float_weight(self) -> str:
        weight = self.layer.weight
        if weight is None:
            return self.graph.constant(_array(self.layer.float_weight).reshape(self.shape))
        # Not by DequantizeLinear: before a MatMul onnxruntime would take that as leave to round activations to int8.
        add, constant, axes = self.graph.add, self.graph.constant, (-1, *[1] * (len(self.shape) - 1))
        codes = self.graph.packed(f"{self.name}/weight", self._weight_codes(), self.layer.weight_bits)
        whole = add("Cast", [codes], to=TensorProto.FLOAT)
        centred = add("Sub", [whole, constant(self._zero_points().reshape(axes))])
        return add("Mul", [centred, constant(_array(weight.scale).reshape(axes))])

    def matrix(self, codes: Codes, output: str) -> None:
        """MatMulInteger over columns of codes, channels last."""
        add, constant, bits = self.graph.add, self.graph.constant, self.layer.weight_bits
        signed = 2 * codes.levels * min(2**bits - 1, 128) <= _LARGEST_PAIR
        offset = 128 if signed and bits == 8 else 0
        dtype: type[np.generic] = np.int8 if signed else np.uint8
        # (K C, O): the columns' order.
        matrix = self._weight_codes().reshape(*self.shape[:2], -1).transpose(2, 1, 0).reshape(-1, self.shape[0])
        if bits <= 4:
            weight = self.graph.packed(f"{self.name}/weight", matrix, bits)
            weight = add("Cast", [weight], to=TensorProto.INT8 if signed else TensorProto.UINT8)
        else:
            weight = constant(matrix.astype(np.int16) - offset, dtype)
        zero_points = constant(self._zero_points().astype(np.int16) - offset, dtype)
        columns = codes.name if self.layer.op == "linear" else self._columns(codes)
        sums = add("MatMulInteger", [columns, weight, constant(codes.zero_point, np.uint8), zero_points])
        if self.layer.op == "conv2d":
            sums = add("Transpose", [sums], perm=[0, 3, 1, 2])
        self._finish(sums, codes, output)

    def _columns(self, codes: Codes) -> str:
        """(N, H_out, W_out, K C), a padded slot's code z."""
        add, constant = self.graph.add, self.graph.constant
        columns = add("Transpose", [codes.name], perm=[0, 2, 3, 1])
        vertical, horizontal = self.window.padding
        if vertical or horizontal:
            pads = constant([0, vertical, horizontal, 0] * 2, np.int64)
            columns = add("Pad", [columns, pads, constant(codes.zero_point, np.uint8)])
        if self.window.positions == 1 and self.window.stride == (1, 1):
            return columns
        views = [add("Slice", [columns, *slices]) for slices in slices_of(self.graph, self.window, (1, 2))]
        return views[0] if len(views) == 1 else add("Concat", views, axis=3)

    def by_groups(self, codes: Codes, output: str) -> None:
        """ConvInteger, whose weight has one zero-point in onnxruntime: w_q - z_w is kept, about 128."""
        constant = self.graph.constant
        centred = self._weight_codes().astype(np.int16) - self._zero_points().reshape(-1, 1, 1, 1) + 128
        weight = self.graph.packed(f"{self.name}/weight", centred, 8)
        inputs = [codes.name, weight, constant(codes.zero_point, np.uint8), constant(128, np.uint8)]
        self._finish(self.graph.add("ConvInteger", inputs, **self._convolution()), codes, output)

    def _finish(self, sums: str, codes: Codes, output: str) -> None:
        """s_w s_x times the sums, and the bias."""
        add, constant = self.graph.add, self.graph.constant
        axes = (-1,) if self.layer.op == "linear" else _PER_CHANNEL
        value = add("Cast", [sums], to=TensorProto.FLOAT)
        multiplier = constant(self._multiplier(codes).reshape(axes))
        value = add("Mul", [value, multiplier], output if self.bias is None else None)
        if self.bias is not None:
            add("Add", [value, constant(self.bias.reshape(axes))], output)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

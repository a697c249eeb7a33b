"""A-rounding in standard ONNX operators: ``a_rounding.a_round``, flip for flip.

Sums are in float64, and of equal gains the first is flipped first, there as here: TopK and ArgMax break ties so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto

from aquant_core.layers import QuantizedLayer
from aquant_core.onnx_graph import OnnxGraph
from aquant_core.onnx_windows import columns_of
from aquant_core.quantizers import largest_code

_CHANNELS, _POSITIONS = 2, 3
"""Axes of (N, G, C/G, K, L)."""


def write_a_rounding(graph: OnnxGraph, x: str, layer: QuantizedLayer, size: tuple[int, int], output: str) -> str:
    """Codes of all im2col slots, uint8 (N, C K, H_out, W_out), or (..., C) for a linear layer.

    Args:
        graph: where to.
        x: the layer's input.
        layer: with ``a_rounding``.
        size: (H, W) of the input; of no meaning for a linear layer.
        output: name of the codes.
    """
    return _Writer(graph, layer).codes(x, size, output)


class _Writer:
    def __init__(self, graph: OnnxGraph, layer: QuantizedLayer) -> None:
        self.graph, self.layer = graph, layer

    def codes(self, x: str, size: tuple[int, int], output: str) -> str:
        layer, window = self.layer, self.layer.window
        assert layer.activation_scale is not None
        t = self._add("Div", x, np.float32(layer.activation_scale.detach().cpu()))
        t = self._add("Add", t, layer.zero_point)
        t = self._add("Clip", t, 0, largest_code(layer.activation_bits))
        t = self._add("Sub", t, layer.zero_point)
        channels, groups = layer.in_channels, layer.groups
        if layer.op == "linear":
            maps = self._reshape(t, [-1, 1, channels, 1, 1])
            return self.graph.add("Reshape", [self._codes(maps, channels, 1), self.graph.add("Shape", [x])], output)
        vertical, horizontal = window.padding
        if vertical or horizontal:
            pads = self.graph.constant([0, 0, vertical, horizontal] * 2, np.int64)
            t = self.graph.add("Pad", [t, pads])
        columns = columns_of(self.graph, t, window)  # (N, C, K, H_out, W_out)
        rows = channels * window.positions
        grouped = self._reshape(columns, [0, groups, channels // groups, window.positions, -1])
        q = self._codes(grouped, channels // groups, window.positions)
        return self._reshape(q, [0, rows, *window.output_size(*size)], output)

    def _codes(self, t: str, channels: int, positions: int) -> str:
        """uint8, of t's shape (N, G, C/G, K, L)."""
        add = self._add
        rounded = add("Ceil", add("Sub", t, 0.5))
        error = add("Sub", rounded, t)
        rounded = add("Sub", rounded, self._flips_in_channels(error, positions))
        error = add("Sub", rounded, t)
        total = self._sum(error, [_CHANNELS, _POSITIONS])
        sign = self._sign(total)
        gain = add("Mul", error, sign)
        best = add("ReduceMax", gain, np.array([_POSITIONS]))  # (N, G, C/G, 1, L)
        place = add("ArgMax", gain, axis=_POSITIONS)
        channel_sign = self._sign(self._sum(error, [_POSITIONS]))
        against = add("Greater", add("Mul", channel_sign, sign), 0.0)
        best = add("Mul", best, self._float(against))
        chosen = self._first(best, self._count(total), _CHANNELS, channels)
        at_place = add("Equal", place, np.arange(positions).reshape(-1, 1))  # (N, G, C/G, K, L)
        flips = self._float(add("And", add("And", chosen, add("Greater", best, 0.0)), at_place))
        rounded = add("Sub", rounded, add("Mul", flips, sign))
        return self.graph.add("Cast", [add("Add", rounded, self.layer.zero_point)], to=TensorProto.UINT8)

    def _flips_in_channels(self, error: str, positions: int) -> str:
        """Appendix A, second step."""
        add = self._add
        total = self._sum(error, [_POSITIONS])
        sign = self._sign(total)
        gain = add("Mul", error, sign)
        chosen = self._first(gain, self._count(total), _POSITIONS, positions)
        return add("Mul", self._float(add("And", chosen, add("Greater", gain, 0.0))), sign)

    def _first(self, gain: str, count: str, axis: int, length: int) -> str:
        """Whether an element is among the ``count`` largest along an axis."""
        everything = self.graph.constant([length], np.int64)
        places = self._indices("TopK", gain, everything, axis, largest=1)
        ranks = self._indices("TopK", places, everything, axis, largest=0)  # the inverse of that permutation
        return self._add("Less", self.graph.add("Cast", [ranks], to=TensorProto.DOUBLE), count)

    def _indices(self, op: str, values: str, length: str, axis: int, largest: int) -> str:
        return self.graph.add_second(op, [values, length], axis=axis, largest=largest, sorted=1)

    def _sum(self, error: str, axes: Sequence[int]) -> str:
        return self._add("ReduceSum", self.graph.add("Cast", [error], to=TensorProto.DOUBLE), np.array(axes))

    def _sign(self, total: str) -> str:
        return self._float(self._add("Sign", total))

    def _count(self, total: str) -> str:
        """Flips by 1 that bring a sum to at most 1/2, float64."""
        half = self.graph.constant(0.5, np.float64)
        return self._add("Ceil", self.graph.add("Sub", [self._add("Abs", total), half]))

    def _float(self, value: str) -> str:
        return self.graph.add("Cast", [value], to=TensorProto.FLOAT)

    def _reshape(self, x: str, shape: Sequence[int], output: str | None = None) -> str:
        return self.graph.add("Reshape", [x, self.graph.constant(shape, np.int64)], output)

    def _add(self, op: str, *inputs: str | float | np.ndarray | np.generic, **attributes: Any) -> str:
        """An operator whose inputs are values by name or constants: numbers in fp32, arrays in int64."""
        names = [
            value
            if isinstance(value, str)
            else self.graph.constant(value, np.int64 if isinstance(value, np.ndarray) else np.float32)
            for value in inputs
        ]
        return self.graph.add(op, names, **attributes)

"""The border in standard ONNX operators: from a value to its integer codes, equal to ``reference.codes``.

Each operator is one operation of the specification, rounded to fp32 on its own, in the specification's order; so codes
are equal wherever fp32 is IEEE's and a runtime does not contract products and sums. Values must be finite.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto
from torch import Tensor

from aquant_core.layers import ActivationQuantizer
from aquant_core.onnx_graph import OnnxGraph
from aquant_core.onnx_thresholds import Thresholds, thresholds_of
from aquant_core.onnx_windows import columns_of, inside_of
from cupy_kernels.specification import (
    SCALE_OF_BOUND,
    SIGMOID_LIMIT,
    SIGMOID_P0,
    SIGMOID_P1,
    SIGMOID_P2,
    SIGMOID_Q1,
    SIGMOID_Q2,
    BorderSpecification,
    Window,
)


class BorderWriter:
    """Writes the codes of one quantized value."""

    def __init__(self, graph: OnnxGraph, quantizer: ActivationQuantizer, spec: BorderSpecification) -> None:
        assert quantizer.activation_scale is not None
        self.graph, self.spec = graph, spec
        self.scale = np.float32(quantizer.activation_scale.detach().cpu())
        border = quantizer.border
        self.border = None if border is None else _array(border.coefficients)  # (P, C, K)
        self.alpha = None if border is None or border.alpha is None else _array(border.alpha)  # (C, K)

    def by_pixel(self, x: str, channel_axes: tuple[int, ...], output: str) -> str:
        """Codes of x's own shape, uint8: one border per channel, or none.

        Args:
            x: the value.
            channel_axes: shape in which a number per channel meets x, such as (1, -1, 1, 1).
            output: name of the codes.
        """
        thresholds = thresholds_of(self.border, self.scale, self.spec)
        if thresholds is not None:
            return self._count(x, thresholds, channel_axes, output)
        t = self._in_steps(x)
        if self.border is None:
            return self._codes(t, self._half(), output)
        coefficients = self.border.reshape(len(self.border), *channel_axes)  # (P, 1, C, 1, 1)
        return self._codes(t, self._border(t, coefficients), output)

    def by_position(self, x: str, window: Window, size: tuple[int, int], output: str) -> str:
        """Codes of all im2col slots, uint8 (N, C K, H_out, W_out); a padded slot's code is z.

        Args:
            x: (N, C, H, W).
            window: geometry of im2col.
            size: (H, W).
            output: name of the codes.
        """
        assert self.border is not None
        add, constant = self.graph.add, self.graph.constant
        channels, positions = self.border.shape[1:]
        coefficients = self.border[:, None, :, :, None, None]  # (P, 1, C, K, 1, 1)
        t = columns_of(self.graph, self._padded(self._in_steps(x), window), window)  # (N, C, K, H_out, W_out)
        fused = self.spec.fused  # B is then (N, C, 1, H_out, W_out)
        q = self._codes(t, self._mean_border(t, coefficients, positions) if fused else self._border(t, coefficients))
        inside = inside_of(window, size)  # (1, 1, K, H_out, W_out)
        if not inside.all():
            q = add("Where", [constant(inside, np.bool_), q, constant(self.spec.zero_point, np.uint8)])
        rows, columns = inside.shape[3:]
        return add("Reshape", [q, constant([0, channels * positions, rows, columns], np.int64)], output)

    def _in_steps(self, x: str) -> str:
        """t = x / s + z."""
        t = self.graph.add("Div", [x, self.graph.constant(self.scale)])
        return self.graph.add("Add", [t, self.graph.constant(self.spec.zero_point)]) if self.spec.zero_point else t

    def _padded(self, t: str, window: Window) -> str:
        """t with the t of 0 around it."""
        vertical, horizontal = window.padding
        if vertical == horizontal == 0:
            return t
        pads = self.graph.constant([0, 0, vertical, horizontal] * 2, np.int64)
        return self.graph.add("Pad", [t, pads, self.graph.constant(self.spec.zero_point)])

    def _half(self) -> str:
        return self.graph.constant(0.5)

    def _shift(self, t: str, coefficients: np.ndarray) -> str:
        """e: Eq. 8 and its bound; ``coefficients`` are (P, ...), whose rest meets t's shape."""
        add, constant = self.graph.add, self.graph.constant
        u = add("Mul", [self._clip(t, 0, self.spec.levels), constant(1.0 / self.spec.levels)])
        v = add("Mul", [u, constant(coefficients[-1])])
        for coefficient in coefficients[-2:0:-1]:
            v = add("Mul", [add("Add", [v, constant(coefficient)]), u])
        v = add("Add", [v, constant(coefficients[0])])
        if self.spec.bound == "steep":
            return self._sigmoid_minus_half(add("Mul", [v, constant(SCALE_OF_BOUND)]))
        if self.spec.bound == "stretched":
            return self._clip(add("Mul", [self._sigmoid_minus_half(v), constant(SCALE_OF_BOUND)]), -0.5, 0.5)
        return self._clip(v, -0.5, 0.5)

    def _sigmoid_minus_half(self, w: str) -> str:
        """The specification's rational form."""
        add, constant = self.graph.add, self.graph.constant
        w = self._clip(w, -SIGMOID_LIMIT, SIGMOID_LIMIT)
        z = add("Mul", [w, w])
        numerator = add("Add", [add("Mul", [z, constant(SIGMOID_P2)]), constant(SIGMOID_P1)])
        numerator = add("Mul", [add("Add", [add("Mul", [numerator, z]), constant(SIGMOID_P0)]), w])
        denominator = add("Add", [add("Mul", [z, constant(SIGMOID_Q2)]), constant(SIGMOID_Q1)])
        denominator = add("Add", [add("Mul", [denominator, z]), constant(1.0)])
        return add("Div", [numerator, denominator])

    def _border(self, t: str, coefficients: np.ndarray) -> str:
        """B = 1/2 + e."""
        return self.graph.add("Add", [self._shift(t, coefficients), self._half()])

    def _mean_border(self, t: str, coefficients: np.ndarray, positions: int) -> str:
        """Eq. 9's B: the sum runs over the positions in order."""
        add, constant = self.graph.add, self.graph.constant
        e = self._shift(t, coefficients)
        if self.alpha is not None:
            e = add("Mul", [e, constant(self.alpha[None, :, :, None, None])])
        axis = constant([2], np.int64)
        parts = [
            add("Slice", [e, constant([start], np.int64), constant([start + 1], np.int64), axis])
            for start in range(positions)
        ]
        total = parts[0]
        for part in parts[1:]:
            total = add("Add", [total, part])
        return add("Add", [add("Mul", [total, constant(1.0 / positions)]), self._half()])

    def _codes(self, t: str, border: str, output: str | None = None) -> str:
        """q = clip(ceil(t - B), 0, Q), uint8."""
        q = self._clip(self.graph.add("Ceil", [self.graph.add("Sub", [t, border])]), 0, self.spec.levels)
        return self.graph.add("Cast", [q], output, to=TensorProto.UINT8)

    def _count(self, x: str, thresholds: Thresholds, channel_axes: tuple[int, ...], output: str) -> str:
        """Codes as the number of thresholds below x."""
        add, constant = self.graph.add, self.graph.constant

        def above(level: np.ndarray) -> str:
            return add("Greater", [x, constant(level[0] if self.border is None else level.reshape(channel_axes))])

        terms = [above(level) for level in thresholds.levels]
        # Between a pair of exceptions the code is one more, as fp32 has it (see ``Thresholds``).
        terms += [add("Xor", [above(first), above(last)]) for first, last in thresholds.exceptions]
        count = add("Cast", [terms[0]], None if len(terms) > 1 else output, to=TensorProto.UINT8)
        for index, term in enumerate(terms[1:], 2):
            more = add("Cast", [term], to=TensorProto.UINT8)
            count = add("Add", [count, more], output if index == len(terms) else None)
        return count

    def _clip(self, value: str, low: float, high: float) -> str:
        return self.graph.add("Clip", [value, self.graph.constant(low), self.graph.constant(high)])


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()

"""The operators between the layers in ONNX, one entry for each of ``graph.OPERATORS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aquant_core.errors import OnnxExportError
from aquant_core.graph import LAYERS, QUANTIZE, Node
from aquant_core.onnx_graph import OnnxGraph

Shape = tuple[int, ...]


class OperatorWriter:
    """Writes a node that is neither a layer nor a mark.

    Attributes:
        graph: where to.
        constants: the network's tensors by node and kind.
        shapes: of every value, for one image.
    """

    def __init__(
        self, graph: OnnxGraph, constants: Mapping[str, Mapping[str, Tensor]], shapes: Mapping[str, Shape]
    ) -> None:
        self.graph, self.constants, self.shapes = graph, constants, shapes

    def write(self, node: Node, inputs: list[str], output: str) -> None:
        """Appends ``node`` with the value ``output``.

        Raises:
            OnnxExportError: ONNX has no operator for it.
        """
        _WRITERS[node.op](self, node, inputs, output)

    def refuse(self, node: Node, what: str) -> OnnxExportError:
        return OnnxExportError(
            f"{node.op} {node.name!r} {what}, for which ONNX has no operator.",
            "Use the checkpoint with aquant_core.load, or replace the operator in the network.",
        )

    def integers(self, values: Any) -> str:
        return self.graph.constant(values, np.int64)


def _plain(op: str, **attributes: str) -> Callable[[OperatorWriter, Node, list[str], str], None]:
    """An ONNX operator of the same meaning; its attributes by ours."""

    def write(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
        defaults = {"negative_slope": 0.01, "alpha": 1.0, "approximate": "none"}
        given = {theirs: node.attributes.get(ours, defaults.get(ours)) for theirs, ours in attributes.items()}
        writer.graph.add(op, inputs, output, **given)

    return write


def _fixed(op: str, **attributes: Any) -> Callable[[OperatorWriter, Node, list[str], str], None]:
    """An ONNX operator with attributes of its own."""

    def write(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:  # noqa: ARG001
        writer.graph.add(op, inputs, output, **attributes)

    return write


def _clip(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    low, high = (0.0, 6.0) if node.op == "relu6" else (node.attributes.get("min"), node.attributes.get("max"))
    bounds = ["" if bound is None else writer.graph.constant(bound) for bound in (low, high)]
    writer.graph.add("Clip", [*inputs, *bounds], output)


def _silu(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:  # noqa: ARG001
    writer.graph.add("Mul", [inputs[0], writer.graph.add("Sigmoid", inputs)], output)


def _binary(op: str) -> Callable[[OperatorWriter, Node, list[str], str], None]:
    def write(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
        constant = writer.constants.get(node.name, {}).get("constant")
        operands = inputs if constant is None else [*inputs, writer.graph.constant(constant.cpu().numpy())]
        writer.graph.add(op, operands, output)

    return write


def _batch_norm(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    held = writer.constants[node.name]
    mean = held["running_mean"]
    given = (held.get("weight", torch.ones_like(mean)), held.get("bias", torch.zeros_like(mean)), mean)
    tensors = [writer.graph.constant(tensor.cpu().numpy()) for tensor in (*given, held["running_var"])]
    writer.graph.add("BatchNormalization", [*inputs, *tensors], output, epsilon=node.attributes["eps"])


def _pool(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    attributes = node.attributes
    kernel = _pair(attributes["kernel_size"])
    pads = _pair(attributes.get("padding", 0))
    settings: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": _pair(attributes.get("stride") or kernel),
        "pads": pads * 2,
        "ceil_mode": int(attributes.get("ceil_mode", False)),
    }
    if node.op == "max_pool2d":
        writer.graph.add("MaxPool", inputs, output, dilations=_pair(attributes.get("dilation", 1)), **settings)
        return
    if attributes.get("divisor_override") is not None:
        raise writer.refuse(node, "divides by a number of its own (divisor_override)")
    counted = int(attributes.get("count_include_pad", True))
    writer.graph.add("AveragePool", inputs, output, count_include_pad=counted, **settings)


def _adaptive_pool(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    source, wanted = writer.shapes[node.inputs[0]][-2:], writer.shapes[node.name][-2:]
    if wanted == (1, 1):
        writer.graph.add("GlobalAveragePool", inputs, output)
        return
    if any(extent % count for extent, count in zip(source, wanted, strict=True)):
        raise writer.refuse(node, f"pools {source} to {wanted} by windows of unequal size")
    kernel = [extent // count for extent, count in zip(source, wanted, strict=True)]
    writer.graph.add("AveragePool", inputs, output, kernel_shape=kernel, strides=kernel)


def _mean(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    dims = [dim for dim in node.attributes["dims"] if dim is not None]
    if not dims:
        raise writer.refuse(node, "averages over the images of a batch")
    keep = int(node.attributes["keepdim"])
    writer.graph.add("ReduceMean", [*inputs, writer.integers(dims)], output, keepdims=keep)


def _reshape(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    """To the shape that is known, the first dimension being the batch's."""
    writer.graph.add("Reshape", [*inputs, writer.integers([0, *writer.shapes[node.name][1:]])], output)


def _permute(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    rank = len(writer.shapes[node.name])
    writer.graph.add("Transpose", inputs, output, perm=[dim % rank for dim in node.attributes["dims"]])


def _slice(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    dim, start, length = (node.attributes[key] for key in ("dim", "start", "length"))
    writer.graph.add("Slice", [*inputs, *(writer.integers([value]) for value in (start, start + length, dim))], output)


def _pad(writer: OperatorWriter, node: Node, inputs: list[str], output: str) -> None:
    left, right, top, bottom = node.attributes["pads"]
    writer.graph.add("Pad", [*inputs, writer.integers([0, 0, top, left, 0, 0, bottom, right])], output)


_WRITERS: dict[str, Callable[[OperatorWriter, Node, list[str], str], None]] = {
    "batch_norm": _batch_norm,
    "relu": _fixed("Relu"),
    "relu6": _clip,
    "leaky_relu": _plain("LeakyRelu", alpha="negative_slope"),
    "elu": _plain("Elu", alpha="alpha"),
    "gelu": _plain("Gelu", approximate="approximate"),
    "silu": _silu,
    "sigmoid": _fixed("Sigmoid"),
    "tanh": _fixed("Tanh"),
    "hardswish": _fixed("HardSwish"),
    "hardsigmoid": _fixed("HardSigmoid", alpha=1 / 6, beta=0.5),
    "clamp": _clip,
    "softmax": _plain("Softmax", axis="dim"),
    "max_pool2d": _pool,
    "avg_pool2d": _pool,
    "adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    "flatten": _reshape,
    "reshape": _reshape,
    "permute": _permute,
    "slice": _slice,
    "pad": _pad,
    "concat": _plain("Concat", axis="dim"),
    "add": _binary("Add"),
    "sub": _binary("Sub"),
    "mul": _binary("Mul"),
    "div": _binary("Div"),
}

WRITTEN = frozenset((*_WRITERS, *LAYERS, QUANTIZE))
"""Every operator that can be exported: all of ``graph.OPERATORS``."""


def _pair(value: Any) -> list[int]:
    first, second = value if isinstance(value, list | tuple) else (value, value)
    return [int(first), int(second)]

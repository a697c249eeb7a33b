"""Captures an ONNX file: each operator becomes one node of the graph, shape arithmetic is folded away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from aquant_core.errors import (
    CaptureMismatchError,
    ModelFormatError,
    NonFiniteError,
    UnsupportedOperatorError,
    memory_is_full,
)
from aquant_core.graph import INPUT, CapturedModel
from aquant_core.graph_builder import GraphBuilder, unsupported
from aquant_core.onnx_file import EXPORT_AGAIN, fixed_batch, only_input, read_onnx

_RUNTIME_IR_VERSION = 10
_UNARY = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "HardSwish": "hardswish", "Identity": "",
    "Dropout": "", "Cast": "",
}  # fmt: skip
_INCONSISTENT = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What reading a graph raises whose fields do not belong together."""

_BINARY = {"Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div"}


def capture_onnx(path: str | Path, example: Tensor) -> CapturedModel:
    """Captures the network of an ONNX file.

    Args:
        path: the file; its weights must be inside it.
        example: a batch of at least two images.

    Raises:
        ModelFormatError: not ONNX, damaged, or with external data.
        UnsupportedOperatorError: an operator, named, that no graph can hold.
        CaptureMismatchError: the graph does not reproduce onnxruntime's outputs.
    """
    model = read_onnx(path)
    try:
        captured = _Conversion(model, example).run()
    except _INCONSISTENT as error:
        if memory_is_full(error):
            raise
        raise ModelFormatError(f"The ONNX graph contradicts itself: {error}.", EXPORT_AGAIN) from error
    _compare_with_onnxruntime(model, captured, example)
    return captured


def _compare_with_onnxruntime(model: onnx.ModelProto, captured: CapturedModel, example: Tensor) -> None:
    """The captured graph must give what ONNX itself gives, before anything is quantized."""
    import onnxruntime

    # onnx may write a newer IR version than onnxruntime reads; the operators decide, not the envelope.
    runnable = onnx.ModelProto()
    runnable.CopyFrom(model)
    runnable.ir_version = min(model.ir_version, _RUNTIME_IR_VERSION)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = only_input(model)
    batch = fixed_batch(model) or len(example)
    images = example.repeat(-(-batch // len(example)), 1, 1, 1)[:batch]
    try:
        session = onnxruntime.InferenceSession(
            runnable.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (expected,) = session.run(None, {source.name: images.numpy()})
    except Exception as error:  # onnxruntime's errors share no base class
        raise ModelFormatError(f"onnxruntime refuses the model: {str(error).splitlines()[0]}", EXPORT_AGAIN) from error
    if not np.isfinite(expected).all():
        raise NonFiniteError("The float network gives NaN or infinity.", "Check its weights and the images' scaling.")
    actual = captured(images).numpy()
    scale = float(np.abs(expected).max()) or 1.0
    with np.errstate(over="ignore"):
        difference = (
            float(np.abs(actual.reshape(expected.shape) - expected).max()) if actual.size == expected.size else scale
        )
    if not difference <= 1e-3 * scale:
        raise CaptureMismatchError(
            f"The captured graph differs from the ONNX model by {difference:.3g} (of up to {scale:.3g}).",
            "Please report the model's operators; it cannot be quantized as it is.",
        )


class _Conversion:
    """One pass over the nodes; ``static`` holds what the images do not change, ``names`` the graph values."""

    def __init__(self, model: onnx.ModelProto, example: Tensor) -> None:
        self.model = model
        self.opset = list(model.opset_import)
        self.builder = GraphBuilder(example)
        self.names: dict[str, str] = {only_input(model).name: INPUT}
        self.static: dict[str, np.ndarray] = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.parameters = {t.name for t in model.graph.initializer}
        self.readers = Counter(name for node in model.graph.node for name in node.input)
        self.readers.update(value.name for value in model.graph.output)

    def run(self) -> CapturedModel:
        for index, node in enumerate(self.model.graph.node):
            where = node.name or f"{node.op_type}_{index}"
            if node.domain not in ("", "ai.onnx"):
                raise unsupported(f"{node.domain}.{node.op_type}", where)
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if any(isinstance(v, (onnx.GraphProto, onnx.SparseTensorProto)) for v in attributes.values()):
                raise unsupported(f"{node.op_type} (with a subgraph)", where)
            unknown = [name for name in node.input if name and name not in self.names and name not in self.static]
            if unknown:
                raise ModelFormatError(f"Node {where!r} takes {unknown[0]!r}, which nothing produces.", EXPORT_AGAIN)
            if node.op_type == "Shape":
                self._shape(node, attributes)
            elif not any(name in self.names for name in node.input):
                self._fold(node)
            else:
                self._convert(node, where, attributes)
        output = self.model.graph.output[0].name
        if output not in self.names:
            raise UnsupportedOperatorError("The output does not depend on the input.", "Check the exported graph.")
        return self.builder.finish(self.names[output])

    def _shape(self, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
        source = node.input[0]
        shape = self._example_of(source).shape if source in self.names else self.static[source].shape
        self.static[node.output[0]] = np.array(shape[attributes.get("start", 0) : attributes.get("end")], np.int64)

    def _fold(self, node: onnx.NodeProto) -> None:
        """A node over constants alone: its value, by ONNX's own reference implementation."""
        values = {name: self.static[name] for name in node.input if name}
        inputs = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in values.items()]  # fmt: skip # noqa: E501
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in node.output]
        graph = onnx.helper.make_graph([node], "constant", inputs, outputs)
        with np.errstate(all="ignore"):  # what is not finite is refused where it becomes a weight
            results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=self.opset)).run(None, values)
        self.static.update({name: np.asarray(value) for name, value in zip(node.output, results, strict=True)})

    def _example_of(self, name: str) -> Tensor:
        return self.builder.values[self.names[name]]

    def _constant(self, node: onnx.NodeProto, index: int, where: str) -> np.ndarray | None:
        """The constant input at ``index``; None where the input is left out."""
        if index >= len(node.input) or not node.input[index]:
            return None
        if node.input[index] not in self.static:
            raise unsupported(f"{node.op_type} with a computed {node.input[index]!r}", where)
        return self.static[node.input[index]]

    def _convert(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> None:
        special: dict[str, Callable[[onnx.NodeProto, str, dict[str, Any]], list[str]]] = {
            "Conv": self._conv, "Gemm": self._gemm, "MatMul": self._matmul,
            "BatchNormalization": self._batch_norm,
            "MaxPool": self._pool, "AveragePool": self._pool, "Reshape": self._reshape, "Split": self._split,
            "Concat": self._concat, "Slice": self._slice, "Pad": self._pad,
            "ReduceMean": self._reduce_mean, "Clip": self._clip, "Squeeze": self._reshape_like,
            "Unsqueeze": self._reshape_like,
        }  # fmt: skip
        if node.op_type in special:
            results = special[node.op_type](node, where, attributes)
        elif node.op_type in _BINARY:
            results = [self._binary(node, where)]
        else:
            results = [self._simple(node, where, attributes)]
        self.names.update(zip(node.output, results, strict=False))

    def _simple(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> str:
        kind = node.op_type
        if node.input[0] not in self.names:
            raise unsupported(f"{kind} of a constant", where)
        source = self.names[node.input[0]]
        if kind in _UNARY:
            if kind == "Cast" and attributes["to"] != onnx.TensorProto.FLOAT:
                raise unsupported("Cast to another type than float", where)
            return self.builder.add(_UNARY[kind], where, [source]) if _UNARY[kind] else source
        rank = self.builder.values[source].dim()
        table: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
            "LeakyRelu": lambda: ("leaky_relu", {"negative_slope": attributes.get("alpha", 0.01)}),
            "Elu": lambda: ("elu", {"alpha": attributes.get("alpha", 1.0)}),
            "Gelu": lambda: ("gelu", {"approximate": attributes.get("approximate", b"none").decode()}),
            "Softmax": lambda: ("softmax", {"dim": attributes.get("axis", -1)}),
            "GlobalAveragePool": lambda: ("adaptive_avg_pool2d", {"output_size": [1, 1]}),
            "Flatten": lambda: ("flatten", {"start_dim": attributes.get("axis", 1)}),
            "Transpose": lambda: ("permute", {"dims": list(attributes.get("perm", range(rank)[::-1]))}),
        }
        if kind == "HardSigmoid":
            alpha, beta = attributes.get("alpha", 0.2), attributes.get("beta", 0.5)
            if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
                return self.builder.add("hardsigmoid", where, [source])
            raise unsupported(f"HardSigmoid with alpha {alpha}", where)
        if kind not in table:
            raise unsupported(kind, where)
        op, settings = table[kind]()
        return self.builder.add(op, where, [source], settings)

    def _layer_name(self, node: onnx.NodeProto, where: str) -> str:
        """A layer is named by its weight where the exporter kept the module's path, else by its node."""
        weight = node.input[1] if node.input[1] in self.parameters else ""
        if weight.endswith(".weight") and "::" not in weight:
            return weight.removesuffix(".weight")
        return where

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array, dtype=np.float32))

    def _conv(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        weight, bias = self._constant(node, 1, where), self._constant(node, 2, where)
        assert weight is not None
        if weight.ndim != 4:
            raise unsupported(f"Conv over {weight.ndim - 2} dimensions", where)
        kernel = weight.shape[2:]
        dilation = list(attributes.get("dilations", [1, 1]))
        stride = list(attributes.get("strides", [1, 1]))
        source = self.names[node.input[0]]
        top, left, bottom, right = self._pads(attributes, source, kernel, stride, dilation)
        if (top, left) != (bottom, right):
            source = self.builder.add("pad", f"{where}.pad", [source], {"pads": [left, right, top, bottom]})
            top = left = 0
        settings = {
            "stride": stride,
            "padding": [top, left],
            "dilation": dilation,
            "groups": attributes.get("group", 1),
        }
        weights = {"weight": self._tensor(weight)} | ({} if bias is None else {"bias": self._tensor(bias)})
        return [self.builder.add("conv2d", self._layer_name(node, where), [source], settings, weights)]

    def _pads(
        self, attributes: dict[str, Any], source: str, kernel: Any, stride: list[int], dilation: list[int]
    ) -> tuple[int, int, int, int]:
        mode = attributes.get("auto_pad", b"NOTSET").decode()
        if mode == "NOTSET":
            top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
            return top, left, bottom, right
        if mode == "VALID":
            return 0, 0, 0, 0
        before, after = [], []
        for axis, extent in enumerate(self.builder.values[source].shape[2:]):
            span = dilation[axis] * (kernel[axis] - 1) + 1
            total = max((-(-extent // stride[axis]) - 1) * stride[axis] + span - extent, 0)
            small = total // 2
            before.append(small if mode == "SAME_UPPER" else total - small)
            after.append(total - before[-1])
        return before[0], before[1], after[0], after[1]

    def _linear(self, node: onnx.NodeProto, where: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        weights = {"weight": self._tensor(weight)} | ({} if bias is None else {"bias": self._tensor(bias).reshape(-1)})
        if bias is not None and bias.size != weight.shape[0]:
            weights["bias"] = weights["bias"].expand(weight.shape[0])
        return self.builder.add("linear", self._layer_name(node, where), [self.names[node.input[0]]], {}, weights)

    def _gemm(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        weight, bias = self._constant(node, 1, where), self._constant(node, 2, where)
        assert weight is not None
        if attributes.get("transA", 0) or node.input[0] not in self.names:
            raise unsupported("Gemm with transA", where)
        weight = weight if attributes.get("transB", 0) else weight.T
        bias = None if bias is None else bias * np.float32(attributes.get("beta", 1.0))
        return [self._linear(node, where, weight * np.float32(attributes.get("alpha", 1.0)), bias)]

    def _matmul(self, node: onnx.NodeProto, where: str, _: dict[str, Any]) -> list[str]:
        weight = self._constant(node, 1, where)
        if weight is None or weight.ndim != 2:
            raise unsupported("MatMul without a constant matrix on the right", where)
        return [self._linear(node, where, weight.T, None)]

    def _batch_norm(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        kinds = ("weight", "bias", "running_mean", "running_var")
        arrays = {kind: self._constant(node, index, where) for index, kind in enumerate(kinds, 1)}
        weights = {kind: self._tensor(array) for kind, array in arrays.items() if array is not None}
        settings = {"eps": attributes.get("epsilon", 1e-5)}
        return [self.builder.add("batch_norm", where, [self.names[node.input[0]]], settings, weights)]

    def _pool(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        kernel, source = list(attributes["kernel_shape"]), self.names[node.input[0]]
        stride, dilation = list(attributes.get("strides", [1, 1])), list(attributes.get("dilations", [1, 1]))
        if len(kernel) != 2:
            raise unsupported(f"{node.op_type} over {len(kernel)} dimensions", where)
        top, left, bottom, right = self._pads(attributes, source, kernel, stride, dilation)
        settings: dict[str, Any] = {
            "kernel_size": kernel, "stride": stride, "ceil_mode": bool(attributes.get("ceil_mode", 0)),
        }  # fmt: skip
        if node.op_type == "AveragePool":
            if (top, left) != (bottom, right) or dilation != [1, 1]:
                raise unsupported("AveragePool with uneven padding or dilation", where)
            settings |= {
                "padding": [top, left],
                "count_include_pad": bool(attributes.get("count_include_pad", 0)),
            }
            return [self.builder.add("avg_pool2d", where, [source], settings)]
        if (top, left) != (bottom, right):
            raise unsupported("MaxPool with uneven padding", where)
        settings |= {"padding": [top, left], "dilation": dilation}
        return [self.builder.add("max_pool2d", where, [source], settings)]

    def _reshape(self, node: onnx.NodeProto, where: str, _: dict[str, Any]) -> list[str]:
        shape = self._constant(node, 1, where)
        assert shape is not None
        source = self.names[node.input[0]]
        example = self.builder.values[source]
        sizes = [example.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)]
        if sizes[0] == fixed_batch(self.model):
            sizes[0] = example.shape[0]
        return [self.builder.add_reshape(where, source, sizes)]

    def _reshape_like(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        axes = self._constant(node, 1, where)
        source = self.names[node.input[0]]
        wanted = sorted(int(a) for a in (attributes.get("axes", []) if axes is None else axes))
        value = self.builder.values[source]
        if node.op_type == "Squeeze":
            wanted = [a % value.dim() for a in wanted] or [a for a, size in enumerate(value.shape) if a and size == 1]
            shape = [size for axis, size in enumerate(value.shape) if axis not in wanted]
        else:
            for axis in wanted:
                value = value.unsqueeze(axis)
            shape = list(value.shape)
        return [self.builder.add_reshape(where, source, shape)]

    def _split(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        source, dim = self.names[node.input[0]], attributes.get("axis", 0)
        extent = self.builder.values[source].shape[dim]
        sizes = attributes.get("split") or self._constant(node, 1, where)
        if sizes is None:
            chunk = -(-extent // len(node.output))
            sizes = [min(chunk, extent - chunk * index) for index in range(len(node.output))]
        results, start = [], 0
        for size in sizes:
            settings = {"dim": dim, "start": start, "length": int(size)}
            results.append(self.builder.add("slice", where, [source], settings))
            start += int(size)
        return results

    def _slice(self, node: onnx.NodeProto, where: str, _: dict[str, Any]) -> list[str]:
        starts, ends, axes, steps = (self._constant(node, index, where) for index in range(1, 5))
        if (
            starts is None
            or ends is None
            or axes is None
            or len(starts) != 1
            or (steps is not None and set(steps) != {1})
        ):
            raise unsupported("Slice over several axes or with a step", where)
        source, dim = self.names[node.input[0]], int(axes[0])
        start, end, _stride = slice(int(starts[0]), int(ends[0])).indices(self.builder.values[source].shape[dim])
        return [self.builder.add("slice", where, [source], {"dim": dim, "start": start, "length": end - start})]

    def _pad(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        pads, value = self._constant(node, 1, where), self._constant(node, 2, where)
        mode = attributes.get("mode", b"constant").decode()
        if (
            pads is None
            or len(pads) != 8
            or any(pads[[0, 1, 4, 5]])
            or mode != "constant"
            or (value is not None and value != 0)
        ):
            raise unsupported("Pad other than with zeros around the image", where)
        settings = {"pads": [int(pads[3]), int(pads[7]), int(pads[2]), int(pads[6])]}
        return [self.builder.add("pad", where, [self.names[node.input[0]]], settings)]

    def _concat(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        if not all(name in self.names for name in node.input):
            raise unsupported("Concat with a constant", where)
        return [self.builder.add("concat", where, [self.names[n] for n in node.input], {"dim": attributes["axis"]})]

    def _reduce_mean(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        axes = attributes.get("axes") if "axes" in attributes else self._constant(node, 1, where)
        if axes is None:
            raise unsupported("ReduceMean over all axes", where)
        settings = {"dims": [int(axis) for axis in axes], "keepdim": bool(attributes.get("keepdims", 1))}
        return [self.builder.add("mean", where, [self.names[node.input[0]]], settings)]

    def _clip(self, node: onnx.NodeProto, where: str, attributes: dict[str, Any]) -> list[str]:
        low, high = self._constant(node, 1, where), self._constant(node, 2, where)
        minimum = attributes.get("min") if low is None else float(low)
        maximum = attributes.get("max") if high is None else float(high)
        source = self.names[node.input[0]]
        if (minimum, maximum) == (0.0, 6.0):
            return [self.builder.add("relu6", where, [source])]
        bounds = {key: value for key, value in (("min", minimum), ("max", maximum)) if value is not None}
        return [self.builder.add("clamp", where, [source], bounds) if bounds else source]

    def _binary(self, node: onnx.NodeProto, where: str) -> str:
        op = _BINARY[node.op_type]
        left, right = node.input
        if left in self.names and right in self.names:
            return self.builder.add(op, where, [self.names[left], self.names[right]])
        if left not in self.names:
            if op not in ("add", "mul"):
                raise unsupported(f"{node.op_type} with a constant on the left", where)
            left, right = right, left
        constant = self._tensor(self.static[right])
        last = self.builder.nodes[-1] if self.builder.nodes else None
        if (
            op == "add"
            and last is not None
            and last.op == "linear"
            and self.names[left] == last.name
            and self.readers[left] == 1
            and list(self.names.values()).count(last.name) == 1  # not read under another name either
            and "bias" not in self.builder.weights[last.name]
            and constant.numel() == self.builder.weights[last.name]["weight"].shape[0]
        ):  # MatMul followed by Add is one linear layer with a bias
            self.builder.nodes.pop()
            weights = self.builder.weights.pop(last.name) | {"bias": constant.reshape(-1)}
            del self.builder.values[last.name]
            return self.builder.add("linear", last.name, last.inputs, {}, weights)
        return self.builder.add(op, where, [self.names[left]], {}, {"constant": constant})

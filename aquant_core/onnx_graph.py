"""Writes ONNX node by node: names, constants kept once, weight codes packed at their width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aquant_core.encoding import pack_codes
from aquant_core.errors import OnnxExportError

OPSET, OPSET_OF_TWO_BITS = 21, 25
"""The operator set written, and the one that has UINT2."""

LARGEST_BYTES = 2**31 - 2**20
"""Of all tensors: a protobuf message ends at 2 GiB."""

_IR_OF_OPSET = {OPSET: 10, OPSET_OF_TWO_BITS: 13}
_PACKED_TYPES = {2: TensorProto.UINT2, 4: TensorProto.UINT4, 8: TensorProto.UINT8}


class OnnxGraph:
    """An ONNX graph under construction.

    Values that stand for a node of the network bear its name; those in between have a "/" in theirs, which no node's
    name has.
    """

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._opset = OPSET

    def add(self, op: str, inputs: Sequence[str], output: str | None = None, **attributes: Any) -> str:
        """Appends an operator with one output; returns the name of its value."""
        name = output or f"{op}/{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def add_second(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Appends an operator of two outputs, of which the second is wanted; returns the name of its value."""
        name = f"{op}/{len(self._nodes)}"
        self._nodes.append(helper.make_node(op, list(inputs), [f"{name}/first", name], name, **attributes))
        return name

    def constant(self, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """A constant by its value; equal ones are kept once."""
        array = np.ascontiguousarray(np.asarray(values, dtype))  # makes a scalar one of shape (1,)
        array = array.reshape(np.shape(values))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant/{len(self._constants)}"
            self._initializers.append(numpy_helper.from_array(array, name))
            self._constants[key] = name
        return self._constants[key]

    def packed(self, name: str, codes: np.ndarray, bits: int) -> str:
        """Codes below 2^bits at the narrowest width that ONNX has a type for: 2, 4 or 8 bits."""
        width = next(width for width in (2, 4, 8) if bits <= width)
        self._opset = max(self._opset, OPSET_OF_TWO_BITS if width == 2 else OPSET)
        raw = pack_codes(codes, width).tobytes()
        self._initializers.append(helper.make_tensor(name, _PACKED_TYPES[width], codes.shape, raw, raw=True))
        return name

    def model(
        self, inputs: Mapping[str, Sequence[int | str]], outputs: Mapping[str, Sequence[int | str]], about: str
    ) -> onnx.ModelProto:
        """The finished model; inputs and outputs are fp32, by name and shape.

        Raises:
            OnnxExportError: it is larger than an ONNX file can be.
        """
        sources, results = (
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)) for name, shape in values.items()]
            for values in (inputs, outputs)
        )
        size = sum(len(tensor.raw_data) for tensor in self._initializers)
        if size > LARGEST_BYTES:
            raise OnnxExportError(
                f"The network's tensors take {size} bytes; an ONNX file holds at most {LARGEST_BYTES}.",
                "Use the checkpoint with aquant_core.load.",
            )
        graph = helper.make_graph(self._nodes, "aquant", sources, results, self._initializers, about)
        opset = helper.make_opsetid("", self._opset)
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=_IR_OF_OPSET[self._opset], producer_name="aquant"
        )

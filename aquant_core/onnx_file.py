"""Reads an ONNX file, and what can be told of it before any of it is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from aquant_core.errors import ModelFormatError, UnsupportedOperatorError

EXPORT_AGAIN = "Export the model again (torch.onnx.export, evaluation mode, weights inside: external_data=False)."
_MAX_NODES = 5_000
_MAX_BATCH = 4_096


def onnx_input_shape(path: str | Path) -> tuple[int | None, ...]:
    """(C, H, W) that the file's only input declares; None for a free dimension."""
    return _shape_of_input(only_input(read_onnx(path)))


def read_onnx(path: str | Path) -> onnx.ModelProto:
    """The file's contents.

    Raises:
        ModelFormatError: not ONNX, damaged, without a graph, with too many nodes, or with external data.
    """
    try:
        model = onnx.load(str(path), format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ModelFormatError(f"The file is not ONNX, or is cut off: {error}.", EXPORT_AGAIN) from error
    if not model.graph.node or not model.opset_import:
        raise ModelFormatError("The file holds no ONNX graph.", EXPORT_AGAIN)
    if len(model.graph.node) > _MAX_NODES:
        raise ModelFormatError(
            f"The graph has {len(model.graph.node)} nodes; at most {_MAX_NODES} are read.", EXPORT_AGAIN
        )
    nodes = [node for function in model.functions for node in function.node]
    for tensor in (*_tensors_of(model.graph), *_tensors_of_nodes(nodes)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            raise ModelFormatError(f"Weight {tensor.name!r} is kept outside the file (external data).", EXPORT_AGAIN)
    return model


def _tensors_of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that is written down in a graph, and in those within it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
                yield from _tensors_of(graph)


def only_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The network's one input, of float32.

    Raises:
        UnsupportedOperatorError: it has several, or several outputs.
        ModelFormatError: it is of another type.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise UnsupportedOperatorError(
            f"The network has {len(inputs)} inputs and {len(model.graph.output)} outputs.",
            "Give it one image batch and one output.",
        )
    only: onnx.ValueInfoProto = inputs[0]
    kind = only.type.tensor_type.elem_type
    if kind != onnx.TensorProto.FLOAT:
        name = next(
            (name for name, known in onnx.TensorProto.DataType.items() if known == kind), f"type {kind}"
        ).lower()
        raise ModelFormatError(f"Input {only.name!r} is {name}.", "float32 is needed: export the float32 model.")
    return only


def _shape_of_input(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4:
        raise UnsupportedOperatorError(
            f"Input {value.name!r} has {len(dims)} dimensions.",
            "Networks over (N, C, H, W) images are supported.",
        )
    return tuple(dim.dim_value or None for dim in dims[1:])


def fixed_batch(model: onnx.ModelProto) -> int:
    """The batch size that the network was exported for; 0 where it is free or the input has no shape."""
    dims = only_input(model).type.tensor_type.shape.dim
    batch = int(dims[0].dim_value) if dims else 0
    if not 0 <= batch <= _MAX_BATCH:
        raise ModelFormatError(
            f"The network is for batches of {batch} images; up to {_MAX_BATCH} are run.", EXPORT_AGAIN
        )
    return batch

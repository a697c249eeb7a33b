"""A quantized network as ONNX, with standard operators alone (docs/export.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import nn

from aquant_core.graph import INPUT, LAYERS, OPERATORS, QUANTIZE, CapturedModel, Node, evaluate_nodes
from aquant_core.model import QuantizedModel
from aquant_core.onnx_graph import OnnxGraph
from aquant_core.onnx_layers import Codes, LayerWriter
from aquant_core.onnx_operators import OperatorWriter, Shape

OUTPUT = "logits"
"""Name of the output; the input is ``graph.INPUT``."""


def write_onnx(model: nn.Module, path: str | Path, tell: Callable[[int, int], None] | None = None) -> None:
    """Writes a quantized network as ONNX, through a neighbouring temporary file.

    Args:
        model: what ``aquant_core.load`` or ``quantize`` returns.
        path: where to.
        tell: called with how many of the network's nodes are written, and how many there are.

    Raises:
        OnnxExportError: the network has something that standard operators cannot express; it is named.
    """
    path = Path(path)
    content = onnx_model(model, tell).SerializeToString(deterministic=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def onnx_model(model: nn.Module, tell: Callable[[int, int], None] | None = None) -> onnx.ModelProto:
    """The quantized network as ONNX: from ``input`` (N, C, H, W) to ``logits``, N being free.

    The value of each node bears its name; the codes of each quantized value, uint8, that of the layer or mark with
    ``.codes`` behind it.

    Args:
        model, tell: see ``write_onnx``.

    Raises:
        OnnxExportError: see ``write_onnx``.
        TypeError: no quantized network.
    """
    if not isinstance(model, QuantizedModel):
        raise TypeError(f"only what aquant_core.load returns can be exported, not a {type(model).__name__}")
    graph = OnnxGraph()
    shapes = _shapes(model.graph)
    layers, operators = LayerWriter(graph), OperatorWriter(graph, model.constants, shapes)
    values = {INPUT: INPUT}
    codes: dict[str, Codes] = {}  # of marked values
    for written, node in enumerate(model.graph.nodes):
        if tell is not None:
            tell(written, len(model.graph.nodes))
        inputs = [values[name] for name in node.inputs]
        values[node.name] = output = _value_name(node, model.graph)
        if node.op in LAYERS:
            layer = model.layers[node.name]
            size = shapes[node.inputs[0]][-2:]
            layers.layer(node.name, layer, inputs[0], codes.get(node.inputs[0]), (size[0], size[1]), output)
        elif node.op == QUANTIZE:
            if model.quantizers[node.name].activation_scale is None:
                values[node.name] = inputs[0]
                continue
            codes[node.name] = layers.mark(node.name, model.quantizers[node.name], inputs[0])
            codes[node.name].values(graph, output)
        else:
            operators.write(node, inputs, output)
    if values[model.graph.output] != OUTPUT:
        graph.add("Identity", [values[model.graph.output]], OUTPUT)
    image, logits = shapes[INPUT][1:], shapes[model.graph.output][1:]
    about = "A network quantized with AQuant; see docs/export.md."
    return graph.model({INPUT: ["N", *image]}, {OUTPUT: ["N", *logits]}, about)


def _value_name(node: Node, graph: CapturedModel) -> str:
    if node.name == graph.output:
        return OUTPUT if node.op != QUANTIZE else node.name
    return f"{node.name}/value" if node.name == OUTPUT else node.name


def _shapes(graph: CapturedModel) -> dict[str, Shape]:
    """Of every value for one image, by running the graph without computing."""
    shapes: dict[str, Shape] = {}
    image = torch.empty(1, *(extent or 0 for extent in graph.input_shape), device="meta")
    weights = {name: {kind: t.to("meta") for kind, t in kinds.items()} for name, kinds in graph.weights.items()}

    def run(node: Node, inputs: list[torch.Tensor]) -> torch.Tensor:
        value = OPERATORS[node.op](node.attributes, weights.get(node.name, {}), *inputs)
        shapes[node.name] = tuple(value.shape)
        return value

    shapes[INPUT] = tuple(image.shape)
    evaluate_nodes(graph.nodes, {INPUT: image}, run)
    return shapes

"""A network with quantized layers: the graph of its float twin, a ``QuantizedLayer`` in place of each layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aquant_core.config import FLOAT_BITS, QuantizationConfig
from aquant_core.graph import INPUT, LAYERS, OPERATORS, QUANTIZE, CapturedModel, Node, evaluate_nodes
from aquant_core.images import named_if_unfit
from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.methods import MethodSettings, Placement
from aquant_core.partition import Block
from aquant_core.placement import layer_before, layers_behind, mark_outputs, mark_shortcuts, reads_images
from aquant_core.quantizers import WeightRounding, search_activation_grid, search_weight_grid

CALIBRATED_ON = 256
"""Images over which the activations' first steps are searched (QDrop)."""


class QuantizedModel(nn.Module):
    """Runs a folded graph with quantized layers; (N, C, H, W) images to logits.

    Attributes:
        graph: the folded float network, with marks where values are quantized (see ``placement``).
        layers: its quantized layers by node name.
        quantizers: of marked values, by the mark's name.
    """

    def __init__(self, graph: CapturedModel) -> None:
        super().__init__()
        self.graph = graph
        self.layers: dict[str, QuantizedLayer] = {}
        for index, node in enumerate(graph.layers):
            tensors = graph.weights[node.name]
            layer = QuantizedLayer(node.op, node.attributes, tensors["weight"], tensors.get("bias"))
            self.add_module(f"layer{index}", layer)  # a node's name may hold dots
            self.layers[node.name] = layer
        self.quantizers: dict[str, ActivationQuantizer] = {}
        for index, node in enumerate(node for node in graph.nodes if node.op == QUANTIZE):
            self.quantizers[node.name] = ActivationQuantizer()
            self.add_module(f"quantizer{index}", self.quantizers[node.name])
        self.constants = {name: dict(t) for name, t in graph.weights.items() if name not in self.layers}

    def run_node(self, node: Node, values: list[Tensor]) -> Tensor:
        """One node's value from its inputs' values."""
        if node.op in LAYERS:
            result: Tensor = self.layers[node.name](values[0])
            return result
        if node.op == QUANTIZE:
            quantized: Tensor = self.quantizers[node.name](values[0])
            return quantized
        constants = {kind: tensor.to(values[0].device) for kind, tensor in self.constants.get(node.name, {}).items()}
        return OPERATORS[node.op](node.attributes, constants, *values)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images to logits.

        Raises:
            ImageSetError: they are not what the network takes.
        """
        dtype = next((layer.float_weight.dtype for layer in self.layers.values()), None)
        with named_if_unfit(self.graph.input_shape, x, dtype):
            return evaluate_nodes(self.graph.nodes, {INPUT: x}, self.run_node)[self.graph.output]

    def run_block(self, block: Block, x: Tensor) -> Tensor:
        """The block's output for its input."""
        return evaluate_nodes(block.nodes, {block.input: x}, self.run_node)[block.output]

    def layers_of(self, block: Block) -> list[QuantizedLayer]:
        return [self.layers[node.name] for node in block.layers]

    def learned_in(self, block: Block) -> list[ActivationQuantizer]:
        """Layers and quantizers that are reconstructed with the block, in order."""
        parts = self.parts
        names = [node.name for node in block.nodes] if block.learned is None else block.learned
        return [parts[name] for name in names if name in parts]

    @property
    def parts(self) -> dict[str, ActivationQuantizer]:
        """Layers and quantizers by node name."""
        return {**self.layers, **self.quantizers}

    @property
    def quantizing(self) -> dict[str, ActivationQuantizer]:
        """Those of ``parts`` that quantize what they read, and do not leave it float."""
        return {name: part for name, part in self.parts.items() if part.activation_scale is not None}

    @property
    def device(self) -> torch.device:
        return next(iter(self.layers.values())).float_weight.device


def run_float_block(graph: CapturedModel, block: Block, x: Tensor) -> Tensor:
    """The float block's output for its input."""
    return evaluate_nodes(block.nodes, {block.input: x}, graph.run_node)[block.output]


def marked(graph: CapturedModel, config: QuantizationConfig, method: MethodSettings) -> CapturedModel:
    """The folded float network with marks where the method, or the protocol's shortcut, quantizes values."""
    widths = [width for _, width in bits_of_layers(graph, config).values()]
    if method.placement == "output":
        quantized = any(width != FLOAT_BITS for width in widths)
        return mark_outputs(graph, model_input=widths[0] != FLOAT_BITS) if quantized else graph
    quantized = config.activation_bits != FLOAT_BITS and config.resolved_protocol.shortcut == "low"
    return mark_shortcuts(graph) if quantized else graph


def bits_of_layers(graph: CapturedModel, config: QuantizationConfig) -> dict[str, tuple[int, int]]:
    """Weight and input bits by layer: the network's, what the protocol keeps at more, then the overrides."""
    protocol, names = config.resolved_protocol, [node.name for node in graph.layers]
    first, last = names[0], names[-1]
    by_name = {node.name: node for node in graph.nodes}
    bits = {}
    for node in graph.layers:
        weight, activation, name = config.weight_bits, config.activation_bits, node.name
        of_images = reads_images(by_name, node.inputs[0])
        high_weight = name in (first, last) and protocol.first_last_weights == "high"
        high_input = (
            (of_images and protocol.model_input == "high")
            or (name == last and protocol.last_layer_input == "high")
            or (protocol.second_layer_input == "high" and layer_before(by_name, node.inputs[0]) == first)
        )
        if high_weight and weight != FLOAT_BITS:
            weight = config.first_last_bits
        if high_input and activation != FLOAT_BITS:
            activation = config.first_last_bits
        if of_images and protocol.model_input == "float":
            activation = FLOAT_BITS
        override = config.layers.get(name)
        if override is not None:
            weight = override.weight_bits or weight
            activation = override.activation_bits or activation
        bits[name] = (weight, activation)
    return bits


def bits_of_marks(graph: CapturedModel, bits: dict[str, tuple[int, int]], config: QuantizationConfig) -> dict[str, int]:
    """A marked value has the most bits of the layers that read it. A shortcut, which none reads, has the network's, or
    what the layers beside it have if that is more: where outputs are quantized both are one value.
    """
    result = {}
    for mark in (node for node in graph.nodes if node.op == QUANTIZE):
        read_at = [bits[name][1] for name in layers_behind(graph, mark)]
        beside = [bits[node.name][1] for node in graph.layers if node.inputs[0] == mark.inputs[0]]
        result[mark.name] = max(read_at or [config.activation_bits, *beside])
    return result


@torch.no_grad()
def search_weights(graph: CapturedModel, config: QuantizationConfig) -> dict[str, WeightRounding]:
    """Every weight that is quantized, rounded to nearest on the grid of least error, by layer."""
    found = {}
    for name, (bits, _) in bits_of_layers(graph, config).items():
        if bits != FLOAT_BITS:
            weight = graph.weights[name]["weight"]
            found[name] = WeightRounding.nearest(weight, search_weight_grid(weight, bits))
    return found


@torch.no_grad()
def quantize_to_nearest(
    graph: CapturedModel,
    images: Tensor,
    config: QuantizationConfig,
    placement: Placement = "input",
    weights: dict[str, WeightRounding] | None = None,
) -> QuantizedModel:
    """Everything quantized with searched steps and rounding to nearest.

    Args:
        graph: the folded float network, marked where values are quantized.
        images: calibration images; the first ``CALIBRATED_ON`` are used.
        config: the bit widths.
        placement: whether layers quantize their inputs, or the marks do.
        weights: from ``search_weights``, if they have been searched; they are copied.
    """
    model = QuantizedModel(graph)
    quantize_nodes_to_nearest(model, graph.nodes, {INPUT: images}, config, placement, weights)
    return model


@torch.no_grad()
def quantize_nodes_to_nearest(
    model: QuantizedModel,
    nodes: Sequence[Node],
    values: dict[str, Tensor],
    config: QuantizationConfig,
    placement: Placement,
    weights: dict[str, WeightRounding] | None = None,
) -> None:
    """What ``quantize_to_nearest`` does with the whole network, for neighbouring nodes.

    Args:
        model: its layers and quantizers among the nodes are changed.
        nodes: of its graph, in order.
        values: what the nodes read of others, from the float network; the first ``CALIBRATED_ON`` images are used.
        config, placement, weights: as there.
    """
    graph = model.graph
    bits = bits_of_layers(graph, config)
    mark_bits = bits_of_marks(graph, bits, config)

    def quantize(part: ActivationQuantizer, value: Tensor, width: int) -> None:
        if width != FLOAT_BITS:
            part.quantize_activation(search_activation_grid(value, width), width, model.device)

    def run(node: Node, read: list[Tensor]) -> Tensor:
        if node.op in LAYERS:
            layer = model.layers[node.name]
            weight_bits, activation_bits = bits[node.name]
            if weight_bits != FLOAT_BITS:
                layer.weight_bits = weight_bits
                if weights is None:
                    grid = search_weight_grid(layer.float_weight, weight_bits)
                    layer.weight = WeightRounding.nearest(layer.float_weight, grid)
                else:
                    layer.weight = copy.deepcopy(weights[node.name])
            if placement == "input":
                quantize(layer, read[0], activation_bits)
        elif node.op == QUANTIZE:
            quantize(model.quantizers[node.name], read[0], mark_bits[node.name])
        return graph.run_node(node, read)

    start = {name: value[:CALIBRATED_ON].to(model.device) for name, value in values.items()}
    evaluate_nodes(nodes, start, run)

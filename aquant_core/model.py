"""A network with quantized layers: the graph of its float twin, a ``QuantizedLayer`` in place of each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from aquant_core.config import FLOAT_BITS, QuantizationConfig
from aquant_core.graph import INPUT, LAYERS, OPERATORS, CapturedModel, Node, evaluate_nodes
from aquant_core.layers import QuantizedLayer
from aquant_core.partition import Block
from aquant_core.quantizers import WeightRounding, search_activation_grid, search_weight_grid

CALIBRATED_ON = 256
"""Images over which the activations' first steps are searched (QDrop)."""


class QuantizedModel(nn.Module):
    """Runs a folded graph with quantized layers; (N, C, H, W) images to logits.

    Attributes:
        graph: the folded float network.
        layers: its quantized layers by node name.
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
        self.constants = {name: dict(t) for name, t in graph.weights.items() if name not in self.layers}

    def run_node(self, node: Node, values: list[Tensor]) -> Tensor:
        """One node's value from its inputs' values."""
        if node.op in LAYERS:
            result: Tensor = self.layers[node.name](values[0])
            return result
        constants = {kind: tensor.to(values[0].device) for kind, tensor in self.constants.get(node.name, {}).items()}
        return OPERATORS[node.op](node.attributes, constants, *values)

    def forward(self, x: Tensor) -> Tensor:
        return evaluate_nodes(self.graph.nodes, {INPUT: x}, self.run_node)[self.graph.output]

    def run_block(self, block: Block, x: Tensor) -> Tensor:
        """The block's output for its input."""
        return evaluate_nodes(block.nodes, {block.input: x}, self.run_node)[block.output]

    def layers_of(self, block: Block) -> list[QuantizedLayer]:
        return [self.layers[node.name] for node in block.layers]


def run_float_block(graph: CapturedModel, block: Block, x: Tensor) -> Tensor:
    """The float block's output for its input."""
    return evaluate_nodes(block.nodes, {block.input: x}, graph.run_node)[block.output]


def bits_of_layers(names: Iterable[str], config: QuantizationConfig) -> dict[str, tuple[int, int]]:
    """Weight and activation bits by layer: the network's, those of the first and last, then the overrides."""
    names = list(names)
    bits = {}
    for name in names:
        outer = name in (names[0], names[-1])
        weight, activation = (
            config.first_last_bits if outer and width != FLOAT_BITS else width
            for width in (config.weight_bits, config.activation_bits)
        )
        override = config.layers.get(name)
        if override is not None:
            weight = override.weight_bits or weight
            activation = override.activation_bits or activation
        bits[name] = (weight, activation)
    return bits


@torch.no_grad()
def quantize_to_nearest(graph: CapturedModel, images: Tensor, config: QuantizationConfig) -> QuantizedModel:
    """Every layer quantized with searched steps and rounding to nearest.

    Args:
        graph: the folded float network.
        images: calibration images; the first ``CALIBRATED_ON`` are used.
        config: the bit widths.
    """
    model = QuantizedModel(graph)
    bits = bits_of_layers(model.layers, config)

    def run(node: Node, values: list[Tensor]) -> Tensor:
        if node.op in LAYERS:
            layer = model.layers[node.name]
            weight_bits, activation_bits = bits[node.name]
            if weight_bits != FLOAT_BITS:
                grid = search_weight_grid(layer.float_weight, weight_bits)
                layer.weight, layer.weight_bits = (
                    WeightRounding.nearest(layer.float_weight, grid),
                    weight_bits,
                )
            if activation_bits != FLOAT_BITS:
                layer.quantize_activation(search_activation_grid(values[0], activation_bits), activation_bits)
        return graph.run_node(node, values)

    device = next(iter(model.layers.values())).float_weight.device
    evaluate_nodes(graph.nodes, {INPUT: images[:CALIBRATED_ON].to(device)}, run)
    return model

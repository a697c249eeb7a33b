"""Folds BatchNorm into the convolution or linear layer before it, in the graph."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from aquant_core.graph import INPUT, LAYERS, CapturedModel, Node


def fold_batch_norm(model: CapturedModel) -> CapturedModel:
    """A model without the BatchNorms that follow a layer nobody else reads; others stay.

    With gamma, beta, mean, variance of the norm: ``W' = W gamma / sqrt(variance + eps)`` per output channel,
    ``b' = (b - mean) gamma / sqrt(variance + eps) + beta``, computed in float64.
    """
    readers = Counter(name for node in model.nodes for name in node.inputs)
    by_name = {node.name: node for node in model.nodes}
    weights = dict(model.weights)
    replaced: dict[str, str] = {}
    nodes: list[Node] = []
    for node in model.nodes:
        inputs = tuple(replaced.get(name, name) for name in node.inputs)
        before = by_name.get(node.inputs[0]) if node.op == "batch_norm" else None
        if before is not None and before.op in LAYERS and readers[before.name] == 1 and node.inputs[0] != INPUT:
            weights[before.name] = _folded(weights[before.name], weights.pop(node.name), node.attributes["eps"])
            replaced[node.name] = before.name
        else:
            nodes.append(Node(node.name, node.op, inputs, node.attributes))
    return CapturedModel(nodes, weights, model.input_shape)


def _folded(layer: dict[str, Tensor], norm: dict[str, Tensor], eps: float) -> dict[str, Tensor]:
    weight, mean, variance = (
        layer["weight"].double(),
        norm["running_mean"].double(),
        norm["running_var"].double(),
    )
    factor = torch.rsqrt(variance + eps)
    if "weight" in norm:
        factor = factor * norm["weight"].double()
    bias = (layer["bias"].double() if "bias" in layer else 0.0) - mean
    bias = bias * factor + (norm["bias"].double() if "bias" in norm else 0.0)
    shape = (-1, *[1] * (weight.dim() - 1))
    return {"weight": (weight * factor.reshape(shape)).float(), "bias": bias.float()}

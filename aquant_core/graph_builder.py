"""Builds a graph node by node while it runs on an example, so that shapes are known, not guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aquant_core.errors import AQuantError, ModelFormatError, NonFiniteError, UnsupportedOperatorError, memory_is_full
from aquant_core.graph import INPUT, OPERATORS, CapturedModel, Node, without_dead_nodes


class GraphBuilder:
    """A graph under construction.

    Attributes:
        values: of every node so far, its output for the example.
    """

    def __init__(self, example: Tensor) -> None:
        if example.dim() != 4:
            raise ModelFormatError(
                f"The example must be a (N, C, H, W) batch of images, not of shape {tuple(example.shape)}.",
                "Give calibration images of shape (N, C, H, W).",
            )
        self.example = example
        self.nodes: list[Node] = []
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.values: dict[str, Tensor] = {INPUT: example}

    def add(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> str:
        """Appends a node and runs it; returns the unique name under which its value is known.

        Raises:
            NonFiniteError: a weight is NaN or infinite.
            ModelFormatError: the node does not fit the shape of its inputs.
        """
        if not all(isinstance(value, str) and value in self.values for value in inputs):
            raise UnsupportedOperatorError(
                f"{op} {name!r} takes a value that does not come from the images.",
                "Only networks that compute their output from one batch of images can be captured.",
            )
        name = self._unique(name)
        node = Node(name, op, tuple(inputs), dict(attributes or {}))
        held = {kind: tensor.detach().to("cpu", torch.float32).clone() for kind, tensor in (weights or {}).items()}
        for kind, tensor in held.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"Weight {name}.{kind} holds NaN or infinity.", "Train or export the model again.")
        try:
            with torch.inference_mode():
                self.values[name] = OPERATORS[op](node.attributes, held, *(self.values[i] for i in inputs))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if memory_is_full(error):
                raise
            shapes = [tuple(self.values[i].shape) for i in inputs]
            raise ModelFormatError(
                f"{op} {name!r} cannot take inputs of shape {shapes}: {str(error).splitlines()[0]}.",
                "Check that the images have the shape that the network expects, (N, C, H, W): channels first.",
            ) from error
        if held:
            self.weights[name] = held
        self.nodes.append(node)
        return name

    def add_reshape(self, name: str, source: str, shape: Sequence[int]) -> str:
        """A reshape to ``shape``, whose first dimension must stay the batch."""
        batch = self.example.shape[0]
        try:
            target = self.values[source].reshape(tuple(shape)).shape
        except (RuntimeError, TypeError) as error:
            if memory_is_full(error):
                raise
            raise ModelFormatError(
                f"reshape {name!r} cannot take inputs of shape {[tuple(self.values[source].shape)]}: {error}.",
                "Check that the images have the shape that the network expects, (N, C, H, W): channels first.",
            ) from error
        if target[0] != batch:
            raise UnsupportedOperatorError(
                f"Reshape {name!r} to {list(target)} mixes images of a batch (of {batch}).",
                "Only reshapes that keep the first dimension can be captured.",
            )
        return self.add("reshape", name, [source], {"shape": list(target[1:])})

    def finish(self, output: str) -> CapturedModel:
        """The captured model that ends in ``output``.

        Raises:
            UnsupportedOperatorError: the output is not one vector of logits an image, or nothing can be
                quantized.
        """
        value = self.values[output]
        if output == INPUT or value.dim() < 2 or value.shape[0] != self.example.shape[0]:
            raise UnsupportedOperatorError(
                f"The network's output has shape {tuple(value.shape)} for {self.example.shape[0]} images.",
                "Only networks that give one row of values for each image can be quantized.",
            )
        nodes = without_dead_nodes(self.nodes, output)
        kept = {node.name for node in nodes}
        channels, height, width = self.example.shape[1:]
        weights = {name: tensors for name, tensors in self.weights.items() if name in kept}
        model = CapturedModel(nodes, weights, (channels, height, width))
        if not model.layers:
            raise UnsupportedOperatorError(
                "The network has no convolution and no linear layer.", "There is nothing to quantize in it."
            )
        return model

    def _unique(self, name: str) -> str:
        name = name.replace("/", ".").strip(".") or "node"
        if name not in self.values:
            return name
        number = 1
        while f"{name}_{number}" in self.values:
            number += 1
        return f"{name}_{number}"


def unsupported(operator: str, where: str) -> AQuantError:
    """The error for an operator that no graph can hold."""
    return UnsupportedOperatorError(
        f"Operator {operator} at {where!r} is not supported.",
        "Supported: " + ", ".join(sorted(OPERATORS)) + ". Replace it, or quantize the part of the network before it.",
    )

"""The one form in which a network is held: a list of nodes, each an operator of a small set, and weights.

Every network, whether it came as a torch module, as a state dict or as ONNX, becomes a ``CapturedModel``. It
runs by interpreting its nodes, it can be written to one safetensors file, and nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquant_core.errors import ModelFormatError

INPUT = "input"
"""Name of the value that enters the graph."""

LAYERS = ("conv2d", "linear")
"""The operators whose weight and input are quantized."""

QUANTIZE = "quantize"
"""The operator that marks where a value itself is quantized (see ``placement``); float networks pass it on."""

_FORMAT = "aquant-graph/1"
_FORMAT_KEY = "graph"  # the header has this one key: several would be written in no fixed order


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        name: unique; for a node with weights, the path under which they are kept.
        op: a key of ``OPERATORS``.
        inputs: names of the nodes (or ``INPUT``) whose values it takes, in order.
        attributes: the operator's settings, plain JSON values.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    def document(self) -> list[Any]:
        return [self.name, self.op, list(self.inputs), self.attributes]


def _conv2d(attributes: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.conv2d(
        x,
        weights["weight"],
        weights.get("bias"),
        tuple(attributes["stride"]),
        tuple(attributes["padding"]),
        tuple(attributes["dilation"]),
        attributes["groups"],
    )


def _batch_norm(attributes: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    return F.batch_norm(
        x,
        weights["running_mean"],
        weights["running_var"],
        weights.get("weight"),
        weights.get("bias"),
        training=False,
        eps=attributes["eps"],
    )


def _pool(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(attributes: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:  # noqa: ARG001
        settings = {key: tuple(value) if isinstance(value, list) else value for key, value in attributes.items()}
        result: Tensor = function(x, **settings)
        return result

    return run


def _unary(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(attributes: Mapping[str, Any], weights: Mapping[str, Tensor], x: Tensor) -> Tensor:  # noqa: ARG001
        return function(x, **attributes)

    return run


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(attributes: Mapping[str, Any], weights: Mapping[str, Tensor], *values: Tensor) -> Tensor:  # noqa: ARG001
        operands = [*values, *([weights["constant"]] if "constant" in weights else [])]
        return function(operands[0], operands[1])

    return run


def _concat(attributes: Mapping[str, Any], weights: Mapping[str, Tensor], *values: Tensor) -> Tensor:  # noqa: ARG001
    return torch.cat(values, dim=attributes["dim"])


def _slice(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    return x.narrow(dim, start, length)


def _reshape(x: Tensor, shape: list[int]) -> Tensor:
    return x.reshape(x.shape[0], *shape)


def _mean(x: Tensor, dims: list[int], keepdim: bool) -> Tensor:
    return x.mean(dims, keepdim=keepdim)


def _pad(x: Tensor, pads: list[int]) -> Tensor:
    return F.pad(x, pads)


def _permute(x: Tensor, dims: list[int]) -> Tensor:
    return x.permute(dims)


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d,
    "linear": lambda _, weights, x: F.linear(x, weights["weight"], weights.get("bias")),
    "batch_norm": _batch_norm,
    "relu": _unary(F.relu),
    "relu6": _unary(F.relu6),
    "leaky_relu": _unary(F.leaky_relu),
    "elu": _unary(F.elu),
    "gelu": _unary(F.gelu),
    "silu": _unary(F.silu),
    "sigmoid": _unary(torch.sigmoid),
    "tanh": _unary(torch.tanh),
    "hardswish": _unary(F.hardswish),
    "hardsigmoid": _unary(F.hardsigmoid),
    "clamp": _unary(torch.clamp),
    "softmax": _unary(F.softmax),
    "max_pool2d": _pool(F.max_pool2d),
    "avg_pool2d": _pool(F.avg_pool2d),
    "adaptive_avg_pool2d": _pool(F.adaptive_avg_pool2d),
    "mean": _unary(_mean),
    "flatten": _unary(torch.flatten),
    "reshape": _unary(_reshape),
    "permute": _unary(_permute),
    "slice": _unary(_slice),
    "pad": _unary(_pad),
    "concat": _concat,
    "add": _binary(torch.add),
    "sub": _binary(torch.sub),
    "mul": _binary(torch.mul),
    "div": _binary(torch.div),
    QUANTIZE: _unary(lambda x: x),
}
"""Name -> function(attributes, weights, *values) -> value."""

ELEMENTWISE = frozenset(
    (
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "gelu",
        "silu",
        "sigmoid",
        "tanh",
        "hardswish",
        "hardsigmoid",
        "clamp",
    )
)
"""Activation functions: one value in, one of the same shape out."""

PASSED_ON = frozenset(
    ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "mean", "flatten", "reshape", "permute", "slice", "pad")
)
"""Operators that bring one value to where it is read, pooled or in another shape."""


class CapturedModel:
    """A network as nodes in topological order and the weights they use.

    Attributes:
        nodes: in an order in which each node's inputs come before it; the last node is the output.
        weights: ``{node name: {"weight": tensor, ...}}``, float32.
        input_shape: (C, H, W) of one image; None where the network takes any size.
    """

    def __init__(
        self,
        nodes: Iterable[Node],
        weights: dict[str, dict[str, Tensor]],
        input_shape: tuple[int | None, int | None, int | None] = (None, None, None),
    ) -> None:
        self.nodes = list(nodes)
        self.weights = weights
        self.input_shape = input_shape
        _check_nodes(self.nodes, weights)

    @property
    def output(self) -> str:
        return self.nodes[-1].name

    @property
    def layers(self) -> list[Node]:
        """The nodes that are quantized, in order."""
        return [node for node in self.nodes if node.op in LAYERS]

    def __call__(self, x: Tensor) -> Tensor:
        """Float inference: (N, C, H, W) to the output node's value."""
        with torch.inference_mode():
            return evaluate_nodes(self.nodes, {INPUT: x}, self.run_node)[self.output]

    def run_node(self, node: Node, values: list[Tensor]) -> Tensor:
        """One node's value from its inputs' values."""
        return OPERATORS[node.op](node.attributes, self.weights.get(node.name, {}), *values)

    def to(self, device: torch.device) -> CapturedModel:
        """The same network with its weights on ``device``."""
        weights = {name: {kind: t.to(device) for kind, t in kinds.items()} for name, kinds in self.weights.items()}
        return CapturedModel(self.nodes, weights, self.input_shape)

    def document(self) -> dict[str, Any]:
        """The graph without its weights, as JSON values."""
        return {"nodes": [node.document() for node in self.nodes], "input_shape": list(self.input_shape)}

    def digest(self) -> str:
        """sha256 over the graph and every weight's bytes."""
        sha = hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode())
        for name, tensor in sorted(self._flat_weights().items()):
            sha.update(f"{name} {tuple(tensor.shape)}".encode())
            sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()

    def float_bytes(self) -> int:
        """Bytes of all weights in float32."""
        return sum(4 * tensor.numel() for tensor in self._flat_weights().values())

    def _flat_weights(self) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": tensor.contiguous()
            for name, tensors in self.weights.items()
            for kind, tensor in tensors.items()
        }

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with the graph document in its header."""
        document = {"format": _FORMAT, **self.document()}
        save_file(self._flat_weights(), path, {_FORMAT_KEY: json.dumps(document, separators=(",", ":"))})

    @classmethod
    def load(cls, path: str | Path) -> CapturedModel:
        """Reads what ``save`` wrote.

        Raises:
            ModelFormatError: another kind of file, or a damaged one.
        """
        remedy = "Capture the original model again."
        try:
            with safe_open(path, framework="pt") as file:
                graph = json.loads((file.metadata() or {}).get(_FORMAT_KEY, "{}"))
                if graph.get("format") != _FORMAT:
                    raise ModelFormatError(f"{path} is not a captured model ({_FORMAT}).", remedy)
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return cls.from_document(graph, flat)
        except (SafetensorError, AttributeError, KeyError, ValueError, TypeError) as error:
            raise ModelFormatError(f"{path} is damaged: {error}.", remedy) from error

    @classmethod
    def from_document(cls, document: Mapping[str, Any], flat_weights: Mapping[str, Tensor]) -> CapturedModel:
        """Rebuilds a model from ``document()`` and weights named ``node.kind``."""
        nodes = [Node(name, op, tuple(inputs), attributes) for name, op, inputs, attributes in document["nodes"]]
        weights: dict[str, dict[str, Tensor]] = {}
        for flat_name, tensor in flat_weights.items():
            name, kind = flat_name.rsplit(".", 1)
            weights.setdefault(name, {})[kind] = tensor
        channels, height, width = document["input_shape"]
        return cls(nodes, weights, (channels, height, width))


def _check_nodes(nodes: list[Node], weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    remedy = "Export the model again with a current exporter."
    if not nodes:
        raise ModelFormatError("The graph is empty.", remedy)
    known = {INPUT}
    for node in nodes:
        if node.op not in OPERATORS:
            raise ModelFormatError(f"Node {node.name!r} has the unknown operator {node.op!r}.", remedy)
        missing = [name for name in node.inputs if name not in known]
        if missing or node.name in known:
            raise ModelFormatError(f"Node {node.name!r} is out of order or appears twice ({missing}).", remedy)
        if node.op in LAYERS and "weight" not in weights.get(node.name, {}):
            raise ModelFormatError(f"Layer {node.name!r} has no weight.", remedy)
        known.add(node.name)


def evaluate_nodes(
    nodes: Iterable[Node], values: dict[str, Tensor], run: Callable[[Node, list[Tensor]], Tensor]
) -> dict[str, Tensor]:
    """Runs ``nodes`` in order from the given values, dropping each value after its last use.

    Returns:
        What is left: the values that no node of the list takes, the last node's among them.
    """
    nodes = list(nodes)
    last_use = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    values = dict(values)
    for index, node in enumerate(nodes):
        values[node.name] = run(node, [values[name] for name in node.inputs])
        for name in node.inputs:
            if last_use[name] == index:
                values.pop(name, None)
    return values


def without_dead_nodes(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output depends on, in their order, the output last."""
    needed, kept = {output}, []
    for node in reversed(nodes):
        if node.name in needed:
            needed.update(node.inputs)
            kept.append(node)
    return kept[::-1]

"""Where values are quantized: marks in the graph for methods that quantize outputs, and for quantized shortcuts.

AQuant quantizes at the input of each layer, which needs no mark (appendix B, figure 1(b)). The methods before it
quantize a value where it is made (figure 1(a)): everything that reads it, the shortcut included, gets the quantized
one.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

from aquant_core.graph import INPUT, LAYERS, PASSED_ON, QUANTIZE, CapturedModel, Node


def mark_outputs(graph: CapturedModel, model_input: bool) -> CapturedModel:
    """A graph in which every value that layers read, however pooled or reshaped, is quantized where it is made.

    Args:
        graph: the folded float network.
        model_input: whether the images are quantized too.
    """
    by_name = {node.name: node for node in graph.nodes}
    sources = {source_of(by_name, node.inputs[0]) for node in graph.layers}
    if not model_input:
        sources.discard(INPUT)
    return _marked(graph, [(node.name, name) for node in graph.nodes for name in node.inputs if name in sources])


def mark_shortcuts(graph: CapturedModel) -> CapturedModel:
    """A graph in which what an identity shortcut adds is quantized: an operand that something else reads, too."""
    return _marked(graph, _shortcuts(graph))


def shortcut_of(graph: CapturedModel) -> Literal["float", "low"] | None:
    """Whether identity shortcuts of a marked graph add quantized values; None where it has no such shortcut."""
    added = {name for _, name in _shortcuts(graph)}
    marks = {node.name for node in graph.nodes if node.op == QUANTIZE}
    added |= {name for node in graph.nodes if node.op == "add" for name in node.inputs if name in marks}
    if not added:
        return None
    return "low" if added <= marks else "float"


def mark_before(graph: CapturedModel, layer: str) -> str | None:
    """The mark at which the input of a layer is quantized, if it is not by the layer itself."""
    by_name = {node.name: node for node in graph.nodes}
    source = source_of(by_name, by_name[layer].inputs[0])
    return source if source != INPUT and by_name[source].op == QUANTIZE else None


def _shortcuts(graph: CapturedModel) -> list[tuple[str, str]]:
    """Additions and those of their operands that something else reads, too."""
    readers = Counter(name for node in graph.nodes for name in node.inputs)
    additions = [node for node in graph.nodes if node.op == "add"]
    return [(node.name, name) for node in additions for name in node.inputs if readers[name] > 1]


def source_of(by_name: dict[str, Node], name: str) -> str:
    """The value that ``name`` is, pooled or in another shape: a layer's, an activation function's or a sum's."""
    while name != INPUT and by_name[name].op in PASSED_ON:
        name = by_name[name].inputs[0]
    return name


def layer_before(by_name: dict[str, Node], name: str) -> str | None:
    """The layer whose output ``name`` is but for operators of one value; None behind a sum or at the input."""
    while name != INPUT and by_name[name].op not in LAYERS:
        if len(by_name[name].inputs) != 1:
            return None
        name = by_name[name].inputs[0]
    return None if name == INPUT else name


def reads_images(by_name: dict[str, Node], name: str) -> bool:
    """Whether a value is the images, quantized or not."""
    while name != INPUT and by_name[name].op in PASSED_ON | {QUANTIZE}:
        name = by_name[name].inputs[0]
    return name == INPUT


def layers_behind(graph: CapturedModel, mark: Node) -> list[str]:
    """Names of the layers that read a marked value."""
    return [node.name for node in graph.layers if mark_before(graph, node.name) == mark.name]


def _marked(graph: CapturedModel, reads: list[tuple[str, str]]) -> CapturedModel:
    """The graph with a mark right behind each value for which a reader, named first, is to get the quantized one."""
    marks = {name: Node(f"{name}.{QUANTIZE}", QUANTIZE, (name,)) for _, name in reads}
    to_change = set(reads)
    nodes = [marks[INPUT]] if INPUT in marks else []
    for node in graph.nodes:
        inputs = (marks[name].name if (node.name, name) in to_change else name for name in node.inputs)
        nodes.append(replace(node, inputs=tuple(inputs)))
        if node.name in marks:
            nodes.append(marks[node.name])
    return CapturedModel(nodes, graph.weights, graph.input_shape)

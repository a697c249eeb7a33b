"""Cuts a network into the blocks that are reconstructed one at a time.

A cut is possible after a node whose value alone separates what comes before from what comes after: in graph
terms, every path from input to output runs through it. Between two neighbouring cuts lies a residual block,
or a single layer. Where the names of the layers tell of a module hierarchy, neighbouring single-path pieces
of one module (the three layers of an inverted residual without a shortcut, say) are one block, as in the
published recipes.
"""

from __future__ import annotations

from dataclasses import dataclass

from aquant_core.graph import ELEMENTWISE, INPUT, LAYERS, QUANTIZE, CapturedModel, Node, without_dead_nodes


@dataclass(frozen=True)
class Block:
    """Neighbouring nodes with one value in and one value out.

    Attributes:
        name: the module path that the layers share, else the first layer's name.
        nodes: in order; the last one's value leaves the block.
        input: name of the value that enters.
        learned: names of the nodes that are reconstructed; None for all that are quantized.
    """

    name: str
    nodes: tuple[Node, ...]
    input: str
    learned: tuple[str, ...] | None = None

    @property
    def output(self) -> str:
        return self.nodes[-1].name

    @property
    def layers(self) -> tuple[Node, ...]:
        """The nodes with a weight to be quantized."""
        return tuple(node for node in self.nodes if node.op in LAYERS)

    @property
    def has_parts(self) -> bool:
        """Whether anything in it is quantized; not so in what merely connects blocks (pooling, flattening)."""
        return any(node.op in LAYERS or node.op == QUANTIZE for node in self.nodes)


def partition(model: CapturedModel) -> list[Block]:
    """Blocks that together are the whole network, in order."""
    pieces = _join_activations(_cut(model.nodes))
    groups: list[list[Node]] = []
    scope_of_group: list[str | None] = []
    for piece in pieces:
        scope = _scope(piece)
        one_module = scope is not None and scope_of_group and scope == scope_of_group[-1]
        if one_module or (groups and not _has_layer(piece) and not _has_layer(groups[-1])):
            groups[-1].extend(piece)
        else:
            groups.append(list(piece))
            scope_of_group.append(scope)
    blocks: list[Block] = []
    entering = INPUT
    for nodes in groups:
        names = [node.name for node in nodes if node.op in LAYERS] or [nodes[0].name]
        path = _common_path(names)
        name = names[0] if any(block.name == path for block in blocks) else path
        blocks.append(Block(name, tuple(nodes), entering))
        entering = nodes[-1].name
    return blocks


def layer_units(block: Block) -> list[Block]:
    """The block as one unit a layer, for layer-wise reconstruction (AdaRound).

    Each unit runs from the block's input to the layer's output, behind its activation function; the layer alone is
    learned in it, those before it are finished by then.
    """
    units = []
    for layer in block.layers:
        last = layer
        readers = [node for node in block.nodes if last.name in node.inputs]
        if len(readers) == 1 and readers[0].op in ELEMENTWISE:
            last = readers[0]
        nodes = tuple(without_dead_nodes(list(block.nodes), last.name))
        units.append(Block(layer.name, nodes, block.input, (layer.name,)))
    return units


def _cut(nodes: list[Node]) -> list[list[Node]]:
    """Pieces between neighbouring cuts: after node i when its value is the only one still needed later."""
    last_use = {name: index for index, node in enumerate(nodes) for name in node.inputs}
    pieces: list[list[Node]] = [[]]
    furthest = last_use.get(INPUT, -1)  # the last reader of any value before the current one
    for index, node in enumerate(nodes):
        pieces[-1].append(node)
        if furthest <= index and index + 1 < len(nodes):
            pieces.append([])
        furthest = max(furthest, last_use.get(node.name, index))
    return pieces


def _join_activations(pieces: list[list[Node]]) -> list[list[Node]]:
    """An activation function, or the quantizer of an output, belongs to the piece whose value it takes."""
    joined: list[list[Node]] = []
    for piece in pieces:
        alone = len(piece) == 1 and (piece[0].op in ELEMENTWISE or piece[0].op == QUANTIZE)
        if alone and joined and _has_layer(joined[-1]):
            joined[-1].extend(piece)
        else:
            joined.append(list(piece))
    if len(joined) > 1 and joined[0][0].op == QUANTIZE and len(joined[0]) == 1:  # of the images
        joined[:2] = [joined[0] + joined[1]]
    return joined


def _has_layer(nodes: list[Node]) -> bool:
    return any(node.op in LAYERS for node in nodes)


def _common_path(names: list[str]) -> str:
    """The module path that several layers share; a single name as it is."""
    if len(names) == 1:
        return names[0]
    shared = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or names[0]


def _scope(piece: list[Node]) -> str | None:
    """The module that all layers of a piece lie in, if their names tell.

    It is the path up to the first index that is followed by a name: ``features.2`` of
    ``features.2.conv.0.0``, ``layer1.0`` of ``layer1.0.conv1``.
    """
    scopes = {_module_path(node.name) for node in piece if node.op in LAYERS}
    return scopes.pop() if len(scopes) == 1 else None


def _module_path(name: str) -> str | None:
    parts = name.split(".")
    for index in range(1, len(parts) - 1):
        if parts[index].isdigit() and not parts[index + 1].isdigit():
            return ".".join(parts[: index + 1])
    return None

"""Where values are quantized: what is marked in a graph, and who reads the quantized value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aquant_core.graph import INPUT, QUANTIZE, CapturedModel, Node
from aquant_core.placement import layer_before, layers_behind, mark_outputs, mark_shortcuts, source_of

CHANNELS = 2
IMAGES = torch.randn(3, CHANNELS, 6, 6, generator=torch.Generator().manual_seed(0))
POOL = {"kernel_size": [2, 2], "stride": [2, 2]}


def node(name: str, op: str, *inputs: str, **attributes: Any) -> Node:
    return Node(name, op, inputs, attributes)


def conv(name: str, source: str, stride: int = 1, groups: int = 1) -> Node:
    return node(name, "conv2d", source, stride=[stride] * 2, padding=[0, 0], dilation=[1, 1], groups=groups)


def graph_of(*nodes: Node, features: int = CHANNELS) -> CapturedModel:
    """With random weights: all convolutions 1 x 1, from as many channels to as many; the linear layer gives three."""
    generator = torch.Generator().manual_seed(1)

    def weight(of: Node) -> Tensor:
        if of.op == "linear":
            return torch.randn(3, features, generator=generator)
        return torch.randn(CHANNELS, CHANNELS // of.attributes["groups"], 1, 1, generator=generator)

    return CapturedModel(nodes, {of.name: {"weight": weight(of)} for of in nodes if of.op in ("conv2d", "linear")})


HEAD = (node("pooled", "adaptive_avg_pool2d", "out", output_size=[1, 1]),
        node("flat", "flatten", "pooled", start_dim=1), node("fc", "linear", "flat"))  # fmt: skip
BASIC_BLOCK = graph_of(
    conv("stem", INPUT), node("r0", "relu", "stem"), node("pool", "max_pool2d", "r0", **POOL),
    conv("c1", "pool"), node("r1", "relu", "c1"), conv("c2", "r1"), node("sum", "add", "c2", "pool"),
    node("out", "relu", "sum"), *HEAD,
)  # fmt: skip
WITH_DOWNSAMPLE = graph_of(
    conv("stem", INPUT), node("r0", "relu", "stem"),
    conv("c1", "r0", stride=2), node("r1", "relu", "c1"), conv("c2", "r1"), conv("down", "r0", stride=2),
    node("sum", "add", "c2", "down"), node("out", "relu", "sum"), *HEAD,
)  # fmt: skip
INVERTED_RESIDUAL = graph_of(
    conv("stem", INPUT), conv("expand", "stem"), node("r1", "relu6", "expand"),
    conv("depthwise", "r1", groups=CHANNELS), node("r2", "relu6", "depthwise"), conv("project", "r2"),
    node("out", "add", "stem", "project"), *HEAD,
)  # fmt: skip
CONCAT = graph_of(
    conv("stem", INPUT), node("r0", "relu", "stem"), conv("left", "r0"), node("r1", "relu", "left"),
    conv("right", "r0"), node("r2", "relu", "right"), node("out", "concat", "r1", "r2", "r0", dim=1), *HEAD,
    features=3 * CHANNELS,
)  # fmt: skip
GRAPHS = {
    "basic_block": BASIC_BLOCK,
    "with_downsample": WITH_DOWNSAMPLE,
    "inverted_residual": INVERTED_RESIDUAL,
    "concat": CONCAT,
}
MARKED = {
    # The pooled stem is quantized before it is pooled, the last value before its mean; so are the shortcut's.
    "basic_block": ["r0", "r1", "out"],
    "with_downsample": ["r0", "r1", "out"],
    # The linear bottleneck is read by the addition alone, which makes the value that layers read.
    "inverted_residual": ["stem", "r1", "r2", "out"],
    # Of the branches r0 alone is read by layers.
    "concat": ["r0", "out"],
}


def marks_of(graph: CapturedModel) -> dict[str, str]:
    """The quantized value by mark."""
    return {of.name: of.inputs[0] for of in graph.nodes if of.op == QUANTIZE}


def readers_of(graph: CapturedModel, name: str) -> list[str]:
    return [of.name for of in graph.nodes if name in of.inputs]


@pytest.mark.parametrize("model_input", [False, True])
@pytest.mark.parametrize("name", GRAPHS)
def test_everything_that_layers_read_is_quantized_where_it_is_made(name: str, model_input: bool) -> None:
    graph = GRAPHS[name]
    marked = mark_outputs(graph, model_input)
    sources = [*([INPUT] if model_input else []), *MARKED[name]]
    assert marks_of(marked) == {f"{source}.quantize": source for source in sources}
    order = [of.name for of in marked.nodes]
    for source in sources:  # each behind its value, which nobody else reads any more
        assert readers_of(marked, source) == [f"{source}.quantize"]
        assert readers_of(marked, f"{source}.quantize") == readers_of(graph, source)
        if source != INPUT:
            assert order[order.index(source) + 1] == f"{source}.quantize"
    assert not model_input or order[0] == "input.quantize"
    assert [of.name for of in marked.nodes if of.op != QUANTIZE] == [of.name for of in graph.nodes]


def test_a_basic_block_node_by_node() -> None:
    marked = mark_outputs(BASIC_BLOCK, model_input=True)
    assert [(of.name, of.inputs) for of in marked.nodes] == [
        ("input.quantize", ("input",)),
        ("stem", ("input.quantize",)),
        ("r0", ("stem",)),
        ("r0.quantize", ("r0",)),
        ("pool", ("r0.quantize",)),
        ("c1", ("pool",)),
        ("r1", ("c1",)),
        ("r1.quantize", ("r1",)),
        ("c2", ("r1.quantize",)),
        ("sum", ("c2", "pool")),
        ("out", ("sum",)),
        ("out.quantize", ("out",)),
        ("pooled", ("out.quantize",)),
        ("flat", ("pooled",)),
        ("fc", ("flat",)),
    ]


SHORTCUTS = {
    "basic_block": {"pool.quantize": "pool"},
    "with_downsample": {},
    "inverted_residual": {"stem.quantize": "stem"},
    "concat": {},
}


@pytest.mark.parametrize("name", GRAPHS)
def test_of_shortcuts_the_identity_alone_is_quantized_and_for_the_addition_alone(name: str) -> None:
    graph = GRAPHS[name]
    marked = mark_shortcuts(graph)
    assert marks_of(marked) == SHORTCUTS[name]
    order = [of.name for of in marked.nodes]
    for mark, source in SHORTCUTS[name].items():
        (addition,) = readers_of(marked, mark)
        assert order.index(mark) == order.index(source) + 1
        before = {of.name: of.inputs for of in graph.nodes}[addition]
        after = {of.name: of.inputs for of in marked.nodes}[addition]
        assert after == tuple(mark if operand == source else operand for operand in before)
        assert set(readers_of(marked, source)) == {*readers_of(graph, source), mark} - {addition}
    untouched = [of for of in marked.nodes if of.op not in (QUANTIZE, "add")]
    assert untouched == [of for of in graph.nodes if of.op != "add"]


def test_neighbouring_shortcuts_are_quantized_each_for_its_own_addition() -> None:
    graph = graph_of(
        conv("a", INPUT), conv("b", "a"), node("sum", "add", "b", "a"), conv("c", "sum"), node("out", "add", "sum", "c")
    )
    marked = mark_shortcuts(graph)
    assert marks_of(marked) == {"a.quantize": "a", "sum.quantize": "sum"}
    assert [of.inputs for of in marked.nodes if of.op == "add"] == [("b", "a.quantize"), ("sum.quantize", "c")]


def test_the_images_may_be_a_shortcut() -> None:
    graph = graph_of(conv("a", INPUT), node("out", "add", INPUT, "a"))
    assert marks_of(mark_shortcuts(graph)) == {"input.quantize": INPUT}
    assert marks_of(mark_outputs(graph, model_input=False)) == {}
    marked = mark_outputs(graph, model_input=True)
    assert [of.inputs for of in marked.nodes] == [(INPUT,), ("input.quantize",), ("input.quantize", "a")]


def test_pooled_images_are_images() -> None:
    graph = graph_of(node("pool", "max_pool2d", INPUT, **POOL), conv("a", "pool"))
    assert marks_of(mark_outputs(graph, model_input=False)) == {}
    marked = mark_outputs(graph, model_input=True)
    assert [(of.name, of.inputs) for of in marked.nodes] == [
        ("input.quantize", (INPUT,)), ("pool", ("input.quantize",)), ("a", ("pool",)),
    ]  # fmt: skip


def test_a_constant_that_is_added_is_no_shortcut() -> None:
    graph = graph_of(conv("a", INPUT), node("plus", "add", "a"), conv("b", "plus"))
    graph.weights["plus"] = {"constant": torch.ones(1)}
    assert marks_of(mark_shortcuts(graph)) == {}
    assert marks_of(mark_outputs(graph, model_input=False)) == {"plus.quantize": "plus"}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_marked_float_network_computes_the_same(name: str) -> None:
    graph = GRAPHS[name]
    before = [*graph.nodes]
    for marked in (mark_outputs(graph, True), mark_outputs(graph, False), mark_shortcuts(graph)):
        assert torch.equal(marked(IMAGES), graph(IMAGES))
        assert marked.weights is graph.weights
        assert marked.output == graph.output
    assert graph.nodes == before


def test_layers_behind_a_mark() -> None:
    marked = mark_outputs(WITH_DOWNSAMPLE, model_input=True)
    found = {of.name: layers_behind(marked, of) for of in marked.nodes if of.op == QUANTIZE}
    assert found == {
        "input.quantize": ["stem"], "r0.quantize": ["c1", "down"], "r1.quantize": ["c2"], "out.quantize": ["fc"],
    }  # fmt: skip
    shortcut = mark_shortcuts(BASIC_BLOCK)
    (mark,) = (of for of in shortcut.nodes if of.op == QUANTIZE)
    assert layers_behind(shortcut, mark) == []


@pytest.mark.parametrize(
    ("name", "source"), [("flat", "out"), ("pooled", "out"), ("pool", "r0"), ("r1", "r1"), ("sum", "sum"), ("c2", "c2")]
)
def test_the_value_that_a_pooled_one_is(name: str, source: str) -> None:
    assert source_of({of.name: of for of in BASIC_BLOCK.nodes}, name) == source


@pytest.mark.parametrize(
    ("name", "layer"),
    [(INPUT, None), ("stem", "stem"), ("pool", "stem"), ("r1", "c1"), ("sum", None), ("flat", None), ("fc", "fc")],
)
def test_the_layer_whose_output_a_value_is(name: str, layer: str | None) -> None:
    for graph in (BASIC_BLOCK, mark_outputs(BASIC_BLOCK, model_input=True)):
        assert layer_before({of.name: of for of in graph.nodes}, name) == layer

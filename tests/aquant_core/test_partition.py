"""Networks are cut into the blocks of the published recipes, and every network into a chain of blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aquant_core.architectures import build
from aquant_core.border import Border
from aquant_core.capture_torch import capture_module
from aquant_core.config import BorderConfig
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import INPUT, QUANTIZE, CapturedModel, Node, without_dead_nodes
from aquant_core.model import run_float_block
from aquant_core.partition import Block, layer_units, partition
from aquant_core.placement import mark_outputs, mark_shortcuts

CONV = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}


@cache
def folded(architecture: str) -> CapturedModel:
    torch.manual_seed(0)
    size = 64 if architecture == "squeezenet1_1" else 32
    return fold_batch_norm(capture_module(build(architecture), torch.rand(2, 3, size, size)))


def border_positions(graph: CapturedModel) -> int:
    """im2col positions of all layers, counted through the border's own parameters (b0 and b1)."""
    total = 0
    for node in graph.layers:
        weight = graph.weights[node.name]["weight"]
        channels = weight.shape[1] * node.attributes.get("groups", 1)
        border = Border(BorderConfig(form="linear"), channels, weight[0, 0].numel())
        total += border.number_of_parameters() // 2
    return total


def summary(architecture: str) -> list[tuple[str, int]]:
    return [(block.name, len(block.layers)) for block in partition(folded(architecture)) if block.layers]


@pytest.mark.parametrize(
    ("architecture", "before", "blocks", "after"),
    [
        ("resnet18", ["conv1"], 8, ["fc"]),
        ("resnet50", ["conv1"], 16, ["fc"]),
        ("mobilenet_v2", ["features.0.0"], 17, ["features.18.0", "classifier.1"]),
        ("regnet_x_600mf", ["stem.0"], 16, ["fc"]),
        ("regnet_x_3_2gf", ["stem.0"], 25, ["fc"]),
        ("mnasnet2_0", ["layers.0", "layers.3", "layers.6"], 16, ["layers.14", "classifier.1"]),
    ],
)
def test_published_blocks(architecture: str, before: list[str], blocks: int, after: list[str]) -> None:
    found = summary(architecture)
    middle = found[len(before) : len(found) - len(after)]
    assert [name for name, _ in found[: len(before)]] == before
    assert [name for name, _ in found[len(found) - len(after) :]] == after
    assert len(middle) == blocks
    assert all(layers >= 2 for _, layers in middle)
    assert all(layers == 1 for name, layers in found if name in [*before, *after])


def test_blocks_of_resnet18_by_name() -> None:
    assert summary("resnet18") == [
        ("conv1", 1), ("layer1.0", 2), ("layer1.1", 2), ("layer2.0", 3), ("layer2.1", 2),
        ("layer3.0", 3), ("layer3.1", 2), ("layer4.0", 3), ("layer4.1", 2), ("fc", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "percent"),
    [("resnet18", 0.81), ("resnet50", 0.64), ("regnet_x_600mf", 2.82), ("regnet_x_3_2gf", 2.14)],
)
def test_extra_parameters_of_the_paper(architecture: str, percent: float) -> None:
    graph = folded(architecture)
    parameters = graph.float_bytes() / 4
    assert 100 * 3 * border_positions(graph) / parameters == pytest.approx(percent, abs=0.02)


@pytest.mark.parametrize(
    ("architecture", "positions"),
    # The paper counts 4.56 % and 8.27 %; 3 a position give 6.35 % and 8.22 % of the parameters.
    [("mobilenet_v2", 74_171), ("mnasnet2_0", 341_691)],
)
def test_positions_of_depthwise_networks(architecture: str, positions: int) -> None:
    assert border_positions(folded(architecture)) == positions


@pytest.mark.parametrize(
    "architecture",
    ["resnet18", "densenet121", "googlenet", "shufflenet_v2_x1_0", "efficientnet_b0", "squeezenet1_1"],
)
def test_blocks_chain_and_cover_every_node_once(architecture: str) -> None:
    graph = folded(architecture)
    blocks = partition(graph)
    assert [node for block in blocks for node in block.nodes] == graph.nodes
    assert [block.input for block in blocks] == [INPUT, *(block.output for block in blocks[:-1])]
    assert blocks[-1].output == graph.output
    assert len({block.name for block in blocks}) == len(blocks)
    for block in blocks:  # nothing but the block's input enters it
        inside = {block.input, *(node.name for node in block.nodes)}
        assert {name for node in block.nodes for name in node.inputs} <= inside


@pytest.mark.parametrize("architecture", ["resnet18", "densenet121", "googlenet", "shufflenet_v2_x1_0"])
def test_running_block_by_block_gives_the_network(architecture: str) -> None:
    graph = folded(architecture)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    value = images
    with torch.inference_mode():
        for block in partition(graph):
            value = run_float_block(graph, block, value)
    torch.testing.assert_close(value, graph(images), rtol=1e-4, atol=1e-6)


MARKINGS: dict[str, Callable[[CapturedModel], CapturedModel]] = {
    "outputs": lambda graph: mark_outputs(graph, model_input=False),
    "outputs_and_images": lambda graph: mark_outputs(graph, model_input=True),
    "shortcuts": mark_shortcuts,
}


@pytest.mark.parametrize("marking", MARKINGS)
@pytest.mark.parametrize(
    "architecture",
    ["resnet18", "resnet50", "mobilenet_v2", "regnet_x_600mf", "regnet_x_3_2gf", "mnasnet2_0", "densenet121"],
)
def test_marks_change_no_block(architecture: str, marking: str) -> None:
    # Methods that quantize elsewhere go through the blocks together and share the float network's values.
    graph = folded(architecture)
    blocks, marked = partition(graph), partition(MARKINGS[marking](graph))
    assert [block.name for block in marked if block.layers] == [block.name for block in blocks if block.layers]
    unmarked = [[node.name for node in block.nodes if node.op != QUANTIZE] for block in marked]
    assert unmarked == [[node.name for node in block.nodes] for block in blocks]


def marks_in(blocks: list[Block]) -> list[list[str]]:
    return [[node.name for node in block.nodes if node.op == QUANTIZE] for block in blocks]


def test_marks_of_resnet18_lie_in_the_block_that_makes_the_value() -> None:
    by_block = marks_in(partition(mark_outputs(folded("resnet18"), model_input=True)))
    # The images' and the stem's own in the stem; of each block what is behind its first and its last activation.
    assert [len(names) for names in by_block] == [2, 0, *[2] * 8, 0, 0]
    assert by_block[0] == ["input.quantize", "relu.quantize"]
    assert by_block[2] == ["layer1.0.relu.quantize", "layer1.0.relu_1.quantize"]
    shortcuts = marks_in(partition(mark_shortcuts(folded("resnet18"))))
    # Not where a convolution downsamples.
    assert [len(names) for names in shortcuts] == [0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 0, 0]


def conv(name: str, source: str) -> Node:
    return Node(name, "conv2d", (source,), CONV)


STEPS = st.tuples(
    st.sampled_from(["conv2d", "relu", "add", "concat", "max_pool2d", "mul", "batch_norm"]),
    st.integers(0, 2), st.integers(0, 5), st.booleans(),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=14))
def test_marks_change_no_block_of_any_network(steps: list[tuple[str, int, int, bool]]) -> None:
    nodes = [conv("stem", INPUT)]
    for index, (op, back, farther, in_module) in enumerate(steps):
        names = [INPUT, *(node.name for node in nodes)]
        inputs = [names[max(-1 - back, -len(names))]]
        if op in ("add", "concat"):
            inputs.append(names[max(-1 - farther, -len(names))])
        name = f"features.{index // 3}.conv.{index}" if in_module else f"node{index}"
        nodes.append(Node(name, op, tuple(inputs), CONV if op == "conv2d" else {}))
    nodes = without_dead_nodes(nodes, nodes[-1].name)
    layers = [node for node in nodes if node.op == "conv2d"]
    graph = CapturedModel(nodes, {node.name: {"weight": torch.ones(1, 1, 1, 1)} for node in layers})
    expected = [[node.name for node in block.nodes] for block in partition(graph)]
    for marking in MARKINGS.values():
        marked = partition(marking(graph))
        assert [[node.name for node in block.nodes if node.op != QUANTIZE] for block in marked] == expected


def blocks_of(nodes: list[Node]) -> list[tuple[str, list[str]]]:
    weights = {node.name: {"weight": torch.ones(1, 1, 1, 1)} for node in nodes if node.op == "conv2d"}
    blocks: list[Block] = partition(CapturedModel(nodes, weights))
    return [(block.name, [node.name for node in block.nodes]) for block in blocks]


def test_a_plain_chain_is_cut_after_every_layer_with_its_activation() -> None:
    nodes = [conv("a", INPUT), Node("r", "relu", ("a",)), conv("b", "r"), Node("p", "max_pool2d", ("b",))]
    assert blocks_of(nodes) == [("a", ["a", "r"]), ("b", ["b"]), ("p", ["p"])]


def test_a_shortcut_keeps_its_branch_and_the_activation_after_it_together() -> None:
    nodes = [
        conv("stem", INPUT),
        conv("left", "stem"),
        Node("r", "relu", ("left",)),
        conv("right", "r"),
        Node("add", "add", ("right", "stem")),
        Node("out", "relu", ("add",)),
        conv("last", "out"),
    ]
    assert [names for _, names in blocks_of(nodes)] == [
        ["stem"], ["left", "r", "right", "add", "out"], ["last"],
    ]  # fmt: skip


def test_a_shortcut_from_the_input_keeps_the_first_layer_in_its_block() -> None:
    nodes = [conv("a", INPUT), conv("b", "a"), Node("add", "add", ("b", INPUT)), conv("c", "add")]
    assert [names for _, names in blocks_of(nodes)] == [["a", "b", "add"], ["c"]]


def test_single_path_layers_of_one_module_are_one_block() -> None:
    nodes = [conv("features.1.conv.0", INPUT), conv("features.1.conv.3", "features.1.conv.0")]
    nodes += [conv("features.2.conv.0", nodes[-1].name)]
    assert blocks_of(nodes) == [
        ("features.1.conv", ["features.1.conv.0", "features.1.conv.3"]),
        ("features.2.conv.0", ["features.2.conv.0"]),
    ]


def test_layers_without_a_hierarchy_in_their_names_are_not_joined() -> None:
    nodes = [conv("Conv_0", INPUT), conv("Conv_1", "Conv_0"), conv("Conv_2", "Conv_1")]
    assert [name for name, _ in blocks_of(nodes)] == ["Conv_0", "Conv_1", "Conv_2"]


def unit_names(block: Block) -> list[tuple[str, list[str]]]:
    return [(unit.name, [node.name for node in unit.nodes]) for unit in layer_units(block)]


def test_a_unit_runs_from_the_blocks_input_to_one_layers_activation() -> None:
    nodes = (
        conv("left", "before"), Node("r", "relu", ("left",)), conv("right", "r"), conv("down", "before"),
        Node("add", "add", ("right", "down")), Node("out", "relu", ("add",)),
    )  # fmt: skip
    block = Block("block", nodes, "before")
    assert unit_names(block) == [
        ("left", ["left", "r"]),
        ("right", ["left", "r", "right"]),  # the relu behind the addition is of the sum
        ("down", ["down"]),
    ]
    for unit in layer_units(block):
        assert unit.input == "before"
        assert unit.learned == (unit.name,)
    assert block.learned is None


def test_a_unit_has_the_quantizers_before_its_layer_and_not_its_own() -> None:
    nodes = (
        Node("input.quantize", "quantize", (INPUT,)), conv("a", "input.quantize"), Node("r", "relu6", ("a",)),
        Node("r.quantize", "quantize", ("r",)), conv("b", "r.quantize"), Node("b.quantize", "quantize", ("b",)),
    )  # fmt: skip
    assert unit_names(Block("block", nodes, INPUT)) == [
        ("a", ["input.quantize", "a", "r"]),
        ("b", ["input.quantize", "a", "r", "r.quantize", "b"]),
    ]


def test_a_value_read_twice_is_not_the_activations_alone() -> None:
    nodes = (conv("a", INPUT), Node("r", "relu", ("a",)), Node("add", "add", ("r", "a")))
    assert unit_names(Block("block", nodes, INPUT)) == [("a", ["a"])]


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v2"])
def test_units_have_every_layer_once(architecture: str) -> None:
    for graph in (folded(architecture), mark_outputs(folded(architecture), model_input=True)):
        for block in partition(graph):
            units = layer_units(block)
            assert [unit.name for unit in units] == [node.name for node in block.layers]
            for unit in units:
                assert unit.layers[-1].name == unit.name
                inside = {unit.input, *(node.name for node in unit.nodes)}
                assert {name for node in unit.nodes for name in node.inputs} <= inside


def test_a_units_target_is_what_the_whole_network_has_there() -> None:
    graph = folded("resnet18")
    block = next(block for block in partition(graph) if block.name == "layer2.0")
    value = torch.rand(2, 64, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        values = {block.input: value}
        for node in block.nodes:
            values[node.name] = graph.run_node(node, [values[name] for name in node.inputs])
        for unit in layer_units(block):
            assert torch.equal(run_float_block(graph, unit, value), values[unit.output])
    assert [unit.output for unit in layer_units(block)] == ["layer2.0.relu", "layer2.0.conv2", "layer2.0.downsample.0"]

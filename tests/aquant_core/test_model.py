"""How many bits everything has under which protocol, and a network quantized to nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aquant_core.config import PROTOCOLS, QuantizationConfig
from aquant_core.graph import INPUT, QUANTIZE, CapturedModel, Node
from aquant_core.methods import METHODS
from aquant_core.model import bits_of_layers, bits_of_marks, marked, quantize_to_nearest, search_weights
from aquant_core.placement import mark_outputs, mark_shortcuts

IMAGES = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(0))
INPUTS, OUTPUTS = METHODS["aquant"], METHODS["qdrop"]


def conv(name: str, source: str) -> Node:
    return Node(name, "conv2d", (source,), {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1})


def graph_of(*nodes: Node) -> CapturedModel:
    generator = torch.Generator().manual_seed(1)

    def weight(op: str) -> Tensor:
        return torch.randn(*((3, 2) if op == "linear" else (2, 2, 1, 1)), generator=generator)

    layers = [node for node in nodes if node.op in ("conv2d", "linear")]
    return CapturedModel(nodes, {node.name: {"weight": weight(node.op)} for node in layers})


def relu(name: str, source: str) -> Node:
    return Node(name, "relu", (source,))


# Of the stem's output, pooled, two layers and the shortcut read.
GRAPH = graph_of(
    conv("stem", INPUT),
    relu("r0", "stem"),
    Node("pool", "max_pool2d", ("r0",), {"kernel_size": [2, 2], "stride": [2, 2]}),
    conv("left", "pool"),
    relu("r1", "left"),
    conv("right", "r1"),
    conv("aside", "pool"),
    Node("three", "add", ("right", "aside")),
    Node("sum", "add", ("three", "pool")),
    relu("r2", "sum"),
    conv("then", "r2"),
    Node("mean", "mean", ("then",), {"dims": [2, 3], "keepdim": False}),
    Node("fc", "linear", ("mean",)),
)
LAYERS = ["stem", "left", "right", "aside", "then", "fc"]


def configured(**changes: Any) -> QuantizationConfig:
    return QuantizationConfig(**{"weight_bits": 2, "activation_bits": 3} | changes)


def bits(**changes: Any) -> dict[str, tuple[int, int]]:
    return bits_of_layers(GRAPH, configured(**changes))


def widths(weights: list[int], activations: list[int]) -> dict[str, tuple[int, int]]:
    return dict(zip(LAYERS, zip(weights, activations, strict=True), strict=True))


BY_PROTOCOL = {
    "paper": widths([8, 2, 2, 2, 2, 8], [8, 3, 3, 3, 3, 8]),
    "qdrop": widths([8, 2, 2, 2, 2, 8], [32, 3, 3, 3, 3, 8]),
    "brecq": widths([8, 2, 2, 2, 2, 8], [32, 8, 3, 8, 3, 3]),
    "all-low-bit": widths([2, 2, 2, 2, 2, 2], [3, 3, 3, 3, 3, 3]),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bits_by_protocol(protocol: str) -> None:
    assert bits(protocol=protocol) == BY_PROTOCOL[protocol]


@pytest.mark.parametrize(
    ("protocol", "switches", "changed"),
    [
        ("paper", {"first_last_weights": "low"}, {"stem": (2, 8), "fc": (2, 8)}),
        ("paper", {"model_input": "low"}, {"stem": (8, 3)}),
        ("paper", {"model_input": "float"}, {"stem": (8, 32)}),
        ("paper", {"last_layer_input": "low"}, {"fc": (8, 3)}),
        ("paper", {"second_layer_input": "high"}, {"left": (2, 8), "aside": (2, 8)}),
        ("paper", {"shortcut": "low"}, {}),
        ("brecq", {"second_layer_input": "low"}, {"left": (2, 3), "aside": (2, 3)}),
        ("all-low-bit", {"first_last_weights": "high"}, {"stem": (8, 3), "fc": (8, 3)}),
        ("all-low-bit", {"model_input": "high", "last_layer_input": "high"}, {"stem": (2, 8), "fc": (2, 8)}),
    ],
)
def test_each_switch_changes_what_it_names(
    protocol: str, switches: dict[str, str], changed: dict[str, tuple[int, int]]
) -> None:
    assert bits(protocol=protocol, protocol_switches=switches) == BY_PROTOCOL[protocol] | changed


def test_high_is_what_the_configuration_says() -> None:
    assert bits(first_last_bits=6) == widths([6, 2, 2, 2, 2, 6], [6, 3, 3, 3, 3, 6])
    assert bits(first_last_bits=6, protocol="brecq")["left"] == (2, 6)
    assert bits(first_last_bits=32) == widths([32, 2, 2, 2, 2, 32], [32, 3, 3, 3, 3, 32])


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_float_stays_float_throughout(protocol: str) -> None:
    assert {weight for weight, _ in bits(protocol=protocol, weight_bits=32).values()} == {32}
    assert {activation for _, activation in bits(protocol=protocol, activation_bits=32).values()} == {32}


def test_an_override_goes_over_the_protocol() -> None:
    layers = {"stem": {"weight_bits": 4}, "right": {"activation_bits": 32}, "fc": {"weight_bits": 32}, "then": {}}
    assert bits(layers=layers) == BY_PROTOCOL["paper"] | {"stem": (4, 8), "right": (2, 32), "fc": (32, 8)}
    layers = {"stem": {"activation_bits": 8}, "left": {"activation_bits": 5}}
    assert bits(layers=layers, protocol="brecq") == BY_PROTOCOL["brecq"] | {"stem": (8, 8), "left": (2, 5)}
    assert bits(layers={"then": {"activation_bits": 4}}, activation_bits=32)["then"] == (2, 4)


def test_the_only_layer_is_the_first_and_the_last() -> None:
    alone = graph_of(conv("a", INPUT))
    assert bits_of_layers(alone, configured()) == {"a": (8, 8)}
    assert bits_of_layers(alone, configured(protocol="qdrop")) == {"a": (8, 32)}
    both = graph_of(conv("a", INPUT), conv("b", "a"))
    assert bits_of_layers(both, configured(protocol="brecq")) == {"a": (8, 32), "b": (8, 8)}  # b is the second, too


def test_behind_a_sum_nothing_reads_the_first_layers_output() -> None:
    graph = graph_of(conv("a", INPUT), Node("sum", "add", ("a", INPUT)), conv("b", "sum"), conv("c", "b"))
    assert bits_of_layers(graph, configured(protocol="brecq"))["b"] == (2, 3)


def bits_of_outputs(**changes: Any) -> dict[str, int]:
    config = configured(**changes)
    graph = mark_outputs(GRAPH, model_input=True)
    return bits_of_marks(graph, bits_of_layers(graph, config), config)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_marked_value_has_the_bits_of_the_layer_that_reads_it(protocol: str) -> None:
    by_layer = {name: width for name, (_, width) in BY_PROTOCOL[protocol].items()}
    assert bits_of_outputs(protocol=protocol) == {
        "input.quantize": by_layer["stem"],
        "r0.quantize": by_layer["left"],
        "r1.quantize": by_layer["right"],
        "r2.quantize": by_layer["then"],
        "then.quantize": by_layer["fc"],  # in front of the mean
    }


@pytest.mark.parametrize(("of_left", "of_aside", "most"), [(5, 4, 5), (4, 5, 5), (2, 2, 2), (32, 2, 32)])
def test_of_several_readers_the_one_with_most_bits_decides(of_left: int, of_aside: int, most: int) -> None:
    layers = {"left": {"activation_bits": of_left}, "aside": {"activation_bits": of_aside}}
    assert bits_of_outputs(layers=layers)["r0.quantize"] == most


def test_a_shortcut_has_the_networks_bits_unless_a_layer_beside_it_has_more() -> None:
    graph = mark_shortcuts(GRAPH)
    for left, width in ((2, 3), (5, 5)):
        config = configured(layers={"left": {"activation_bits": left}})
        assert bits_of_marks(graph, bits_of_layers(graph, config), config) == {"pool.quantize": width}


def test_a_shortcut_beside_layers_of_more_bits_has_theirs() -> None:
    """BRECQ's published code quantizes the first layer's output to 8 bits, whoever reads it."""
    graph = graph_of(conv("a", INPUT), conv("b", "a"), Node("sum", "add", ("b", "a")), conv("c", "sum"))
    for protocol, width in (("brecq", 8), ("paper", 3), ("all-low-bit", 3)):
        config = configured(protocol=protocol, protocol_switches={"shortcut": "low"})
        marked_graph = mark_shortcuts(graph)
        assert set(bits_of_marks(marked_graph, bits_of_layers(marked_graph, config), config).values()) == {width}


def marks(method: Any, **changes: Any) -> list[str]:
    return [node.name for node in marked(GRAPH, configured(**changes), method).nodes if node.op == QUANTIZE]


def test_what_is_marked_for_a_method_and_a_protocol() -> None:
    inside = ["r0.quantize", "r1.quantize", "r2.quantize", "then.quantize"]
    for protocol, settings in PROTOCOLS.items():
        images = [] if settings.model_input == "float" else ["input.quantize"]
        assert marks(OUTPUTS, protocol=protocol) == images + inside
        shortcut = [] if settings.shortcut == "float" else ["pool.quantize"]
        assert marks(INPUTS, protocol=protocol) == shortcut
        assert marks(OUTPUTS, protocol=protocol, activation_bits=32) == []
        assert marks(INPUTS, protocol=protocol, activation_bits=32) == []
    assert marks(INPUTS, protocol_switches={"shortcut": "low"}) == ["pool.quantize"]
    assert marks(OUTPUTS, protocol_switches={"model_input": "float"}) == inside


def test_an_override_is_not_lost_where_outputs_are_quantized() -> None:
    """Of otherwise float activations or images, too."""
    one = {"activation_bits": 32, "layers": {"then": {"activation_bits": 4}}}
    images = {"protocol": "qdrop", "layers": {"stem": {"activation_bits": 4}}}
    for changes, name in ((one, "r2.quantize"), (images, "input.quantize")):
        config = configured(**changes)
        graph = marked(GRAPH, config, OUTPUTS)
        model = quantize_to_nearest(graph, IMAGES, config, "output")
        assert model.quantizers[name].activation_bits == 4
        assert model.quantizers[name].activation_scale is not None
    quantized = [name for name, part in model.quantizers.items() if part.activation_scale is not None]
    assert quantized == ["input.quantize", "r0.quantize", "r1.quantize", "r2.quantize", "then.quantize"]
    config = configured(**one)
    model = quantize_to_nearest(marked(GRAPH, config, OUTPUTS), IMAGES, config, "output")
    assert [name for name, part in model.quantizers.items() if part.activation_scale is not None] == ["r2.quantize"]


def nearest(x: Tensor, model_part: Any) -> Tensor:
    scale, zero, levels = model_part.activation_scale.detach(), model_part.zero_point, 2**model_part.activation_bits - 1
    return scale * (torch.ceil(x / scale + zero - 0.5).clamp(0, levels) - zero)


def test_a_network_quantized_where_values_are_made() -> None:
    config = configured()
    model = quantize_to_nearest(marked(GRAPH, config, OUTPUTS), IMAGES, config, "output")
    assert all(layer.activation_scale is None for layer in model.layers.values())
    widths_found = {name: part.activation_bits for name, part in model.quantizers.items()}
    assert widths_found == bits_of_outputs()
    weight = {name: layer.weight() for name, layer in model.layers.items() if layer.weight is not None}
    part = model.quantizers

    def convolved(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, weight[name])

    pool = nearest(convolved("stem", nearest(IMAGES, part["input.quantize"])).relu(), part["r0.quantize"])
    pool = torch.nn.functional.max_pool2d(pool, 2, 2)
    right = convolved("right", nearest(convolved("left", pool).relu(), part["r1.quantize"]))
    total = (right + convolved("aside", pool) + pool).relu()  # the shortcut carries the quantized value
    then = nearest(convolved("then", nearest(total, part["r2.quantize"])), part["then.quantize"])
    expected = then.mean((2, 3)) @ weight["fc"].T
    torch.testing.assert_close(model(IMAGES).detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_network_whose_shortcut_is_quantized_beside_its_layers() -> None:
    config = configured(protocol_switches={"shortcut": "low"})
    model = quantize_to_nearest(marked(GRAPH, config, INPUTS), IMAGES, config)
    assert {name: part.activation_bits for name, part in model.quantizers.items()} == {"pool.quantize": 3}
    assert all(layer.activation_scale is not None for layer in model.layers.values())
    seen: dict[str, Tensor] = {}
    float_shortcut = quantize_to_nearest(GRAPH, IMAGES, configured())

    def noted(node: Node, values: list[Tensor]) -> Tensor:
        seen[node.name] = run_node(node, values)
        return seen[node.name]

    run_node = model.run_node
    model.run_node = noted  # type: ignore[method-assign]
    logits = model(IMAGES)
    quantized = nearest(seen["pool"], model.quantizers["pool.quantize"])
    assert not torch.equal(quantized, seen["pool"])
    torch.testing.assert_close(seen["sum"], seen["three"] + quantized)
    assert not torch.equal(logits, float_shortcut(IMAGES))


def test_searched_weights_are_shared_and_not_spoilt() -> None:
    config = configured(layers={"aside": {"weight_bits": 32}})
    weights = search_weights(GRAPH, config)
    assert set(weights) == {*LAYERS} - {"aside"}
    assert {name: rounding.levels for name, rounding in weights.items()} == {
        "stem": 255, "left": 3, "right": 3, "then": 3, "fc": 255,
    }  # fmt: skip
    before = {name: rounding.codes.clone() for name, rounding in weights.items()}
    first = quantize_to_nearest(GRAPH, IMAGES, config, weights=weights)
    for layer in first.layers.values():
        if layer.weight is not None:
            layer.weight.codes += 1
    second = quantize_to_nearest(GRAPH, IMAGES, config, weights=weights)
    searched = quantize_to_nearest(GRAPH, IMAGES, config)
    for name, codes in before.items():
        assert torch.equal(weights[name].codes, codes)
        for model in (second, searched):
            rounding = model.layers[name].weight
            assert rounding is not None
            assert torch.equal(rounding.codes, codes)

"""The graph form: it runs, it is written and read back as it is, and damaged ones are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquant_core.errors import ModelFormatError
from aquant_core.graph import INPUT, OPERATORS, CapturedModel, Node, evaluate_nodes, without_dead_nodes

CONV = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1}


def residual_net() -> CapturedModel:
    """conv -> relu -> (+ conv) -> pool -> flatten -> linear, on 3 x 8 x 8 images."""
    generator = torch.Generator().manual_seed(0)
    nodes = [
        Node("stem", "conv2d", (INPUT,), CONV),
        Node("relu", "relu", ("stem",)),
        Node("block.conv", "conv2d", ("relu",), CONV),
        Node("add", "add", ("block.conv", "relu")),
        Node("pool", "adaptive_avg_pool2d", ("add",), {"output_size": [1, 1]}),
        Node("flat", "flatten", ("pool",), {"start_dim": 1}),
        Node("fc", "linear", ("flat",)),
    ]
    weights = {
        "stem": {"weight": torch.randn(4, 3, 3, 3, generator=generator)},
        "block.conv": {
            "weight": torch.randn(4, 4, 3, 3, generator=generator),
            "bias": torch.randn(4, generator=generator),
        },
        "fc": {"weight": torch.randn(5, 4, generator=generator), "bias": torch.randn(5, generator=generator)},
    }
    return CapturedModel(nodes, weights, (3, 8, 8))


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_interpreter_computes_what_the_nodes_say() -> None:
    model, x = residual_net(), images()
    w = model.weights
    relu = F.relu(F.conv2d(x, w["stem"]["weight"], padding=1))
    block = F.conv2d(relu, w["block.conv"]["weight"], w["block.conv"]["bias"], padding=1) + relu
    expected = F.linear(block.mean((2, 3)), w["fc"]["weight"], w["fc"]["bias"])
    torch.testing.assert_close(model(x), expected)
    assert [node.name for node in model.layers] == ["stem", "block.conv", "fc"]
    assert model.output == "fc"
    assert model.float_bytes() == 4 * (4 * 27 + 4 * 36 + 4 + 20 + 5)


def test_save_and_load_give_the_same_model_and_the_same_bytes(tmp_path: Path) -> None:
    model = residual_net()
    model.save(tmp_path / "a.safetensors")
    loaded = CapturedModel.load(tmp_path / "a.safetensors")
    assert loaded.document() == model.document()
    assert loaded.digest() == model.digest()
    assert loaded.input_shape == (3, 8, 8)
    assert torch.equal(loaded(images()), model(images()))
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_free_size_stays_free(tmp_path: Path) -> None:
    CapturedModel(residual_net().nodes, residual_net().weights).save(tmp_path / "m")
    assert CapturedModel.load(tmp_path / "m").input_shape == (None, None, None)


def test_the_digest_depends_on_every_part() -> None:
    model = residual_net()
    digests = {model.digest()}
    changed = residual_net()
    changed.weights["fc"]["bias"][0] += 1
    digests.add(changed.digest())
    digests.add(CapturedModel(model.nodes, model.weights, (3, 8, None)).digest())
    nodes = [Node("relu", "relu6", n.inputs) if n.name == "relu" else n for n in model.nodes]
    digests.add(CapturedModel(nodes, model.weights, (3, 8, 8)).digest())
    assert len(digests) == 4


@given(share=st.floats(0, 0.999))
def test_a_cut_off_file_is_refused(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    residual_net().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelFormatError, match=r"cut\.safetensors is damaged"):
        CapturedModel.load(path)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(ModelFormatError, match="is not a captured model"):
        CapturedModel.load(tmp_path / "other")
    save_file({"weight": torch.zeros(2)}, tmp_path / "new", {"graph": '{"format": "aquant-graph/2"}'})
    with pytest.raises(ModelFormatError, match="aquant-graph/1"):
        CapturedModel.load(tmp_path / "new")


@pytest.mark.parametrize(
    "change",
    [
        {"nodes": None},
        {"nodes": 3},
        {"nodes": [["fc", "linear"]]},
        {"nodes": []},
        {"input_shape": [3]},
        {"input_shape": None},
    ],
)
def test_a_damaged_document_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    model = residual_net()
    model.save(tmp_path / "good")
    document = {"format": "aquant-graph/1", **model.document(), **change}
    save_file(load_file(tmp_path / "good"), tmp_path / "bad", {"graph": json.dumps(document)})
    with pytest.raises(ModelFormatError):
        CapturedModel.load(tmp_path / "bad")


@pytest.mark.parametrize("header", ["[]", "3", "null", "{", '"text"'])
def test_a_document_of_another_kind_is_refused(tmp_path: Path, header: str) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "bad", {"graph": header})
    with pytest.raises(ModelFormatError):
        CapturedModel.load(tmp_path / "bad")


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    model = residual_net()
    model.save(tmp_path / "good")
    tensors = load_file(tmp_path / "good")
    del tensors["block.conv.weight"]
    document = {"format": "aquant-graph/1", **model.document()}
    save_file(tensors, tmp_path / "bad", {"graph": json.dumps(document)})
    with pytest.raises(ModelFormatError, match=r"Layer 'block\.conv' has no weight"):
        CapturedModel.load(tmp_path / "bad")


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        ([], "empty"),
        ([Node("a", "einsum", (INPUT,))], "'a' has the unknown operator 'einsum'"),
        ([Node("a", "relu", ("b",)), Node("b", "relu", (INPUT,))], r"'a' is out of order.*\['b'\]"),
        ([Node("a", "relu", (INPUT,)), Node("a", "relu", ("a",))], "'a'.*appears twice"),
        ([Node(INPUT, "relu", (INPUT,))], "appears twice"),
        ([Node("a", "linear", (INPUT,))], "Layer 'a' has no weight"),
    ],
)
def test_impossible_graphs_are_refused(nodes: list[Node], reason: str) -> None:
    with pytest.raises(ModelFormatError, match=reason):
        CapturedModel(nodes, {})


def test_values_are_dropped_after_their_last_use() -> None:
    nodes = [
        Node("a", "relu", (INPUT,)),
        Node("b", "relu", ("a",)),
        Node("c", "add", ("a", "b")),
        Node("d", "add", ("c", "c")),
    ]
    given_values = {INPUT: torch.ones(1)}
    seen: list[tuple[str, int]] = []

    def run(node: Node, values: list[Tensor]) -> Tensor:
        seen.append((node.name, len(values)))
        return OPERATORS[node.op](node.attributes, {}, *values)

    left = evaluate_nodes(nodes, given_values, run)
    assert seen == [("a", 1), ("b", 1), ("c", 2), ("d", 2)]
    assert set(left) == {"d"}
    assert left["d"].item() == 4
    assert set(given_values) == {INPUT}


def test_dead_nodes_are_dropped_and_the_output_is_last() -> None:
    nodes = [
        Node("a", "relu", (INPUT,)),
        Node("dead", "relu", ("a",)),
        Node("b", "relu", ("a",)),
        Node("late", "relu", ("b",)),
    ]
    assert [node.name for node in without_dead_nodes(nodes, "b")] == ["a", "b"]

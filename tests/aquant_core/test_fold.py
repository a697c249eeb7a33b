"""Folding BatchNorm changes the graph, not what it computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from aquant_core.fold import fold_batch_norm
from aquant_core.graph import INPUT, CapturedModel, Node

CONV = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
EPS = {"eps": 1e-5}


def norm(channels: int, generator: torch.Generator, affine: bool = True) -> dict[str, Tensor]:
    tensors = {
        "running_mean": torch.randn(channels, generator=generator),
        "running_var": torch.rand(channels, generator=generator) * 3 + 0.1,
    }
    if affine:
        tensors["weight"] = torch.randn(channels, generator=generator)
        tensors["bias"] = torch.randn(channels, generator=generator)
    return tensors


def names(model: CapturedModel) -> list[str]:
    return [node.name for node in model.nodes]


@pytest.mark.parametrize(("bias", "affine", "groups"), list(itertools.product([True, False], [True, False], [1, 2, 6])))
def test_a_convolution_takes_its_norm_in(bias: bool, affine: bool, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = {"weight": torch.randn(12, 6 // groups, 3, 2, generator=generator)}
    if bias:
        conv["bias"] = torch.randn(12, generator=generator)
    model = CapturedModel(
        [
            Node("conv", "conv2d", (INPUT,), CONV | {"groups": groups, "padding": [1, 0], "stride": [2, 1]}),
            Node("bn", "batch_norm", ("conv",), EPS),
            Node("relu", "relu", ("bn",)),
        ],
        {"conv": conv, "bn": norm(12, generator, affine)},
        (6, 5, 7),
    )
    digest, x = model.digest(), torch.randn(3, 6, 5, 7, generator=generator)
    folded = fold_batch_norm(model)
    assert names(folded) == ["conv", "relu"]
    assert set(folded.weights) == {"conv"}
    assert folded.input_shape == (6, 5, 7)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)
    assert model.digest() == digest  # the float model is left as it was


def test_a_linear_layer_takes_its_norm_in() -> None:
    generator = torch.Generator().manual_seed(0)
    model = CapturedModel(
        [Node("fc", "linear", (INPUT,)), Node("bn", "batch_norm", ("fc",), EPS)],
        {"fc": {"weight": torch.randn(4, 6, generator=generator)}, "bn": norm(4, generator)},
    )
    folded = fold_batch_norm(model)
    x = torch.randn(3, 6, generator=generator)
    assert names(folded) == ["fc"]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)


def test_numbers_by_hand() -> None:
    # gamma / sqrt(variance + eps) = 3 / sqrt(3 + 1) = 1.5; W' = 2 * 1.5; b' = (7 - 1) * 1.5 + 5.
    one = torch.ones(1)
    model = CapturedModel(
        [Node("conv", "conv2d", (INPUT,), CONV), Node("bn", "batch_norm", ("conv",), {"eps": 1.0})],
        {
            "conv": {"weight": torch.full((1, 1, 1, 1), 2.0), "bias": 7 * one},
            "bn": {"weight": 3 * one, "bias": 5 * one, "running_mean": one, "running_var": 3 * one},
        },
    )
    folded = fold_batch_norm(model).weights["conv"]
    assert folded["weight"].item() == 3.0
    assert folded["bias"].item() == 14.0


def graph_whose_norms_stay(case: str) -> tuple[list[Node], list[str]]:
    norm_of = {"input": INPUT, "relu": "relu", "shared": "conv"}[case]
    nodes = [
        Node("conv", "conv2d", (INPUT,), CONV),
        Node("relu", "relu", ("conv",)),
        Node("bn", "batch_norm", (norm_of,), EPS),
        Node("add", "add", ("bn", "relu")),
    ]
    return nodes, ["conv", "relu", "bn", "add"]


@pytest.mark.parametrize("case", ["input", "relu", "shared"])
def test_a_norm_that_cannot_be_folded_stays(case: str) -> None:
    generator = torch.Generator().manual_seed(0)
    nodes, expected = graph_whose_norms_stay(case)
    weights = {"conv": {"weight": torch.randn(3, 3, 1, 1, generator=generator)}, "bn": norm(3, generator)}
    model = CapturedModel(nodes, weights)
    folded = fold_batch_norm(model)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    assert names(folded) == expected
    assert torch.equal(folded(x), model(x))


def test_only_the_first_of_two_norms_is_folded() -> None:
    generator = torch.Generator().manual_seed(0)
    model = CapturedModel(
        [
            Node("conv", "conv2d", (INPUT,), CONV),
            Node("bn1", "batch_norm", ("conv",), EPS),
            Node("bn2", "batch_norm", ("bn1",), EPS),
        ],
        {
            "conv": {"weight": torch.randn(3, 3, 1, 1, generator=generator)},
            "bn1": norm(3, generator),
            "bn2": norm(3, generator),
        },
    )
    folded = fold_batch_norm(model)
    x = torch.randn(2, 3, 4, 4, generator=generator)
    assert [node.inputs for node in folded.nodes] == [(INPUT,), ("conv",)]
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-5)

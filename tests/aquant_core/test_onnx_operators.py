"""Each operator between the layers gives in onnxruntime what it gives in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aquant_core.errors import OnnxExportError
from aquant_core.export_onnx import onnx_model
from aquant_core.graph import INPUT, LAYERS, OPERATORS, QUANTIZE, CapturedModel, Node
from aquant_core.model import QuantizedModel
from aquant_core.onnx_agreement import open_session
from aquant_core.onnx_operators import WRITTEN

IMAGES = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0))
PER_CHANNEL = torch.tensor([0.5, -1.5, 2.0, 3.0])

CASES: list[tuple[str, dict[str, Any]]] = [
    ("relu", {}),
    ("relu6", {}),
    ("leaky_relu", {"negative_slope": 0.3}),
    ("leaky_relu", {}),
    ("elu", {"alpha": 0.7}),
    ("elu", {}),
    ("gelu", {"approximate": "tanh"}),
    ("gelu", {}),
    ("silu", {}),
    ("sigmoid", {}),
    ("tanh", {}),
    ("hardswish", {}),
    ("hardsigmoid", {}),
    ("clamp", {"min": -0.5, "max": 0.5}),
    ("clamp", {"min": 0.2}),
    ("clamp", {"max": 0.2}),
    ("softmax", {"dim": 1}),
    ("max_pool2d", {"kernel_size": 2}),
    ("max_pool2d", {"kernel_size": [3, 2], "stride": [2, 1], "padding": 1, "dilation": 1, "ceil_mode": True}),
    ("max_pool2d", {"kernel_size": 3, "stride": 1, "padding": [1, 0], "dilation": [2, 1]}),
    ("avg_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("avg_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
    ("avg_pool2d", {"kernel_size": 3, "stride": 2, "ceil_mode": True}),
    ("adaptive_avg_pool2d", {"output_size": [1, 1]}),
    ("adaptive_avg_pool2d", {"output_size": 1}),
    ("adaptive_avg_pool2d", {"output_size": [4, 3]}),
    ("mean", {"dims": [2, 3], "keepdim": False}),
    ("mean", {"dims": [-1], "keepdim": True}),
    ("flatten", {"start_dim": 1}),
    ("flatten", {"start_dim": 2, "end_dim": 3}),
    ("reshape", {"shape": [2, 2, 48]}),
    ("permute", {"dims": [0, 2, 3, 1]}),
    ("slice", {"dim": 1, "start": 1, "length": 2}),
    ("pad", {"pads": [1, 2, 0, 3]}),
    ("concat", {"dim": 1}),
    ("add", {}),
    ("sub", {}),
    ("mul", {}),
    ("div", {}),
    ("batch_norm", {"eps": 1e-3}),
]
OF_TWO = ("concat", "add", "sub", "mul", "div")


def both(node: Node, weights: dict[str, dict[str, torch.Tensor]]) -> None:
    nodes = [Node("twice", "mul", (INPUT,)), node]
    weights = {"twice": {"constant": torch.tensor(2.0)}, **weights}
    model = QuantizedModel(CapturedModel(nodes, weights, (4, 8, 6)))
    (found,) = open_session(onnx_model(model)).run(None, {INPUT: IMAGES.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("op", "attributes"), CASES)
def test_operator(op: str, attributes: dict[str, Any]) -> None:
    inputs = ("twice", INPUT) if op in OF_TWO else ("twice",)
    norm = {"running_mean": PER_CHANNEL, "running_var": PER_CHANNEL.abs()}
    both(Node("node", op, inputs, attributes), {"node": norm} if op == "batch_norm" else {})


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("constant", [torch.tensor(3.0), PER_CHANNEL.reshape(1, 4, 1, 1)], ids=["scalar", "channels"])
def test_operator_with_a_constant(op: str, constant: torch.Tensor) -> None:
    both(Node("node", op, ("twice",)), {"node": {"constant": constant}})


def test_norm_with_weight_and_bias() -> None:
    norm = {"running_mean": PER_CHANNEL, "running_var": PER_CHANNEL.abs(), "weight": PER_CHANNEL, "bias": -PER_CHANNEL}
    both(Node("node", "batch_norm", ("twice",), {"eps": 1e-5}), {"node": norm})


def test_every_operator_is_written_and_tested() -> None:
    assert set(OPERATORS) == WRITTEN
    assert {op for op, _ in CASES} | {*LAYERS, QUANTIZE} == WRITTEN


@pytest.mark.parametrize(
    ("op", "attributes", "why"),
    [
        ("adaptive_avg_pool2d", {"output_size": [3, 3]}, "unequal size"),
        ("avg_pool2d", {"kernel_size": 2, "divisor_override": 3}, "divisor_override"),
    ],
)
def test_what_onnx_has_no_operator_for_is_refused_by_name(op: str, attributes: dict[str, Any], why: str) -> None:
    model = QuantizedModel(CapturedModel([Node("pool", op, (INPUT,), attributes)], {}, (4, 8, 6)))
    with pytest.raises(OnnxExportError, match=rf"{op} 'pool'.*{why}") as raised:
        onnx_model(model)
    assert raised.value.code == "onnx_export_unsupported"

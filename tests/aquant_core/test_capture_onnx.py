"""ONNX files, exported or written node by node, are captured so that they give what onnxruntime gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from aquant_core.capture_onnx import capture_onnx
from aquant_core.errors import (
    AQuantError,
    CaptureMismatchError,
    ModelFormatError,
    NonFiniteError,
    UnsupportedOperatorError,
    memory_is_full,
)
from aquant_core.graph import CapturedModel
from aquant_core.onnx_file import onnx_input_shape

node = helper.make_node
FLOAT = TensorProto.FLOAT


def array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def images(count: int = 2, channels: int = 3, height: int = 7, width: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, channels, height, width, generator=torch.Generator().manual_seed(seed))


CONV = node("Conv", ["x", "conv.weight"], ["c"], name="first", pads=[1, 1, 1, 1])
"""Gives c: (N, 4, 7, 6)."""

CONV_WEIGHT = {"conv.weight": array(4, 3, 3, 3)}


def model_of(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    shape: tuple[Any, ...] = ("n", 3, 7, 6),
    output: str = "y",
    opset: int = 18,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", FLOAT, shape)],
        [helper.make_tensor_value_info(output, FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def write(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def captured_from(path: Path, model: onnx.ModelProto, example: Tensor | None = None) -> CapturedModel:
    return capture_onnx(write(path, model), images() if example is None else example)


def assert_reproduced(path: Path, model: onnx.ModelProto, fresh: Tensor | None = None) -> CapturedModel:
    """Captures on one batch; compares with onnxruntime on another."""
    captured = captured_from(path, model)
    fresh = images(5, seed=9) if fresh is None else fresh
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": fresh.numpy()})
    assert np.abs(expected).max() > 1e-3
    torch.testing.assert_close(captured(fresh), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    return captured


def operators(captured: CapturedModel) -> list[str]:
    return [n.op for n in captured.nodes]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.max_pool2d(x + F.hardswish(self.block(x)), 2)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def test_a_network_exported_by_torch(tmp_path: Path) -> None:
    model = Small().eval()
    model.stem[1].running_mean.uniform_(-1, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(
            model, (torch.zeros(2, 3, 8, 8),), str(tmp_path / "a.onnx"), dynamo=True, external_data=False,
            input_names=["x"], dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False,
        )  # fmt: skip
    assert onnx_input_shape(tmp_path / "a.onnx") == (3, 8, 8)
    captured = capture_onnx(tmp_path / "a.onnx", images(2, 3, 8, 8))
    fresh = images(5, 3, 8, 8, seed=4)
    with torch.inference_mode():
        torch.testing.assert_close(captured(fresh), model(fresh), rtol=1e-4, atol=1e-5)
    assert [n.op for n in captured.layers] == ["conv2d", "conv2d", "linear"]
    assert [n.name for n in captured.layers][1:] == ["block", "fc"]  # the paths that the exporter kept


def test_a_matrix_product_and_a_sum_are_one_layer(tmp_path: Path) -> None:
    model = model_of(
        [
            node("Flatten", ["x"], ["f"]),
            node("MatMul", ["f", "w"], ["m"], name="head"),
            node("Add", ["b", "m"], ["y"]),
        ],
        {"w": array(126, 5), "b": array(5)},
    )
    captured = assert_reproduced(tmp_path / "a", model)
    assert operators(captured) == ["flatten", "linear"]
    assert set(captured.weights["head"]) == {"weight", "bias"}


def test_a_matrix_product_that_is_read_twice_keeps_its_own_value(tmp_path: Path) -> None:
    model = model_of(
        [
            node("Flatten", ["x"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Add", ["m", "b"], ["a"]),
            node("Mul", ["a", "m"], ["y"]),
        ],
        {"w": array(126, 5), "b": array(5)},
    )
    assert operators(assert_reproduced(tmp_path / "a", model)) == ["flatten", "linear", "add", "mul"]


def test_a_matrix_product_under_another_name_keeps_its_own_value(tmp_path: Path) -> None:
    model = model_of(
        [
            node("Flatten", ["x"], ["f"]),
            node("MatMul", ["f", "w"], ["m"]),
            node("Identity", ["m"], ["alias"]),
            node("Add", ["m", "b"], ["a"]),
            node("Mul", ["a", "alias"], ["y"]),
        ],
        {"w": array(126, 5), "b": array(5)},
    )
    assert_reproduced(tmp_path / "a", model)


@pytest.mark.parametrize("pads", [[0, 1, 2, 0], [0, 0, 1, 1], [1, 2, 1, 2]])
def test_uneven_pads(tmp_path: Path, pads: list[int]) -> None:
    model = model_of(
        [node("Conv", ["x", "w", "b"], ["y"], pads=pads, strides=[2, 1])], {"w": array(4, 3, 3, 3), "b": array(4)}
    )
    captured = assert_reproduced(tmp_path / "a", model)
    uneven = pads[:2] != pads[2:]
    assert operators(captured) == (["pad", "conv2d"] if uneven else ["conv2d"])


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [((3, 3), 2), ((2, 4), 1), ((3, 2), 3), ((1, 1), 2)])
def test_automatic_padding(tmp_path: Path, mode: str, kernel: tuple[int, int], stride: int) -> None:
    conv = node("Conv", ["x", "w"], ["y"], auto_pad=mode, strides=[stride, stride])
    assert_reproduced(tmp_path / "a", model_of([conv], {"w": array(4, 3, *kernel)}))


def test_the_flattening_idiom_of_older_exporters(tmp_path: Path) -> None:
    model = model_of(
        [
            CONV,
            node("GlobalAveragePool", ["c"], ["p"]),
            node("Shape", ["p"], ["s"]),
            node("Constant", [], ["zero"], value=numpy_helper.from_array(np.array(0, np.int64))),
            node("Gather", ["s", "zero"], ["n"]),
            node("Unsqueeze", ["n", "axes"], ["n1"]),
            node("Concat", ["n1", "rest"], ["shape"], axis=0),
            node("Reshape", ["p", "shape"], ["f"]),
            node("Gemm", ["f", "fc.weight", "fc.bias"], ["y"], transB=1),
        ],
        CONV_WEIGHT | {"axes": ints(0), "rest": ints(-1), "fc.weight": array(5, 4), "fc.bias": array(5)},
    )
    captured = assert_reproduced(tmp_path / "a", model)
    assert operators(captured) == ["conv2d", "adaptive_avg_pool2d", "reshape", "linear"]
    assert [n.name for n in captured.layers] == ["conv", "fc"]


NODES: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "clip to six": ([node("Clip", ["c", "low", "six"], ["y"])], {"low": np.float32(0), "six": np.float32(6)}),
    "clip": ([node("Clip", ["c", "", "high"], ["y"])], {"high": np.float32(0.5)}),
    "clip nothing": ([node("Clip", ["c"], ["y"])], {}),
    "relu": ([node("Relu", ["c"], ["y"])], {}),
    "sigmoid": ([node("Sigmoid", ["c"], ["y"])], {}),
    "tanh": ([node("Tanh", ["c"], ["y"])], {}),
    "leaky": ([node("LeakyRelu", ["c"], ["y"], alpha=0.2)], {}),
    "elu": ([node("Elu", ["c"], ["y"], alpha=0.7)], {}),
    "softmax": ([node("Softmax", ["c"], ["y"], axis=1)], {}),
    "hard swish": ([node("HardSwish", ["c"], ["y"])], {}),
    "hard sigmoid": ([node("HardSigmoid", ["c"], ["y"], alpha=1 / 6, beta=0.5)], {}),
    "identity": ([node("Identity", ["c"], ["d"]), node("Cast", ["d"], ["y"], to=FLOAT)], {}),
    "norm": ([node("BatchNormalization", ["c", "g", "b", "m", "v"], ["y"], epsilon=0.1)],
             {"g": array(4), "b": array(4, seed=1), "m": array(4, seed=2), "v": np.abs(array(4, seed=3))}),
    "max pool": ([node("MaxPool", ["c"], ["y"], kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 0],
                       ceil_mode=1, dilations=[1, 2])], {}),
    "average pool": ([node("AveragePool", ["c"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])], {}),
    "average pool of pads": ([node("AveragePool", ["c"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1],
                                   count_include_pad=1)], {}),
    "reduce mean": ([node("ReduceMean", ["c", "axes"], ["y"], keepdims=0)], {"axes": ints(2, 3)}),
    "flatten": ([node("Flatten", ["c"], ["y"])], {}),
    "transpose": ([node("Transpose", ["c"], ["y"], perm=[0, 2, 3, 1])], {}),
    "reshape with zeros": ([node("Reshape", ["c", "s"], ["y"])], {"s": ints(0, 2, -1, 6)}),
    "squeeze": ([node("GlobalAveragePool", ["c"], ["p"]), node("Squeeze", ["p", "axes"], ["y"])],
                {"axes": ints(2, -1)}),
    "unsqueeze": ([node("Unsqueeze", ["c", "axes"], ["y"])], {"axes": ints(1)}),
    "split": ([node("Split", ["c", "sizes"], ["a", "b"], axis=1), node("Concat", ["b", "a"], ["y"], axis=1)],
              {"sizes": ints(1, 3)}),
    "split evenly": ([node("Split", ["c"], ["a", "b"], axis=1, num_outputs=2), node("Sub", ["a", "b"], ["y"])], {}),
    "slice": ([node("Slice", ["c", "from", "to", "axes"], ["y"])],
              {"from": ints(-3), "to": ints(2**62), "axes": ints(2)}),
    "pad": ([node("Pad", ["c", "pads"], ["y"])], {"pads": ints(0, 0, 1, 2, 0, 0, 3, 0)}),
    "add": ([node("Relu", ["c"], ["r"]), node("Add", ["c", "r"], ["y"])], {}),
    "constants": ([node("Mul", ["two", "c"], ["d"]), node("Div", ["d", "k"], ["e"]), node("Sub", ["e", "k"], ["y"])],
                  {"two": np.float32(2), "k": array(1, 4, 1, 1) + 5}),
    "squeeze-and-excite": ([node("GlobalAveragePool", ["c"], ["p"]), node("Conv", ["p", "w"], ["q"]),
                            node("Sigmoid", ["q"], ["g"]), node("Mul", ["c", "g"], ["y"])], {"w": array(4, 4, 1, 1)}),
    "gemm scaled": ([node("Flatten", ["c"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"], alpha=0.5, beta=2.0)],
                    {"w": array(168, 3), "b": array(3)}),
    "gemm with one bias": ([node("Flatten", ["c"], ["f"]), node("Gemm", ["f", "w", "b"], ["y"])],
                           {"w": array(168, 3), "b": array(1)}),
    "constant weight": ([node("Constant", [], ["w"], value=numpy_helper.from_array(array(2, 4, 1, 1))),
                         node("Conv", ["c", "w"], ["y"])], {}),
    "folded weight": ([node("Transpose", ["t"], ["w"], perm=[3, 2, 0, 1]), node("Conv", ["c", "w"], ["y"])],
                      {"t": array(3, 3, 4, 2)}),
}  # fmt: skip


@pytest.mark.parametrize("name", NODES)
def test_operators(tmp_path: Path, name: str) -> None:
    nodes, constants = NODES[name]
    captured = assert_reproduced(tmp_path / "a", model_of([CONV, *nodes], CONV_WEIGHT | constants))
    if name == "clip to six":
        assert operators(captured) == ["conv2d", "relu6"]


def test_gelu(tmp_path: Path) -> None:
    for approximate in ("none", "tanh"):
        gelu = node("Gelu", ["c"], ["y"], approximate=approximate)
        assert_reproduced(tmp_path / "a", model_of([CONV, gelu], CONV_WEIGHT, opset=20))


def test_clip_by_attributes_of_old_opsets(tmp_path: Path) -> None:
    model = model_of([CONV, node("Clip", ["c"], ["y"], min=0.0, max=6.0)], CONV_WEIGHT, opset=9)
    assert operators(assert_reproduced(tmp_path / "a", model)) == ["conv2d", "relu6"]


def test_a_fixed_batch_of_one_becomes_free(tmp_path: Path) -> None:
    nodes = [CONV, node("Reshape", ["c", "s"], ["y"])]
    model = model_of(nodes, CONV_WEIGHT | {"s": ints(1, -1)}, shape=(1, 3, 7, 6))
    captured = captured_from(tmp_path / "a", model)
    expected = F.conv2d(images(5, seed=9), torch.from_numpy(CONV_WEIGHT["conv.weight"]), padding=1).flatten(1)
    torch.testing.assert_close(captured(images(5, seed=9)), expected)


def test_a_newer_envelope_is_read(tmp_path: Path) -> None:
    model = model_of([CONV, node("Relu", ["c"], ["y"])], CONV_WEIGHT)
    model.ir_version = onnx.IR_VERSION
    assert operators(captured_from(tmp_path / "a", model)) == ["conv2d", "relu"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(("n", 3, 7, 6), (3, 7, 6)), ((1, 3, "h", "w"), (3, None, None)), ((None, None, None, 6), (None, None, 6))],
)
def test_declared_input_shapes(tmp_path: Path, shape: tuple[Any, ...], expected: tuple[int | None, ...]) -> None:
    assert onnx_input_shape(write(tmp_path / "a", model_of([CONV], CONV_WEIGHT, shape=shape))) == expected


UNSUPPORTED: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], str]] = {
    "operator": ([node("Erf", ["c"], ["y"], name="gelu/Erf")], {}, "Operator Erf at 'gelu/Erf'"),
    "unnamed operator": ([node("Erf", ["c"], ["y"])], {}, "Operator Erf at 'Erf_1'"),
    "domain": ([node("FusedConv", ["c"], ["y"], domain="com.microsoft")], {}, r"com\.microsoft\.FusedConv"),
    "hard sigmoid": ([node("HardSigmoid", ["c"], ["y"])], {}, r"HardSigmoid with alpha 0\.2"),
    "computed matrix": ([node("Transpose", ["c"], ["t"], perm=[0, 1, 3, 2]), node("MatMul", ["c", "t"], ["y"])], {},
                        "MatMul with a computed 't'"),
    "computed weight": ([node("Conv", ["c", "c"], ["y"])], {}, "Conv with a computed 'c'"),
    "transposed": ([node("Flatten", ["c"], ["f"]), node("Gemm", ["f", "w"], ["y"], transA=1)], {"w": array(2, 3)},
                   "transA"),
    "constant minus": ([node("Sub", ["k", "c"], ["y"])], {"k": array(1)}, "Sub with a constant on the left"),
    "integer": ([node("Cast", ["c"], ["y"], to=TensorProto.INT64)], {}, "Cast to another type"),
    "reflected": ([node("Pad", ["c", "p"], ["y"], mode="reflect")], {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)},
                  "Pad other than"),
    "steps": ([node("Slice", ["c", "a", "b", "x0", "s"], ["y"])],
              {"a": ints(0), "b": ints(4), "x0": ints(2), "s": ints(2)}, "with a step"),
    "uneven pool": ([node("MaxPool", ["c"], ["y"], kernel_shape=[2, 2], pads=[0, 0, 1, 1])], {}, "MaxPool with uneven"),
    "all axes": ([node("ReduceMean", ["c"], ["y"])], {}, "ReduceMean over all axes"),
    "mixed batch": ([node("Reshape", ["c", "s"], ["y"])], {"s": ints(-1, 6)}, "mixes images of a batch"),
    "constant concat": ([node("Concat", ["c", "k"], ["y"], axis=1)], {"k": array(2, 1, 7, 6)},
                        "Concat with a constant"),
    "subgraph": ([node("Constant", [], ["t"], value=numpy_helper.from_array(np.array(True))),
                  node("If", ["t"], ["y"], then_branch=model_of([CONV]).graph, else_branch=model_of([CONV]).graph)], {},
                 "If .with a subgraph."),
    "constant output": ([node("Identity", ["k"], ["y"])], {"k": array(2, 3)}, "does not depend on the input"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_operators_are_named(tmp_path: Path, name: str) -> None:
    nodes, constants, reason = UNSUPPORTED[name]
    with pytest.raises(UnsupportedOperatorError, match=reason):
        captured_from(tmp_path / "a", model_of([CONV, *nodes], CONV_WEIGHT | constants))


def test_networks_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match="no convolution and no linear layer"):
        captured_from(tmp_path / "a", model_of([node("Relu", ["x"], ["y"])]))
    flat = model_of([node("MatMul", ["x", "w"], ["y"])], {"w": array(6, 2)}, shape=("n", 6))
    with pytest.raises(UnsupportedOperatorError, match="Input 'x' has 2 dimensions"):
        onnx_input_shape(write(tmp_path / "b", flat))
    two = model_of([CONV], CONV_WEIGHT, output="c")
    two.graph.output.append(helper.make_tensor_value_info("x", FLOAT, None))
    with pytest.raises(UnsupportedOperatorError, match="1 inputs and 2 outputs"):
        captured_from(tmp_path / "c", two)


def test_weights_outside_the_file_are_refused(tmp_path: Path) -> None:
    model = model_of([CONV], CONV_WEIGHT, output="c")
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/hostname"
    with pytest.raises(ModelFormatError, match=r"'conv\.weight' is kept outside the file"):
        captured_from(tmp_path / "a", model)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    weight = CONV_WEIGHT["conv.weight"].copy()
    weight[0, 0, 0, 0] = np.inf
    with pytest.raises(NonFiniteError, match=r"Weight conv\.weight"):
        captured_from(tmp_path / "a", model_of([CONV], {"conv.weight": weight}, output="c"))


CONTRADICTIONS: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray]]] = {
    "missing input": ([node("Relu", ["nowhere"], ["y"])], {}),
    "missing attribute": ([node("MaxPool", ["c"], ["y"])], {}),
    "missing weight": ([node("Conv", ["c"], ["y"])], {}),
    "no inputs": ([node("Relu", [], ["y"])], {}),
    "two pads": ([node("Conv", ["c", "w"], ["y"], pads=[1, 1])], {"w": array(2, 4, 3, 3)}),
    "zero stride": ([node("Conv", ["c", "w"], ["y"], strides=[0, 0], auto_pad="SAME_UPPER")], {"w": array(2, 4, 3, 3)}),
    "channels": ([node("Conv", ["c", "w"], ["y"])], {"w": array(2, 5, 3, 3)}),
    "reshape": ([node("Reshape", ["c", "s"], ["y"])], {"s": ints(0, 11)}),
    "axis": ([node("Concat", ["c", "c"], ["y"], axis=9)], {}),
    "attribute type": ([node("LeakyRelu", ["c"], ["y"], alpha="steep")], {}),
    "negative kernel": ([node("MaxPool", ["c"], ["y"], kernel_shape=[-1, -1])], {}),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_are_refused(tmp_path: Path, name: str) -> None:
    nodes, constants = CONTRADICTIONS[name]
    with pytest.raises(ModelFormatError):
        captured_from(tmp_path / "a", model_of([CONV, *nodes], CONV_WEIGHT | constants))


def test_images_of_a_wrong_size_name_the_layer(tmp_path: Path) -> None:
    nodes = [CONV, node("Flatten", ["c"], ["f"]), node("Gemm", ["f", "fc.weight"], ["y"])]
    model = model_of(nodes, CONV_WEIGHT | {"fc.weight": array(168, 3)}, shape=("n", 3, "h", "w"))
    captured_from(tmp_path / "a", model)
    with pytest.raises(ModelFormatError, match=r"linear 'fc' cannot take inputs of shape \[\(2, 256\)\]"):
        captured_from(tmp_path / "a", model, images(2, 3, 8, 8))


def test_a_full_memory_is_no_matter_of_the_graph(tmp_path: Path) -> None:
    pads = ints(0, 0, 1 << 22, 1 << 22, 0, 0, 1 << 22, 1 << 22)
    with pytest.raises(RuntimeError) as caught:
        captured_from(tmp_path / "a", model_of([CONV, node("Pad", ["c", "pads"], ["y"])], CONV_WEIGHT | {"pads": pads}))
    assert memory_is_full(caught.value)


def test_a_graph_that_is_read_wrongly_is_found_by_comparing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aquant_core import graph

    monkeypatch.setitem(graph.OPERATORS, "relu", lambda _, __, x: F.relu(x) + 0.1)
    with pytest.raises(CaptureMismatchError, match=r"differs from the ONNX model by 0\.1"):
        captured_from(tmp_path / "a", model_of([CONV, node("Relu", ["c"], ["y"])], CONV_WEIGHT))


@pytest.mark.parametrize("data", [b"", b"no network at all", b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000)])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ModelFormatError, match=r"not ONNX|no ONNX graph"):
        onnx_input_shape(tmp_path / "a")
    with pytest.raises(ModelFormatError):
        capture_onnx(tmp_path / "a", images())


def small_file() -> bytes:
    nodes, constants = NODES["clip to six"]
    tail = [node("GlobalAveragePool", ["y"], ["p"]), node("Flatten", ["p"], ["f"]), node("Gemm", ["f", "w"], ["z"])]
    model = model_of([CONV, *nodes, *tail], CONV_WEIGHT | constants | {"w": array(4, 2)}, output="z")
    return bytes(model.SerializeToString())


FILE = small_file()


@given(length=st.integers(0, len(FILE) - 1))
@settings(max_examples=60, deadline=None)
def test_cut_off_files_are_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.onnx"
    path.write_bytes(FILE[:length])
    with pytest.raises(AQuantError):
        capture_onnx(path, images())


@example(position=696, value=0)  # the input loses its shape
@given(position=st.integers(0, len(FILE) - 1), value=st.integers(0, 255))
@settings(max_examples=100, deadline=None)
def test_a_wrong_byte_is_survived_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path, data = tmp_path_factory.getbasetemp() / "flipped.onnx", bytearray(FILE)
    data[position] = value
    path.write_bytes(data)
    try:
        captured = capture_onnx(path, images())
    except AQuantError:
        return
    assert captured(images()).shape[0] == 2


def test_a_half_precision_input_is_named(tmp_path: Path) -> None:
    model = model_of([helper.make_node("Relu", ["x"], ["y"])])
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    with pytest.raises(ModelFormatError, match="Input 'x' is float16") as caught:
        captured_from(tmp_path / "half.onnx", model)
    assert "float32" in caught.value.remedy

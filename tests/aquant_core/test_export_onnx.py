"""The exported ONNX: the same codes in onnxruntime for every method and kind of layer, packed, plain and stable."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import aquant_core
from aquant_core import onnx_graph
from aquant_core.capture_model import capture
from aquant_core.config import BorderConfig, QuantizationConfig
from aquant_core.errors import OnnxExportError
from aquant_core.export_onnx import onnx_model, write_onnx
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import INPUT
from aquant_core.methods import METHODS
from aquant_core.model import QuantizedModel, marked, quantize_to_nearest
from aquant_core.onnx_agreement import codes_of, compare, open_session

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = torch.randn(16, 3, 13, 12, generator=torch.Generator().manual_seed(1))
CHANNEL = {"fusion": "none", "granularity": "channel"}


class Net(nn.Module):
    """Every kind of layer: strided, padded, dilated, grouped, depthwise, uneven kernels, with and without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.flat = nn.Conv2d(16, 16, (1, 3), padding=(0, 1))
        self.grouped = nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=2, bias=False)
        self.downsample = nn.Conv2d(16, 32, 1, 2)
        self.last = nn.Conv2d(32, 32, (3, 1), stride=(2, 1), padding=(1, 0))
        self.hidden = nn.Linear(32, 16)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.flat(nn.functional.relu6(self.depthwise(x))))
        x = torch.relu(self.downsample(x) + nn.functional.max_pool2d(self.grouped(x), 3, 2, 1))
        x = nn.functional.leaky_relu(self.last(x), 0.1)
        return self.fc(torch.tanh(self.hidden(x.mean((2, 3)))))


def network(
    border: dict[str, Any] | None = None, spread: float = 0.3, module: nn.Module | None = None, **changes: Any
) -> QuantizedModel:
    """The network, rounded to nearest, with borders drawn at random if there are to be any."""
    torch.manual_seed(0)
    config = QuantizationConfig(**{"weight_bits": 3, "activation_bits": 3, "method": "nearest"} | changes)
    method = METHODS[config.method]
    graph = marked(fold_batch_norm(capture((module or Net()).eval(), example=IMAGES)), config, method)
    model = quantize_to_nearest(graph, IMAGES, config, method.placement)
    for layer in model.layers.values():
        layer.a_rounding = method.a_rounding
        if border is not None and layer.activation_scale is not None:
            layer.add_border(BorderConfig(**border))
            assert layer.border is not None
            with torch.no_grad():
                layer.border.coefficients.normal_(0, spread)
                if layer.border.alpha is not None:
                    layer.border.alpha.uniform_(0, 1)
            layer.border.round_to_stored()
    return model.requires_grad_(False).eval()


VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {"border": {}},
    "fused, learned alpha, linear, stretched": {"border": {"form": "linear", "alpha": "learned", "bound": "stretched"}},
    "by position": {"border": {"fusion": "none"}},
    "by position, clip": {"border": {"fusion": "none", "bound": "clip"}},
    "by position, 8 bits": {"border": {"fusion": "none"}, "weight_bits": 8, "activation_bits": 8},
    "by channel, 2 bits": {"border": CHANNEL, "weight_bits": 2, "activation_bits": 2, "first_last_bits": 2},
    "by channel, 3 bits, clip": {"border": CHANNEL | {"bound": "clip"}},
    "by channel, 4 bits, linear": {"border": CHANNEL | {"form": "linear"}, "weight_bits": 4, "activation_bits": 4},
    "by channel, 5 and 6 bits": {"border": CHANNEL, "weight_bits": 5, "activation_bits": 6},
    "by channel, 8 and 2 bits": {"border": CHANNEL, "weight_bits": 8, "activation_bits": 2},
    "by channel, 8 bits": {"border": CHANNEL, "weight_bits": 8, "activation_bits": 8},
    "steep borders by channel": {"border": CHANNEL, "spread": 4.0},
    "borders kept at 8 bits": {"border": {"bits": 8}},
    "some layers float": {"border": {}, "layers": {"last": {"weight_bits": 32}, "flat": {"activation_bits": 32}}},
    "float weights": {"border": CHANNEL, "weight_bits": 32},
    "nearest": {},
    "nearest, 2 bits": {"weight_bits": 2, "activation_bits": 2, "protocol": "all-low-bit"},
    "nearest, 8 bits": {"weight_bits": 8, "activation_bits": 8},
    "quantized shortcuts": {"border": {}, "protocol_switches": {"shortcut": "low"}},
    "a_rounding": {"method": "a_rounding"},
    "a_rounding, float weights": {"method": "a_rounding", "weight_bits": 32, "activation_bits": 2},
    "qdrop_refactored": {"method": "qdrop_refactored"},
    "adaround": {"method": "adaround", "protocol": "all-low-bit"},
    "brecq": {"method": "brecq", "protocol": "brecq", "weight_bits": 2, "activation_bits": 2},
    "qdrop": {"method": "qdrop"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_codes_are_the_specification_s_and_logits_follow(variant: str) -> None:
    model = network(**VARIANTS[variant])
    exported = onnx_model(model)
    onnx.checker.check_model(exported, full_check=True)
    assert {node.domain for node in exported.graph.node} == {""}
    found = compare(model, exported, IMAGES)
    assert len(found.codes) >= 4
    assert sum(found.differing_given_input.values()) == 0
    assert found.logits_difference < 1e-5
    assert found.same_top1 >= 15
    if not variant.startswith("a_rounding"):  # whose flips hang on sums of errors, so on the last bits of every value
        assert found.images_with_all_codes >= 13, found


def test_other_images_and_batch_sizes() -> None:
    model = network(border={})
    found = compare(model, onnx_model(model), 3 * IMAGES[:1])
    assert (found.images, sum(found.differing_given_input.values())) == (1, 0)


def test_without_quantization_it_is_the_float_network() -> None:
    model = network(weight_bits=32, activation_bits=32)
    exported = onnx_model(model)
    found = compare(model, exported, IMAGES)
    assert (found.codes, found.images_with_all_codes, found.same_top1) == ({}, 16, 16)
    assert found.logits_difference < 1e-5
    assert "MatMulInteger" not in operators(exported)


def test_the_example_network_decides_as_the_checkpoint() -> None:
    folder = EXAMPLES / "fashion_mnist"
    border = {"fusion": "none", "granularity": "channel"}
    config = QuantizationConfig(weight_bits=2, activation_bits=2, iterations=2, preset="smoke", border=border)
    calibration = aquant_core.read_images(folder / "calibration.npz").images[:64]
    model = aquant_core.quantize(folder / "residual.onnx", calibration, config).model
    images = aquant_core.read_images(folder / "evaluation.npz").images[:100]
    found = compare(model, onnx_model(model), images)
    assert sum(found.differing_given_input.values()) == 0
    assert found.share_differing < 1e-4
    assert found.same_top1 == 100


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize(
    ("bits", "kind", "opset"),
    [(2, TensorProto.UINT2, 25), (3, TensorProto.UINT4, 21), (4, TensorProto.UINT4, 21), (5, TensorProto.UINT8, 21)],
)
def test_weights_are_packed_at_the_narrowest_type(bits: int, kind: int, opset: int) -> None:
    model = network(border=CHANNEL, weight_bits=bits, activation_bits=4, first_last_bits=4)
    exported = onnx_model(model)
    assert [entry.version for entry in exported.opset_import] == [opset]
    tensors = {tensor.name: tensor for tensor in exported.graph.initializer}
    if bits <= 4:
        weight = tensors["flat/weight"]
        width = {TensorProto.UINT2: 2, TensorProto.UINT4: 4}[kind]
        assert (weight.data_type, len(weight.raw_data)) == (kind, 16 * 16 * 3 * width // 8)
        rounding = model.layers["flat"].weight
        assert rounding is not None
        codes = numpy_helper.to_array(weight).astype(np.uint8).reshape(3, 16, 16)  # (K, C, O)
        np.testing.assert_array_equal(codes.transpose(2, 1, 0), rounding.codes.reshape(16, 16, 3).numpy())
    floats = sum(len(t.raw_data) for t in exported.graph.initializer if t.data_type == TensorProto.FLOAT)
    assert floats < 4 * (16 + 32 + 32 + 16 + 5) * 10 + 4 * (16 * 9 + 3 * 9 * 16)  # no weight beside the packed ones


def test_a_network_by_channel_multiplies_integers() -> None:
    exported = onnx_model(network(border=CHANNEL, weight_bits=2, activation_bits=2))
    found = operators(exported)
    assert (found["MatMulInteger"], found["ConvInteger"]) == (5, 1)
    assert found["Conv"] == 2  # the stem, of three channels, and the depthwise layer
    assert found["Greater"] >= 3 * 6
    assert found["Where"] == 0


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 2), (4, 4), (8, 2), (6, 8), (7, 8), (8, 7), (8, 8)])
def test_no_pair_of_products_passes_int16_where_weights_are_signed(weight_bits: int, activation_bits: int) -> None:
    """What CPUs without VNNI add in int16, saturating; unsigned weights they multiply exactly."""
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits, "first_last_bits": 8}
    exported = onnx_model(network(**bits))
    typed = onnx.shape_inference.infer_shapes(exported)
    kinds = {value.name: value.type.tensor_type.elem_type for value in typed.graph.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in exported.graph.initializer}
    layer = next(node for node in exported.graph.node if node.op_type == "MatMulInteger")
    largest = min(2**weight_bits - 1, 128)
    fits = 2 * (2**activation_bits - 1) * largest <= 32767
    assert kinds[layer.input[1]] == (TensorProto.INT8 if fits else TensorProto.UINT8)
    assert kinds[layer.input[3]] == kinds[layer.input[1]]


def test_same_bytes_for_the_same_checkpoint(tmp_path: Path) -> None:
    config = {"weight_bits": 2, "activation_bits": 2, "iterations": 2, "preset": "smoke"}
    torch.manual_seed(0)
    result = aquant_core.quantize(Net().eval(), IMAGES, config)
    result.save(tmp_path / "quantized.safetensors")
    result.export_onnx(tmp_path / "of_the_run.onnx")
    for name in ("a", "b"):
        write_onnx(aquant_core.load(tmp_path / "quantized.safetensors"), tmp_path / f"{name}.onnx")
    written = [(tmp_path / f"{name}.onnx").read_bytes() for name in ("of_the_run", "a", "b")]
    assert written[0] == written[1] == written[2]
    again = onnx.load(tmp_path / "a.onnx")
    assert again.SerializeToString(deterministic=True) == written[0]
    loaded = aquant_core.load(tmp_path / "quantized.safetensors")
    assert isinstance(loaded, QuantizedModel)
    assert sum(compare(loaded, again, IMAGES).differing_given_input.values()) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".onnx"] * 3 + [".safetensors"]


def test_a_float_export_is_captured_again(tmp_path: Path) -> None:
    """By this package's own reader, which finds in it the network that was written."""
    model = network(weight_bits=32, activation_bits=32)
    onnx.save(onnx_model(model), tmp_path / "float.onnx")
    again = capture(tmp_path / "float.onnx", example=IMAGES)
    torch.testing.assert_close(again(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


def test_values_bear_the_nodes_names() -> None:
    model = network(border={})
    exported = onnx_model(model)
    named = {name for node in exported.graph.node for name in node.output}
    assert {node.name for node in model.graph.nodes[:-1]} <= named
    assert {f"{name}.codes" for name in model.layers} <= named
    assert [value.name for value in exported.graph.output] == ["logits"]
    session = open_session(exported)
    assert session.get_inputs()[0].shape == ["N", 3, 13, 12]
    assert session.get_inputs()[0].name == INPUT
    assert session.get_outputs()[0].shape == ["N", 5]


def test_a_difference_is_found() -> None:
    """What compares must see a wrong border, or all the comparisons above say nothing."""
    model = network(border={"fusion": "none"})
    exported = onnx_model(model)
    other = copy.deepcopy(model)
    border = other.layers["flat"].border
    assert border is not None
    border.coefficients[0] += 0.2
    found = compare(other, exported, IMAGES)
    assert found.differing_given_input["flat"] > 0
    assert [name for name, count in found.differing_given_input.items() if count] == ["flat"]
    assert found.images_with_all_codes < 16
    assert 0 < found.share_differing < 1


def test_codes_of_a_layer_are_what_its_output_is_made_of() -> None:
    """Against the layer itself: x_hat = s (q - z), multiplied by its weight."""
    model = network(border={})
    layer = model.layers["flat"]
    assert layer.activation_scale is not None
    assert layer.weight is not None
    x = torch.randn(2, 16, 7, 6)
    columns = layer.activation_scale * (codes_of(layer, x).float() - layer.zero_point)  # (N, C K, L)
    expected = (layer.weight().flatten(1) @ columns).reshape(2, 16, 7, 6) + layer.bias[:, None, None]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"aquant_core.load.*Linear"):
        onnx_model(nn.Linear(2, 2))
    with pytest.raises(TypeError):
        write_onnx(nn.Linear(2, 2), tmp_path / "quantized.onnx")
    assert list(tmp_path.iterdir()) == []


def test_more_than_a_file_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST_BYTES", 1000)
    with pytest.raises(OnnxExportError, match="at most 1000"):
        write_onnx(network(), tmp_path / "quantized.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        write_onnx(network(), tmp_path / "missing" / "quantized.onnx")

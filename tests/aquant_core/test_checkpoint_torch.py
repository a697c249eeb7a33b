"""Networks and their checkpoints: what comes back, the same bytes when it is saved again, and how many they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from aquant_core import checkpoint, checkpoint_torch, quantizers
from aquant_core.architectures import build
from aquant_core.checkpoint_torch import load
from aquant_core.config import Method, QuantizationConfig
from aquant_core.errors import CheckpointError, DeviceError
from aquant_core.evaluation import logits_digest, logits_of
from aquant_core.images import ImageSet
from aquant_core.model import QuantizedModel
from aquant_core.pipeline import QuantizationResult, quantize

EVALUATION = ImageSet(torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(2)))


class Net(nn.Module):
    """Convolutions of three kinds, a norm, a shortcut and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.pointwise(torch.relu(self.depthwise(x))))
        return self.fc(x.mean((2, 3)))


def quantized(**changes: Any) -> QuantizationResult:
    torch.manual_seed(0)
    config = {"weight_bits": 3, "activation_bits": 3, "iterations": 3, "preset": "smoke"} | changes
    images = ImageSet(torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    return quantize(Net().eval(), images, QuantizationConfig(**config), EVALUATION)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "quantized.safetensors"
    quantized(border={"alpha": "learned"}).save(path)
    return path


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """Bytes of the header, and the document in it."""
    length = int.from_bytes(path.read_bytes()[:8], "little")
    with safe_open(path, framework="pt") as file:
        return length, json.loads(file.metadata()["aquant"])


def rewrite(source: Path, target: Path, tensors: dict[str, np.ndarray], **document: Any) -> Path:
    """With valid digests, so that what is wrong is found by what it means."""
    checkpoint.write(target, header_of(source)[1] | document, tensors)
    return target


@pytest.mark.parametrize(
    "changes",
    [
        *({"method": method} for method in get_args(Method)),
        {"protocol_switches": {"shortcut": "low"}},
        {"protocol": "qdrop", "method": "qdrop"},
        {"protocol": "brecq", "method": "brecq"},
        {"protocol": "all-low-bit"},
        {"method": "a_rounding", "protocol_switches": {"shortcut": "low"}, "weight_bits": 32},
        {"method": "qdrop", "activation_bits": 32, "layers": {"pointwise": {"activation_bits": 4}}},
        {"border": {"alpha": "learned", "form": "linear", "bound": "stretched"}},
        {"border": {"granularity": "channel", "fusion": "none", "bound": "clip"}},
        {"border": {"fusion": "none", "bits": 8}},
        {"border": {"alpha": "learned", "bits": 8}},
        {"weight_bits": 32, "activation_bits": 2},
        {"weight_bits": 2, "activation_bits": 32},
        {"weight_bits": 32, "activation_bits": 32},
        {"weight_bits": 8, "activation_bits": 8, "layers": {"fc": {"weight_bits": 5, "activation_bits": 32}}},
    ],
    ids=str,
)
def test_what_is_loaded_gives_the_same_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = quantized(**changes)
    result.save(tmp_path / "q.safetensors")
    model = load(tmp_path / "q.safetensors")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert logits_digest(logits_of(model, EVALUATION.images)) == result.report["digests"]["logits"]
    assert [path.name for path in tmp_path.iterdir()] == ["q.safetensors"]
    stored = load_file(tmp_path / "q.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) == result.report["size"]["quantized_bytes"]
    borders = sum(tensor.nbytes for name, tensor in stored.items() if name.endswith((".border", ".alpha")))
    assert borders == result.report["size"]["border_bytes"]
    again = tmp_path / "again.safetensors"
    checkpoint_torch.save(model, again, checkpoint.read(tmp_path / "q.safetensors").about)
    assert again.read_bytes() == (tmp_path / "q.safetensors").read_bytes()


def test_what_numpy_reads_is_the_network_s(tmp_path: Path) -> None:
    for bits in (16, 8):
        path = tmp_path / "q.safetensors"
        quantized(
            border={"alpha": "learned", "bits": bits}, layers={"pointwise": {"weight_bits": 5, "activation_bits": 32}}
        ).save(path)
        stored, model = checkpoint.read(path), load(path)
        assert isinstance(model, QuantizedModel)
        assert list(stored.layers) == list(model.layers)
        for name, row in stored.layers.items():
            layer = model.layers[name]
            assert layer.weight is not None
            assert np.array_equal(row.weight, layer.weight.codes.reshape(row.weight.shape).numpy())
            assert np.array_equal(row.dequantized_weight(), layer.weight().numpy())
            assert (row.weight_bits, row.activation_bits) == (layer.weight_bits, layer.activation_bits)
            assert (row.bias is None) == (layer.bias is None)
            assert (row.input_scale, row.zero_point) == (layer.activation_scale, layer.zero_point)
            assert (row.border is None) == (layer.border is None) == (name == "pointwise")
            if layer.border is not None:
                assert np.array_equal(row.border, layer.border.coefficients.numpy())
                assert layer.border.coefficients.abs().max() > 0
                assert (row.alpha is None) == (layer.border.alpha is None) == (name == "fc")
            if layer.border is not None and layer.border.alpha is not None:
                assert np.array_equal(row.alpha, layer.border.alpha.numpy())
        assert stored.constants == {}


def test_a_device_that_is_not_there_is_named_before_the_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA devices are usable"):
        load(tmp_path / "absent", torch.cuda.device_count())


def test_a_network_on_another_device(saved: Path) -> None:
    model = load(saved, device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


@pytest.fixture(scope="module")
def saved_outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantized where values are made."""
    path = tmp_path_factory.mktemp("checkpoint") / "outputs.safetensors"
    quantized(method="qdrop").save(path)
    return path


VALUES = ["input.quantize", "relu.quantize", "relu_1.quantize", "relu_2.quantize"]


def test_quantized_values_come_back(saved_outputs: Path) -> None:
    _, document = header_of(saved_outputs)
    assert {name: bits for name, bits, _ in document["quantizers"]} == dict(zip(VALUES, (8, 3, 3, 8), strict=True))
    model = load(saved_outputs)
    assert isinstance(model, QuantizedModel)
    tensors = load_file(saved_outputs)
    assert sorted(name for name in tensors if name.endswith(".scale")) == sorted(f"{name}.scale" for name in VALUES)
    for name, bits, zero_point in document["quantizers"]:
        part = model.quantizers[name]
        assert part.activation_scale is not None
        assert (part.activation_bits, part.zero_point) == (bits, zero_point)
        assert part.activation_scale == tensors[f"{name}.scale"]
    assert model.quantizers["input.quantize"].zero_point == 0  # the images are not negative
    assert not any(name.endswith(".input_scale") for name in tensors)


def test_a_quantized_value_s_missing_step_is_named(saved_outputs: Path, tmp_path: Path) -> None:
    for name in VALUES:
        tensors = load_file(saved_outputs)
        del tensors[f"{name}.scale"]
        with pytest.raises(CheckpointError, match=name):
            load(rewrite(saved_outputs, tmp_path / "q.safetensors", tensors))


@pytest.mark.parametrize(
    "quantizers", [[], [["relu.quantize", 3, 0]], [["relu", 3, 0]], [["relu.quantize"]], 3], ids=str
)
def test_quantizers_that_make_no_sense_are_refused(saved_outputs: Path, tmp_path: Path, quantizers: Any) -> None:
    tensors = load_file(saved_outputs)
    with pytest.raises(CheckpointError):
        load(rewrite(saved_outputs, tmp_path / "q.safetensors", tensors, quantizers=quantizers))


FIXTURES = sorted((Path(__file__).parent / "checkpoints").glob("*.safetensors"))
"""Written once by each version of the format, with the logits there were, and kept as they are."""


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_checkpoints_of_every_version_load(path: Path) -> None:
    recorded = json.loads(path.with_suffix(".json").read_text())
    assert hashlib.sha256(path.read_bytes()).hexdigest() == recorded["sha256"]
    images = (torch.arange(3 * 144).reshape(3, 1, 12, 12) * 37 % 101) / 101
    torch.testing.assert_close(load(path)(images), torch.tensor(recorded["logits"]), rtol=1e-4, atol=1e-4)


def test_there_is_a_checkpoint_of_every_version() -> None:
    assert {header_of(path)[1]["format"] for path in FIXTURES} == {checkpoint.UNVERIFIED_FORMAT, checkpoint.FORMAT}
    assert {path.stem for path in FIXTURES} >= {"format-2-border", "format-2-border_8_bit", "format-2-outputs"}
    assert sum(path.stat().st_size for path in FIXTURES) < 60_000


@pytest.mark.parametrize("name", ["border", "outputs"])
def test_an_old_checkpoint_is_saved_as_a_new_one(name: str, tmp_path: Path) -> None:
    old = next(path for path in FIXTURES if path.stem == f"format-1-{name}")
    checkpoint_torch.save(load(old), tmp_path / "new", checkpoint.read(old).about)
    checkpoint_torch.save(load(tmp_path / "new"), tmp_path / "again", checkpoint.read(tmp_path / "new").about)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "new").read_bytes()
    assert header_of(tmp_path / "new")[1]["format"] == checkpoint.FORMAT
    before, after = load_file(old), load_file(tmp_path / "new")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[tensor], after[tensor]) for tensor in before)


def test_checkpoints_of_before_quantizers_and_a_rounding_load(tmp_path: Path) -> None:
    old = next(path for path in FIXTURES if path.stem == "format-1-border")
    _, document = header_of(old)
    assert (document.pop("quantizers"), document.pop("a_rounding")) == ([], False)
    earlier = tmp_path / "q.safetensors"
    save_file(load_file(old), earlier, {"aquant": json.dumps(document)})
    images = torch.rand(5, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    assert torch.equal(load(earlier)(images), load(old)(images))


def test_a_rounding_is_of_all_layers_or_of_none(tmp_path: Path) -> None:
    for method in ("a_rounding", "nearest"):
        path = tmp_path / f"{method}.safetensors"
        quantized(method=method).save(path)
        assert header_of(path)[1]["a_rounding"] == (method == "a_rounding")
        model = load(path)
        assert isinstance(model, QuantizedModel)
        assert {layer.a_rounding for layer in model.layers.values()} == {method == "a_rounding"}


def test_header_says_what_it_is(saved: Path) -> None:
    with safe_open(saved, framework="pt") as file:
        assert list(file.metadata()) == ["aquant"]
    _, document = header_of(saved)
    assert document["format"] == checkpoint.FORMAT
    assert document["seed"] == 0
    assert document["config"]["weight_bits"] == 3
    assert [entry[:3] for entry in document["layers"]] == [
        ["stem", 8, 8],
        ["depthwise", 3, 3],
        ["pointwise", 3, 3],
        ["fc", 8, 8],
    ]


def expected_bytes(model: nn.Module, bits: int, outer_bits: int) -> int:
    """Bytes of a quantized network whose norms are folded, from the shapes of its layers alone."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    total = 0
    for index, layer in enumerate(layers):
        shape = layer.weight.shape
        outputs, positions = shape[0], shape[1:].numel()
        inputs = positions * getattr(layer, "groups", 1)  # im2col positions
        width = outer_bits if index in (0, len(layers) - 1) else bits
        codes = (shape.numel() * width + 7) // 8
        step, zero_point, bias, input_step, border = 4 * outputs, outputs, 4 * outputs, 4, 2 * 3 * inputs
        total += codes + step + zero_point + bias + input_step + border
    return total


def test_resnet_18_has_the_size_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "SHRINK_STEPS", 2)  # a coarse search: sizes do not depend on it
    torch.manual_seed(0)
    model = build("resnet18")
    generator = torch.Generator().manual_seed(0)
    calibration, evaluation = (ImageSet(torch.rand(n, 3, 32, 32, generator=generator)) for n in (16, 4))
    config = QuantizationConfig(method="aquant", weight_bits=2, activation_bits=2, iterations=1)
    result = quantize(model, calibration, config, evaluation)
    path = tmp_path / "resnet18.safetensors"
    result.save(path)

    expected = expected_bytes(model, bits=2, outer_bits=8)
    assert result.report["size"]["quantized_bytes"] == expected
    assert abs(path.stat().st_size / expected - 1) < 0.15
    length, document = header_of(path)
    assert len(document["layers"]) == 21
    assert length <= 8 * 1024 + 1024 * 21
    assert path.stat().st_size == 8 + length + expected
    digest = logits_digest(logits_of(load(path), evaluation.images))
    assert digest == result.report["digests"]["logits"] == document["digests"]["logits"]


def test_resnet_18_without_borders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "SHRINK_STEPS", 2)
    torch.manual_seed(0)
    images = ImageSet(torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    config = QuantizationConfig(method="nearest", weight_bits=5, activation_bits=5)
    model = build("resnet18")
    result = quantize(model, images, config, images)
    result.save(tmp_path / "q.safetensors")
    with_borders = expected_bytes(model, bits=5, outer_bits=8)
    positions = sum(m.weight.shape[1:].numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert result.report["size"]["border_bytes"] == 0
    assert result.report["size"]["quantized_bytes"] == with_borders - 6 * positions
    digest = logits_digest(logits_of(load(tmp_path / "q.safetensors"), images.images))
    assert digest == result.report["digests"]["logits"]


def test_a_failed_write_leaves_the_old_file(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(TypeError):
        checkpoint_torch.save(load(saved), path, {"unwritable": object()})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["q.safetensors"]

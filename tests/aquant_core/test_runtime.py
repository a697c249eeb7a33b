"""Integer inference of whole networks: the same numbers as the simulation, fused where that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

import aquant_core
from aquant_core import runtime
from aquant_core.capture_model import capture
from aquant_core.config import QuantizationConfig
from aquant_core.errors import DeviceError, ImageSetError, memory_is_full
from aquant_core.fold import fold_batch_norm
from aquant_core.graph import Node
from aquant_core.images import ImageSet, named_if_unfit
from aquant_core.model import QuantizedModel, quantize_to_nearest
from aquant_core.pipeline import quantize
from aquant_core.runtime import IntegerModel, fused_nodes
from cupy_kernels.packing import route_of

IMAGES = torch.rand(16, 3, 12, 12, generator=torch.Generator().manual_seed(1))
ABSENT = torch.cuda.device_count()


class Net(nn.Module):
    """Convolutions of three kinds, a strided shortcut, a ReLU6 and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, 2, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 32, 3, padding=2, dilation=2, groups=2)
        self.downsample = nn.Conv2d(8, 32, 1, 2)
        self.last = nn.Conv2d(32, 32, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.grouped(nn.functional.relu6(self.depthwise(x))) + self.downsample(x))
        x = torch.relu(x + self.last(x))
        return self.fc(x.mean((2, 3)))


def learned(**changes: Any) -> QuantizedModel:
    torch.manual_seed(0)
    config = {"weight_bits": 3, "activation_bits": 3, "iterations": 12, "preset": "smoke"} | changes
    model: QuantizedModel = quantize(Net().eval(), ImageSet(IMAGES), QuantizationConfig(**config)).model
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"border": {"form": "linear", "alpha": "learned", "bound": "stretched"}},
        {"border": {"fusion": "none", "bound": "clip"}},
        {"border": {"fusion": "none", "granularity": "channel"}},
        {"method": "nearest"},
        {"weight_bits": 8, "activation_bits": 8},
        {"layers": {"grouped": {"weight_bits": 32}, "last": {"activation_bits": 32}}},
        {"method": "qdrop"},
        {"method": "brecq", "protocol": "brecq"},
        {"method": "adaround", "protocol": "all-low-bit"},
        {"method": "a_rounding"},
        {"protocol_switches": {"shortcut": "low"}},
        {"protocol": "all-low-bit", "method": "qdrop_refactored"},
    ],
)
def test_logits_are_the_simulation_s(changes: dict[str, Any]) -> None:
    model = learned(**changes)
    expected = model(IMAGES).detach()
    # The sums are exact here and rounded there, which may move an activation across a border; not so on these images.
    torch.testing.assert_close(IntegerModel(model)(IMAGES), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_stays_near_and_returns_fp32() -> None:
    model = learned(weight_bits=8, activation_bits=8)
    logits = IntegerModel(model, dtype=torch.float16)(IMAGES.double())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(IMAGES).detach(), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    "changes", [{}, {"method": "qdrop"}, {"method": "a_rounding"}, {"protocol_switches": {"shortcut": "low"}}], ids=str
)
def test_a_loaded_checkpoint_runs(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = QuantizationConfig(**{"weight_bits": 4, "activation_bits": 4, "iterations": 2} | changes)
    result = quantize(Net().eval(), ImageSet(IMAGES), config)
    result.save(tmp_path / "quantized.safetensors")
    loaded = aquant_core.load(tmp_path / "quantized.safetensors")
    assert torch.equal(aquant_core.IntegerModel(loaded)(IMAGES), IntegerModel(result.model)(IMAGES))


def test_thresholds_are_derived_when_a_checkpoint_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for fusion in ("none", "channel_mean"):
        border = {"fusion": fusion}
        config = QuantizationConfig(weight_bits=2, activation_bits=2, iterations=8, preset="smoke", border=border)
        quantize(Net().eval(), ImageSet(IMAGES), config).save(tmp_path / "q.safetensors")
        stored = load_file(tmp_path / "q.safetensors")
        assert {name.rsplit(".", 1)[1] for name in stored} == {
            "weight", "weight_scale", "weight_zero_point", "bias", "input_scale", "border",
        }  # fmt: skip
        monkeypatch.setattr(runtime, "integer_route", lambda shape, groups, _: route_of(shape, groups))  # as on a GPU
        network = IntegerModel(aquant_core.load(tmp_path / "q.safetensors"), dtype=torch.float16)
        expected = ["depthwise", "grouped", "downsample", "last"] if fusion == "none" else ["downsample", "last"]  # 1x1
        by_thresholds = [name for name, layer in network.layers.items() if layer.thresholds is not None]
        assert by_thresholds == expected
        because = {name: layer.evaluated_because for name, layer in network.layers.items()}
        assert all((because[name] is None) == (name in by_thresholds) for name in because)
        if fusion == "none":
            assert because["stem"] == "codes up to 255 would take as many thresholds; 15 are the most"
        else:
            assert because["grouped"] == "with fusion channel_mean a border depends on its whole window"


def test_every_quantized_layer_runs_on_integers() -> None:
    network = IntegerModel(learned())
    assert set(network.layers) == {"stem", "depthwise", "grouped", "downsample", "last", "fc"}
    for layer in network.layers.values():
        assert layer.weight.dtype == torch.int16
        assert layer.constant.dtype == torch.int32


def test_with_quantized_shortcuts_the_layers_still_run_on_integers() -> None:
    model = learned(protocol_switches={"shortcut": "low"})
    assert list(model.quantizers) == ["relu_1.quantize"]  # the other addition's operands are convolutions
    network = IntegerModel(model)
    assert set(network.layers) == set(model.layers)
    model.quantizers["relu_1.quantize"].activation_scale = None  # it is needed
    assert not torch.allclose(network(IMAGES), model(IMAGES).detach(), atol=1e-3)


@pytest.mark.parametrize("method", ["qdrop", "a_rounding"])
def test_where_no_layer_can_run_on_integers_all_are_simulated(method: str) -> None:
    model = learned(method=method)
    network = IntegerModel(model)
    assert network.layers == {}
    assert torch.equal(network(IMAGES), model(IMAGES).detach())
    half = IntegerModel(model, dtype=torch.float16)(IMAGES)
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert network(IMAGES[:0]).shape == (0, 5)


def test_what_is_not_quantized_is_simulated_and_the_model_left_alone() -> None:
    model = learned(layers={"grouped": {"weight_bits": 32}})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = IntegerModel(model, dtype=torch.float16)
    network(IMAGES)
    assert "grouped" not in network.layers
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_refusals() -> None:
    model = learned()
    with pytest.raises(ValueError, match=r"float16 or float32, not in torch\.bfloat16"):
        IntegerModel(model, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"of what aquant_core\.load returns, not of a Linear"):
        IntegerModel(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Layer 'stem': scale is torch\.float64; a layer is packed from its float32"):
        IntegerModel(learned().double())
    with pytest.raises(DeviceError, match=f"Device 'cuda:{ABSENT}' is not there"):
        IntegerModel(model, device=ABSENT)


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (IMAGES[0], r"torch.float32 \(3, 12, 12\)"),
        ((IMAGES * 255).to(torch.uint8), r"torch.uint8 \(16, 3, 12, 12\)"),
        (IMAGES[:, :1], r"torch.float32 \(16, 1, 12, 12\)"),
        (IMAGES[..., :0], r"torch.float32 \(16, 3, 12, 0\)"),
    ],
    ids=["one alone", "of integers", "grey", "empty"],
)
def test_images_that_the_network_does_not_take_are_named(images: Tensor, named: str) -> None:
    model = learned()
    for network in (model, IntegerModel(model)):
        with pytest.raises(ImageSetError, match=named + r"; the network takes .* with \(C, H, W\) = \(3, 12, 12\)"):
            network(images)


def test_a_network_s_own_type_and_its_own_errors() -> None:
    model = learned()
    with pytest.raises(ImageSetError, match=r"torch.float64 .*; the network takes torch.float32"):
        model(IMAGES.double())
    assert IntegerModel(model)(IMAGES.double()).dtype == torch.float32
    assert model(torch.rand(2, 3, 20, 16)).shape == (2, 5)  # it pools over all positions
    del model.layers["fc"]
    with pytest.raises(KeyError):
        model(IMAGES)
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        named_if_unfit((3, 12, None), IMAGES, torch.float32),
    ):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
@pytest.mark.parametrize("size", [12, 24])
def test_a_device_that_is_full_or_broken_is_no_matter_of_the_images_size(error: type[Exception], size: int) -> None:
    with pytest.raises(error, match="of CUDA"), named_if_unfit((3, 12, 12), torch.rand(2, 3, size, size)):
        raise error("of CUDA")


@pytest.mark.parametrize("take", [torch.empty, np.empty])
@pytest.mark.parametrize("size", [12, 24])
def test_a_full_memory_is_no_matter_of_the_images_size(take: Callable[[int], object], size: int) -> None:
    with (
        pytest.raises((RuntimeError, MemoryError), match="allocate") as caught,
        named_if_unfit((3, 12, 12), torch.rand(2, 3, size, size)),
    ):
        take(1 << 50)
    assert memory_is_full(caught.value)


def test_images_too_large_for_the_memory_are_images_that_the_network_takes() -> None:
    vast = torch.zeros(1, 1, 1, 1).expand(1, 3, 1 << 22, 1 << 22)  # one number, as long as nobody computes with it
    model = learned()
    for network in (model, IntegerModel(model)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            network(vast)
        assert memory_is_full(caught.value)


def test_a_network_that_fails_on_another_size_says_so() -> None:
    with (
        pytest.raises(ImageSetError, match=r"\(2, 3, 24, 24\); the network takes"),
        named_if_unfit((3, 12, 12), torch.rand(2, 3, 24, 24)),
    ):
        raise RuntimeError("shapes cannot be multiplied")


def test_autocast_changes_nothing() -> None:
    network = IntegerModel(learned())
    expected = network(IMAGES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(IMAGES), expected)


def test_no_images() -> None:
    assert IntegerModel(learned())(IMAGES[:0]).shape == (0, 5)


def test_a_layer_too_wide_for_int32_is_named() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 95 * 95, 2))
    images = torch.rand(2, 3, 97, 97)
    graph = fold_batch_norm(capture(wide.eval(), example=images))
    model = quantize_to_nearest(graph, images, QuantizationConfig(weight_bits=8, activation_bits=8))
    with pytest.raises(ValueError, match=r"Layer '2': 36100 products of codes up to 255 and 255 do not fit into int32"):
        IntegerModel(model)


def chain(*nodes: tuple[str, str, tuple[str, ...]]) -> list[Node]:
    return [Node(name, op, inputs) for name, op, inputs in nodes]


def names(nodes: list[Node]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(node.name, node.op, node.inputs) for node in nodes]


def test_residual_and_relu_are_fused_into_the_later_convolution() -> None:
    nodes = chain(
        ("a", "conv2d", ("input",)), ("r", "relu", ("a",)), ("b", "conv2d", ("r",)), ("c", "conv2d", ("r",)),
        ("sum", "add", ("b", "c")), ("out", "relu", ("sum",)), ("pool", "flatten", ("out",)),
    )  # fmt: skip
    fused = fused_nodes(nodes, {"a", "b", "c"})
    assert names(fused) == [
        ("r", "integer_layer", ("input",)), ("b", "integer_layer", ("r",)), ("out", "integer_layer", ("r", "b")),
        ("pool", "flatten", ("out",)),
    ]  # fmt: skip
    assert [node.attributes.get("relu") for node in fused] == [True, False, True, None]
    assert fused[2].attributes["layer"] == "c"


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        (chain(("a", "conv2d", ("input",)), ("r", "relu", ("a",)), ("s", "add", ("r", "a"))), "read twice"),
        (chain(("a", "conv2d", ("input",)), ("p", "flatten", ("input",)), ("s", "add", ("a", "p"))), "residual later"),
        (chain(("a", "conv2d", ("input",)), ("s", "add", ("a", "a"))), "added to itself"),
        (chain(("f", "linear", ("input",)), ("s", "add", ("f", "input"))), "a linear layer"),
        (chain(("a", "conv2d", ("input",)), ("s", "add", ("a",))), "a constant is added"),
        (chain(("a", "conv2d", ("input",)), ("s", "sub", ("a", "input"))), "no addition"),
        (chain(("a", "conv2d", ("input",)), ("s", "relu6", ("a",))), "no ReLU"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_fused_stays(nodes: list[Node], why: str) -> None:
    del why
    fused = fused_nodes(nodes, {"a", "f"})
    assert [node.name for node in fused] == [node.name for node in nodes]
    assert [node.inputs for node in fused] == [node.inputs for node in nodes]


class Broadcast(nn.Module):
    """Adds a (N, C, 1, 1) map to a (N, C, H, W) one, the narrow one first or last."""

    def __init__(self, convolution_is_narrow: bool) -> None:
        super().__init__()
        self.conv, self.narrow = nn.Conv2d(3, 3, 1), convolution_is_narrow

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return torch.relu(x + self.conv(means) if self.narrow else means + self.conv(x)).flatten(1)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_broadcast_addition_is_done_outside_the_layer(narrow: bool) -> None:
    graph = fold_batch_norm(capture(Broadcast(narrow).eval(), example=IMAGES))
    model = quantize_to_nearest(graph, IMAGES, QuantizationConfig(weight_bits=8, activation_bits=8))
    torch.testing.assert_close(IntegerModel(model)(IMAGES), model(IMAGES).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_gpu_logits_equal_the_reference_s(dtype: torch.dtype) -> None:
    model = learned()
    expected = IntegerModel(model, "cpu", dtype)(IMAGES)
    network = IntegerModel(model, "cuda", dtype)
    assert {layer.route for layer in network.layers.values()} == {"columns", "depthwise", "implicit"}
    found = network(IMAGES).cpu()
    assert torch.equal(found.argmax(1), expected.argmax(1))
    # Integer layers agree bit for bit; the mean before the classifier is summed in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_network() -> None:
    network = IntegerModel(learned(), "cuda")
    static = IMAGES.cuda().half()
    for _ in range(2):
        expected = network(static)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = network(static)
    static.copy_(IMAGES.flip(0))
    graph.replay()
    assert torch.equal(logits, network(static))
    assert not torch.equal(logits, expected)

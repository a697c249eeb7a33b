"""capture() takes a network in any of its forms, checks it, and refuses the rest with a reason."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from aquant_core.architectures import build
from aquant_core.capture_model import capture
from aquant_core.errors import (
    CaptureMismatchError,
    ImageSetError,
    ModelFormatError,
    NonFiniteError,
    UnknownArchitectureError,
    WeightsMismatchError,
)  # fmt: skip

ARCHITECTURE = "squeezenet1_1"


def images(size: int = 8, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    )


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(build(ARCHITECTURE, 10).state_dict())


def write_onnx(path: Path, size: int | str = 8) -> Path:
    helper = onnx.helper
    weight = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).numpy()
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c"]),
            helper.make_node("GlobalAveragePool", ["c"], ["p"]),
            helper.make_node("Flatten", ["p"], ["y"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 3, size, size])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(weight, "conv.weight")],
    )
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]).SerializeToString())
    return path


def test_a_module() -> None:
    model = small_net().train()
    captured = capture(model, example=images())
    assert model.training
    assert captured.input_shape == (3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(captured(images()), model.eval()(images()))


def test_a_captured_model_is_given_back() -> None:
    captured = capture(small_net(), example=images())
    assert capture(captured) is captured


def test_without_an_example_the_channels_are_the_modules_own() -> None:
    assert capture(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten())).input_shape == (1, 224, 224)


def test_a_module_that_writes_into_its_input_leaves_the_example_alone() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return self.conv(x)

    example = images()
    capture(InPlace(), example=example)
    assert torch.equal(example, images())


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "legacy"])
def test_a_state_dict(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    path = tmp_path / "weights"  # the content decides, not the name
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == "pth")
    captured = capture(path, ARCHITECTURE, images(48))
    model = build(ARCHITECTURE, 10)
    model.load_state_dict(state)
    with torch.inference_mode():
        torch.testing.assert_close(captured(images(48)), model(images(48)))


def test_an_onnx_file_takes_the_size_it_declares(tmp_path: Path) -> None:
    assert capture(write_onnx(tmp_path / "a", 8)).input_shape == (3, 8, 8)
    assert capture(str(write_onnx(tmp_path / "b", "side"))).input_shape == (3, 224, 224)
    assert capture(write_onnx(tmp_path / "c", "side"), example=images(6)).input_shape == (3, 6, 6)


@pytest.mark.parametrize("example", [images(9), images(8, channels=1)])
def test_images_of_another_size_than_declared_are_refused(tmp_path: Path, example: Tensor) -> None:
    with pytest.raises(ImageSetError, match=r"the network takes \(3, 8, 8\)"):
        capture(write_onnx(tmp_path / "a"), example=example)


def test_onnx_takes_no_architecture() -> None:
    model = Path(__file__).parents[2] / "examples" / "digits" / "plain.onnx"
    with pytest.raises(ModelFormatError, match=r"'resnet18'.*ONNX holds its own network"):
        capture(model, "resnet18")


def test_a_state_dict_needs_its_architecture(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "a")
    with pytest.raises(ModelFormatError, match=r'weights without a network.*"architecture"'):
        capture(tmp_path / "a")
    with pytest.raises(UnknownArchitectureError, match="'squeezenet'"):
        capture(tmp_path / "a", "squeezenet")
    with pytest.raises(WeightsMismatchError, match="do not fit resnet18"):
        capture(tmp_path / "a", "resnet18")


class Executes:
    """Leaves a mark where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("write", ["module", "zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(tmp_path: Path, write: str) -> None:
    path, marker = tmp_path / "model.pth", tmp_path / "executed"
    if write == "module":
        torch.save(small_net(), path)
    elif write == "pickle":
        path.write_bytes(pickle.dumps({"weight": Executes(marker)}))
    else:
        torch.save({"weight": Executes(marker)}, path, _use_new_zipfile_serialization=write == "zip")
    with pytest.raises(ModelFormatError, match="cannot be read as a state dict of plain tensors"):
        capture(path, ARCHITECTURE, images(48))
    assert not marker.exists()


@pytest.mark.parametrize("content", [[torch.zeros(1)], {}, torch.zeros(1)])
def test_a_pth_file_of_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a")
    with pytest.raises(ModelFormatError, match=r"The file holds a (list|dict|Tensor)"):
        capture(tmp_path / "a", ARCHITECTURE)


def test_a_training_checkpoint_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a")
    with pytest.raises(ModelFormatError, match="something other than tensors"):
        capture(tmp_path / "a", ARCHITECTURE)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("share", [0.001, 0.5, 0.99])
def test_cut_off_state_dicts_are_refused(tmp_path: Path, kind: str, share: float) -> None:
    path, state = tmp_path / "a", {"weight": torch.rand(50, 50)}
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelFormatError):
        capture(path, ARCHITECTURE, images(48))


@pytest.mark.parametrize(
    "data", [b"", b"hello, I am no network", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x05\x06" + bytes(18)]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ModelFormatError):
        capture(tmp_path / "a", ARCHITECTURE)


def test_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ModelFormatError, match="is not a file"):
            capture(path)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    bad = {key: value.clone() for key, value in state.items()}
    bad["features.0.weight"][1, 1, 1, 1] = float("nan")
    save_file(bad, tmp_path / "a")
    with pytest.raises(NonFiniteError, match=r"Weight features\.0\.weight holds NaN"):
        capture(tmp_path / "a", ARCHITECTURE, images(48))


def test_outputs_that_are_not_finite_are_refused() -> None:
    model = small_net()
    with torch.no_grad():
        model[0].weight.fill_(1e38)
    with pytest.raises(NonFiniteError, match="float network gives NaN or infinity"):
        capture(model, example=images())


def test_what_tracing_does_not_see_is_found_by_comparing() -> None:
    class Aliased(nn.Module):
        """The in-place ReLU changes the value that is added after it."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return F.relu(x, inplace=True) + x

    with pytest.raises(CaptureMismatchError, match="differs from the module by"):
        capture(Aliased(), example=images())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_of_another_precision_are_named(dtype: torch.dtype) -> None:
    with pytest.raises(ModelFormatError, match=r"Weight '0.weight' is float(16|64)") as caught:
        capture(small_net().to(dtype), example=images())
    assert "model.float()" in caught.value.remedy

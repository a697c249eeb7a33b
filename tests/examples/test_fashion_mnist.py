"""The committed Fashion-MNIST example: its files are small, anonymous, and as accurate as they claim."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
LEAST_ACCURACY = {"residual": 0.92, "inverted_residual": 0.905}
ABSOLUTE_PATH = rb"(?:/[\w.-]+)+\.py|/(?:home|root|usr|tmp|opt|work|mnt|Users)/|[A-Z]:\\"
FILES = [
    "networks.py",
    "train.py",
    "README.md",
    "LICENSE-fashion-mnist",
    "results.json",
    "calibration.npz",
    "evaluation.npz",
]


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fashion_mnist_networks", FOLDER / "networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arrays(name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as content:
        assert sorted(content.files) == ["images", "labels"]
        return content["images"], content["labels"]


def results() -> dict:
    return json.loads((FOLDER / "results.json").read_text())


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.astype(np.float32) / 255})[0]


def top1(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    return float((logits(path, images).argmax(1) == labels).mean())


def test_everything_is_there_and_under_ten_megabytes() -> None:
    expected = FILES + [f"{network}.onnx" for network in LEAST_ACCURACY]
    assert [name for name in expected if not (FOLDER / name).is_file()] == []
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 10_000_000


@pytest.mark.parametrize(("name", "count"), [("calibration", 1024), ("evaluation", 2000)])
def test_image_sets_are_bytes_with_labels(name: str, count: int) -> None:
    images, labels = arrays(name)
    assert (images.shape, images.dtype) == ((count, 1, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert images.max() == 255
    assert set(labels.tolist()) == set(range(10))


def test_evaluation_has_every_class_alike() -> None:
    _, labels = arrays("evaluation")
    assert np.bincount(labels).tolist() == [200] * 10


def test_no_calibration_image_is_evaluated_on() -> None:
    calibration, _ = arrays("calibration")
    evaluation, _ = arrays("evaluation")
    assert {image.tobytes() for image in calibration}.isdisjoint(image.tobytes() for image in evaluation)


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_networks_map_images_to_ten_logits(networks: ModuleType, network: str) -> None:
    module = networks.NETWORKS[network]().eval()
    with torch.no_grad():
        assert module(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert sum(p.numel() for p in module.parameters()) == results()["networks"][network]["parameters"]


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_exported_network_is_as_accurate_as_recorded(network: str) -> None:
    images, labels = arrays("evaluation")
    measured = top1(FOLDER / f"{network}.onnx", images, labels)
    assert measured >= LEAST_ACCURACY[network]
    # One image of 2,000 may fall the other way where another CPU sums in another order.
    recorded = results()["networks"][network]["evaluation_accuracy"]
    assert measured == pytest.approx(recorded, abs=1.01 / len(images))


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_any_batch_size_runs(network: str) -> None:
    images, _ = arrays("evaluation")
    path = FOLDER / f"{network}.onnx"
    one, three = logits(path, images[:1]), logits(path, images[:3])
    assert (one.shape, three.shape) == ((1, 10), (3, 10))
    np.testing.assert_allclose(one, three[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_exported_weights_bear_their_modules_names(networks: ModuleType, network: str) -> None:
    initializers = {t.name: tuple(t.dims) for t in onnx.load(FOLDER / f"{network}.onnx").graph.initializer}
    parameters = networks.NETWORKS[network]().named_parameters()
    weights = {name: tuple(p.shape) for name, p in parameters if p.dim() > 1}
    assert {name: initializers.get(name) for name in weights} == weights


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_exported_file_is_self_contained_and_names_no_path(network: str) -> None:
    path = FOLDER / f"{network}.onnx"
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not any(t.external_data for t in model.graph.initializer)
    assert not any(part.doc_string for part in (model, model.graph, *model.graph.node))
    keys = {entry.key for node in model.graph.node for entry in node.metadata_props}
    assert not any("stack_trace" in key for key in keys)
    for tensor in model.graph.initializer:  # weights may spell anything; what is left is text
        tensor.ClearField("raw_data")
    assert re.findall(ABSOLUTE_PATH, model.SerializeToString()) == []


def test_results_name_the_very_files() -> None:
    recorded = results()
    digests = {entry["file"]: entry["digest"] for entry in recorded["networks"].values()}
    digests |= {name: recorded["image_sets"][name] for name in ("calibration.npz", "evaluation.npz")}
    assert sorted(recorded["networks"]) == sorted(LEAST_ACCURACY)
    assert digests == {name: f"sha256:{hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()}" for name in digests}

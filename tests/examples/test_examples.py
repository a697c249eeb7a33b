"""The committed example networks: their files are small, anonymous, and as accurate as they claim."""

import gzip
import hashlib
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from aquant_core import capture, read_images
from aquant_core.fold import fold_batch_norm
from aquant_core.partition import partition

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLE_OF = {"residual": "fashion_mnist", "inverted_residual": "fashion_mnist", "plain": "digits"}
LEAST_ACCURACY = {"residual": 0.92, "inverted_residual": 0.905, "plain": 0.99}
MOST_BYTES = {"fashion_mnist": 10_000_000, "digits": 1_000_000}
ABSOLUTE_PATH = rb"(?:/[\w.-]+)+\.py|/(?:home|root|usr|tmp|opt|work|mnt|Users)/|[A-Z]:\\"
FILES = {
    "fashion_mnist": ["networks.py", "train.py", "LICENSE-fashion-mnist", "residual.onnx", "inverted_residual.onnx"],
    "digits": ["plain.onnx"],
}
FILES_OF_ALL = ["README.md", "results.json", "calibration.npz", "evaluation.npz"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / "fashion_mnist" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def networks() -> ModuleType:
    return script("networks")


@pytest.fixture
def training(networks: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setitem(sys.modules, "networks", networks)
    return script("train")


def model_file(network: str) -> Path:
    return FOLDER / EXAMPLE_OF[network] / f"{network}.onnx"


def arrays(example: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(FOLDER / example / f"{name}.npz", allow_pickle=False) as content:
        assert sorted(content.files) == ["images", "labels"]
        return content["images"], content["labels"]


def results(example: str) -> dict:
    return json.loads((FOLDER / example / "results.json").read_text())


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images.astype(np.float32) / 255})[0]


def top1(path: Path, images: np.ndarray, labels: np.ndarray) -> float:
    return float((logits(path, images).argmax(1) == labels).mean())


@pytest.mark.parametrize("example", FILES)
def test_everything_is_there_and_small(example: str) -> None:
    expected = FILES_OF_ALL + FILES[example]
    assert [name for name in expected if not (FOLDER / example / name).is_file()] == []
    assert sum(path.stat().st_size for path in (FOLDER / example).iterdir() if path.is_file()) < MOST_BYTES[example]


@pytest.mark.parametrize("example", FILES)
@pytest.mark.parametrize(("name", "count"), [("calibration", 1024), ("evaluation", 2000)])
def test_image_sets_are_bytes_with_labels(example: str, name: str, count: int) -> None:
    images, labels = arrays(example, name)
    assert (images.shape, images.dtype) == ((count, 1, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.int64)
    assert images.max() == 255
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("example", FILES)
def test_evaluation_has_every_class_alike(example: str) -> None:
    _, labels = arrays(example, "evaluation")
    assert np.bincount(labels).tolist() == [200] * 10


@pytest.mark.parametrize("example", FILES)
def test_no_calibration_image_is_evaluated_on(example: str) -> None:
    calibration, _ = arrays(example, "calibration")
    evaluation, _ = arrays(example, "evaluation")
    assert {image.tobytes() for image in calibration}.isdisjoint(image.tobytes() for image in evaluation)


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_networks_map_images_to_ten_logits(networks: ModuleType, network: str) -> None:
    module = networks.NETWORKS[network]().eval()
    with torch.no_grad():
        assert module(torch.rand(3, 1, 28, 28)).shape == (3, 10)
    assert (
        sum(p.numel() for p in module.parameters()) == results(EXAMPLE_OF[network])["networks"][network]["parameters"]
    )


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_exported_network_is_as_accurate_as_recorded(network: str) -> None:
    images, labels = arrays(EXAMPLE_OF[network], "evaluation")
    measured = top1(model_file(network), images, labels)
    assert measured >= LEAST_ACCURACY[network]
    # One image of 2,000 may fall the other way where another CPU sums in another order.
    recorded = results(EXAMPLE_OF[network])["networks"][network]["evaluation_accuracy"]
    assert measured == pytest.approx(recorded, abs=1.01 / len(images))


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_any_batch_size_runs(network: str) -> None:
    images, _ = arrays(EXAMPLE_OF[network], "evaluation")
    path = model_file(network)
    one, three = logits(path, images[:1]), logits(path, images[:3])
    assert (one.shape, three.shape) == ((1, 10), (3, 10))
    np.testing.assert_allclose(one, three[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_exported_weights_bear_their_modules_names(networks: ModuleType, network: str) -> None:
    initializers = {t.name: tuple(t.dims) for t in onnx.load(model_file(network)).graph.initializer}
    parameters = networks.NETWORKS[network]().named_parameters()
    weights = {name: tuple(p.shape) for name, p in parameters if p.dim() > 1}
    assert {name: initializers.get(name) for name in weights} == weights


@pytest.mark.parametrize("network", LEAST_ACCURACY)
def test_exported_file_is_self_contained_and_names_no_path(network: str) -> None:
    path = model_file(network)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert not any(t.external_data for t in model.graph.initializer)
    assert not any(part.doc_string for part in (model, model.graph, *model.graph.node))
    keys = {entry.key for node in model.graph.node for entry in node.metadata_props}
    assert not any("stack_trace" in key for key in keys)
    for tensor in model.graph.initializer:  # weights may spell anything; what is left is text
        tensor.ClearField("raw_data")
    assert re.findall(ABSOLUTE_PATH, model.SerializeToString()) == []


@pytest.mark.parametrize("example", FILES)
def test_results_name_the_very_files(example: str) -> None:
    recorded = results(example)
    digests = {entry["file"]: entry["digest"] for entry in recorded["networks"].values()}
    digests |= {name: recorded["image_sets"][name] for name in ("calibration.npz", "evaluation.npz")}
    assert sorted(recorded["networks"]) == sorted(network for network in EXAMPLE_OF if EXAMPLE_OF[network] == example)
    for name, digest in digests.items():
        assert digest == f"sha256:{hashlib.sha256((FOLDER / example / name).read_bytes()).hexdigest()}"


def test_blocks_of_the_plain_network_are_its_pairs_of_convolutions() -> None:
    images = read_images(FOLDER / "digits" / "calibration.npz").images[:2]
    blocks = partition(fold_batch_norm(capture(model_file("plain"), example=images)))
    layers = {block.name: [node.name for node in block.layers] for block in blocks if block.layers}
    pairs = {f"pairs.{i}": [f"pairs.{i}.conv1", f"pairs.{i}.conv2"] for i in range(3)}
    assert layers == pairs | {"fc": ["fc"]}
    assert not any(node.op == "add" for block in blocks for node in block.nodes)


def test_data_is_read_plain_and_gzipped(training: ModuleType, tmp_path: Path) -> None:
    images = b"\x00\x00\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (2, 2, 3)) + bytes(range(12))
    labels = b"\x00\x00\x08\x01" + (2).to_bytes(4, "big") + bytes([7, 4])
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    images_read, labels_read = training.read_split(tmp_path, "test")
    assert images_read.tolist() == np.arange(12).reshape(2, 1, 2, 3).tolist()
    assert labels_read.tolist() == [7, 4]
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte\.gz is missing"):
        training.read_split(tmp_path, "train")


@pytest.mark.parametrize(("network", "both_ways"), [("residual", True), ("plain", False)])
def test_digits_are_never_mirrored(training: ModuleType, network: str, both_ways: bool) -> None:
    images = torch.zeros(64, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 14, 14] = 255  # one bright point, and a darker one to its right
    images[:, :, 14, 15] = 51
    share = training.EXAMPLE_OF[network].mirrored
    columns = training.augmented(images, share, torch.Generator().manual_seed(0)).amax((1, 2))
    darker = (columns == 0.2).nonzero()[:, 1] - columns.argmax(1)
    assert set(darker.tolist()) == ({1, -1} if both_ways else {1})

"""Image files of every kind are read, bad ones refused with a reason, and sets checked against the network."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import npy_of, zipped
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import save as save_torch

from aquant_core.config import QuantizationConfig
from aquant_core.errors import AQuantError, ImageSetError, NonFiniteError, UnknownLayerError
from aquant_core.graph import INPUT, CapturedModel, Node
from aquant_core.images import ImageSet, check_image_shape, check_images, named_if_unfit, read_images

IMAGES = np.random.default_rng(0).random((16, 3, 4, 4), dtype=np.float32)
LABELS = np.arange(16) % 5
W2A2 = QuantizationConfig(weight_bits=2, activation_bits=2)


def npz(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


def npy(path: Path, array: np.ndarray) -> Path:
    with path.open("wb") as file:
        np.save(file, array)
    return path


def safetensors(path: Path, **arrays: np.ndarray) -> Path:
    save_file(arrays, path)
    return path


@pytest.mark.parametrize("write", [npz, safetensors])
@pytest.mark.parametrize("labelled", [True, False])
def test_files_of_arrays(tmp_path: Path, write: Callable[..., Path], labelled: bool) -> None:
    arrays = {"images": IMAGES} | ({"labels": LABELS} if labelled else {})
    read = read_images(write(tmp_path / "no_extension", **arrays))
    assert read.images.dtype == torch.float32
    assert np.array_equal(read.images.numpy(), IMAGES)
    if labelled:
        assert read.labels is not None
        assert read.labels.dtype == torch.int64
        assert read.labels.tolist() == LABELS.tolist()
    else:
        assert read.labels is None


def test_npy_and_a_single_array_of_any_name(tmp_path: Path) -> None:
    assert np.array_equal(read_images(npy(tmp_path / "a", IMAGES)).images.numpy(), IMAGES)
    assert np.array_equal(read_images(npz(tmp_path / "b", x=IMAGES)).images.numpy(), IMAGES)
    assert np.array_equal(read_images(safetensors(tmp_path / "c", x=IMAGES)).images.numpy(), IMAGES)


@pytest.mark.parametrize("array", [np.asfortranarray(IMAGES), IMAGES.astype(">f4"), IMAGES.astype(np.float64)])
def test_memory_order_byte_order_and_width_do_not_matter(tmp_path: Path, array: np.ndarray) -> None:
    assert np.array_equal(read_images(npy(tmp_path / "a", array)).images.numpy(), IMAGES)


def test_bytes_are_scaled_to_one_and_floats_are_not(tmp_path: Path) -> None:
    pixels = np.array([0, 51, 128, 255], np.uint8).reshape(1, 1, 2, 2)
    read = read_images(npy(tmp_path / "a", pixels)).images.flatten()
    torch.testing.assert_close(read, torch.tensor([0.0, 0.2, 128 / 255, 1.0]))
    floats = pixels.astype(np.float16)
    assert read_images(npy(tmp_path / "b", floats)).images.flatten().tolist() == [0, 51, 128, 255]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_images_that_are_not_finite_are_counted(tmp_path: Path, bad: float) -> None:
    images = IMAGES.copy()
    images[3, 0, 0, 0] = images[3, 1, 2, 3] = images[7, 2, 3, 3] = bad
    with pytest.raises(NonFiniteError, match="2 of 16 evaluation images"):
        read_images(npy(tmp_path / "a", images), "evaluation")


def test_doubles_beyond_float32_are_not_finite(tmp_path: Path) -> None:
    images = IMAGES.astype(np.float64)
    images[5] = 1e300
    with pytest.raises(NonFiniteError, match="1 of 16 calibration images"):
        read_images(npy(tmp_path / "a", images))


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": IMAGES[0]}, r"calibration images have shape \(3, 4, 4\), not \(N, C, H, W\)"),
        ({"images": IMAGES[:0]}, r"shape \(0, 3, 4, 4\)"),
        ({"images": np.float32(1)}, r"shape \(\)"),
        ({"images": IMAGES.astype(np.int64)}, "calibration images are int64, not uint8 or float"),
        ({"images": IMAGES > 0.5}, "are bool"),
        ({"images": IMAGES.astype(np.complex64)}, "are complex64"),
        ({"x": IMAGES, "y": LABELS}, r"arrays \['x', 'y'\], none called images"),
        (
            {"images": IMAGES, "labels": LABELS[:-1]},
            r"labels are int64 of shape \(15,\), not integers of shape \(16,\)",
        ),
        ({"images": IMAGES, "labels": LABELS[:, None]}, r"shape \(16, 1\)"),
        ({"images": IMAGES, "labels": LABELS.astype(np.float32)}, "labels are float32"),
        ({"images": IMAGES, "labels": LABELS - 1}, "labels go down to -1"),
    ],
)
def test_refused_arrays(tmp_path: Path, arrays: dict[str, np.ndarray], reason: str) -> None:
    with pytest.raises(ImageSetError, match=reason):
        read_images(npz(tmp_path / "a.npz", **arrays))


def test_labels_beyond_int64_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageSetError, match="labels"):
        read_images(npz(tmp_path / "a", images=IMAGES, labels=np.full(16, 2**63, np.uint64)))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Executes:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    array = np.array([Executes()], dtype=object)
    for path in (npy(tmp_path / "a", array), npz(tmp_path / "b", images=IMAGES, labels=array)):
        with pytest.raises(ImageSetError, match="cannot be read"):
            read_images(path)
    assert not marker.exists()


def test_a_type_that_numpy_lacks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(save_torch({"images": torch.zeros(16, 3, 4, 4, dtype=torch.bfloat16)}))
    with pytest.raises(ImageSetError, match="calibration"):
        read_images(tmp_path / "a")


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04", b"\x93NUMPY", b"12345678{}"])
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ImageSetError, match="calibration file cannot be read"):
        read_images(tmp_path / "a")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageSetError, match="evaluation file cannot be read"):
        read_images(tmp_path / "absent", "evaluation")


@pytest.mark.parametrize("packed", [False, True])
def test_images_for_which_there_is_no_memory_are_not_called_unreadable(tmp_path: Path, packed: bool) -> None:
    array = npy_of(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 44}, 3, 4, 4), }}")
    (tmp_path / "a").write_bytes(zipped({"images.npy": array}) if packed else array)
    with pytest.raises(MemoryError, match="allocate"):
        read_images(tmp_path / "a")


def whole_file(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, IMAGES)
    elif kind == "safetensors":
        return save_torch({"images": torch.from_numpy(IMAGES), "labels": torch.from_numpy(LABELS)})
    else:
        write = np.savez if kind == "npz" else np.savez_compressed
        write(buffer, images=IMAGES, labels=LABELS)
    return buffer.getvalue()


KINDS = ["npy", "npz", "npz compressed", "safetensors"]


@given(kind=st.sampled_from(KINDS), share=st.floats(0, 0.999))
def test_cut_off_files_are_refused(tmp_path_factory: pytest.TempPathFactory, kind: str, share: float) -> None:
    path, data = tmp_path_factory.getbasetemp() / "cut", whole_file(kind)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageSetError, match="calibration file cannot be read"):
        read_images(path)


@given(kind=st.sampled_from(KINDS), share=st.floats(0, 1), value=st.integers(0, 255))
def test_a_wrong_byte_is_survived_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, share: float, value: int
) -> None:
    path, data = tmp_path_factory.getbasetemp() / "flipped", bytearray(whole_file(kind))
    reach = min(len(data), 400) if kind in ("npy", "safetensors") else len(data)  # where the headers are
    data[int(share * (reach - 1))] = value
    path.write_bytes(data)
    try:
        read = read_images(path)
    except AQuantError:
        return
    assert read.images.dim() == 4
    assert torch.isfinite(read.images).all()


@pytest.mark.parametrize("labels", [None, torch.arange(16) % 5])
def test_save_and_load(tmp_path: Path, labels: torch.Tensor | None) -> None:
    images = torch.from_numpy(IMAGES).transpose(2, 3)  # not contiguous
    written = ImageSet(images, labels)
    written.save(tmp_path / "set")
    read = ImageSet.load(tmp_path / "set")
    assert torch.equal(read.images, images)
    assert read.digest() == written.digest()
    assert len(read) == 16


def test_the_digest_depends_on_images_shape_and_labels() -> None:
    images, labels = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    sets = [
        ImageSet(images), ImageSet(images, labels), ImageSet(images, labels + 1),
        ImageSet(images.reshape(16, 3, 2, 8)), ImageSet(images.flip(0)),
    ]  # fmt: skip
    assert len({s.digest() for s in sets}) == len(sets)


# Images against a network and a configuration


def network(shape: tuple[int | None, int | None, int | None] = (3, 4, 4)) -> CapturedModel:
    """Five classes."""
    nodes = [Node("flat", "flatten", (INPUT,), {"start_dim": 1}), Node("head.fc", "linear", ("flat",))]
    return CapturedModel(nodes, {"head.fc": {"weight": torch.ones(5, 48)}}, shape)


def image_set(count: int, seed: int = 0, labels: torch.Tensor | None = None) -> ImageSet:
    return ImageSet(torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), labels)


def test_enough_good_images_give_no_warning() -> None:
    labels = torch.arange(20) % 5
    config = QuantizationConfig.model_validate(
        {"weight_bits": 2, "activation_bits": 2, "layers": {"head.fc": {"weight_bits": 4}}}
    )
    assert check_images(network(), image_set(256), config, image_set(20, 1, labels)) == []


def test_few_and_repeated_images_are_warned_of() -> None:
    images = image_set(32).images.clone()
    images[5] = images[6] = images[0]
    warnings = check_images(network(), ImageSet(images), W2A2)
    assert len(warnings) == 2
    assert warnings[0] == "2 of 32 calibration images are duplicates."
    assert warnings[1].startswith("32 calibration images are few")


def test_too_few_or_all_equal_images_are_refused() -> None:
    with pytest.raises(ImageSetError, match="15 calibration images are too few"):
        check_images(network(), image_set(15), W2A2)
    check_images(network(), image_set(16), W2A2)
    with pytest.raises(ImageSetError, match="All calibration images are the same"):
        check_images(network(), ImageSet(torch.zeros(16, 3, 4, 4)), W2A2)


def test_an_unknown_layer_is_named_with_the_known_ones() -> None:
    config = QuantizationConfig.model_validate(
        {"weight_bits": 2, "activation_bits": 2, "layers": {"head": {"weight_bits": 4}}}
    )
    with pytest.raises(UnknownLayerError, match=r"'head' is not a layer.*head\.fc"):
        check_images(network(), image_set(16), config)


def test_labels_beyond_the_classes_are_refused() -> None:
    evaluation = image_set(6, 1, torch.arange(6))
    with pytest.raises(ImageSetError, match=r"labels go up to 5, the network has 5 classes.*from 0 to 4"):
        check_images(network(), image_set(16), W2A2, evaluation)


def test_both_sets_must_have_the_networks_shape() -> None:
    wide = ImageSet(torch.rand(16, 3, 4, 5))
    with pytest.raises(ImageSetError, match=r"calibration images are \(3, 4, 5\), the network takes \(3, 4, 4\)"):
        check_images(network(), wide, W2A2)
    with pytest.raises(ImageSetError, match=r"evaluation images are \(3, 4, 5\)"):
        check_images(network(), image_set(16), W2A2, wide)


@pytest.mark.parametrize(
    ("wanted", "shape", "last"),
    [
        ((1, 28, 28), (28, 28, 1), True),
        ((3, None, None), (28, 20, 3), True),
        ((3, 28, 28), (28, 28, 1), False),  # grey, and turned round
        ((1, 28, 28), (32, 32, 1), False),
        ((4, 28, 28), (28, 28, 4), False),
        ((3, 28, 28), (3, 28, 29), False),
    ],
)
def test_channels_that_come_last_are_named(wanted: Any, shape: tuple[int, ...], last: bool) -> None:
    images = torch.zeros(2, *shape)
    with pytest.raises(ImageSetError) as caught:
        check_image_shape(wanted, images, "calibration")
    assert ("channels last" in caught.value.detail) is last
    assert (caught.value.remedy.startswith("Put the channels first: images.transpose(0, 3, 1, 2)")) is last
    if shape[0] != wanted[0]:
        with pytest.raises(ImageSetError) as caught, named_if_unfit(wanted, images):
            pass
        assert ("channels last" in caught.value.detail) is last


def test_free_sizes_take_any_image() -> None:
    check_image_shape((3, None, None), torch.zeros(1, 3, 9, 7), "calibration")
    with pytest.raises(ImageSetError, match=r"takes \(3, None, None\)"):
        check_image_shape((3, None, None), torch.zeros(1, 1, 9, 7), "calibration")

"""Image files are judged by their headers, before anything is unpacked."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save

from aquant_core.config import Preprocess
from service.jobs.errors import ImagesInvalidError, PreprocessMissingError
from service.jobs.image_files import check_images

IMAGES = np.zeros((6, 1, 8, 8), np.uint8)
LIMIT = 1_000_000


def check(data: bytes) -> str:
    return check_images(io.BytesIO(data), len(data), "calibration", LIMIT)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def npy_header(text: str, body: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + body


def zipped(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


PICTURE = b"\x89PNG"  # the worker looks at it
PREPROCESS = Preprocess(size=8, crop=(8, 9), mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (zipped(**{"a/1.PNG": PICTURE, "b/2.jpeg": PICTURE, "b/": b""}), "zip"),
        (tarfile.TarInfo("a.png").tobuf() + bytes(1024), "tar"),
        (gzip.compress(bytes(1024), mtime=0), "tgz"),
    ],
)
def test_archives_of_image_files(data: bytes, kind: str) -> None:
    assert check_images(io.BytesIO(data), len(data), "calibration", LIMIT, PREPROCESS) == kind
    with pytest.raises(PreprocessMissingError, match=r"config\.preprocess"):
        check(data)


def test_as_many_pictures_as_fit_once_prepared() -> None:
    data = zipped(**{f"{index}.png": PICTURE for index in range(10)})
    needed = 10 * 8 * 9 * 4
    assert check_images(io.BytesIO(data), len(data), "calibration", needed, PREPROCESS) == "zip"
    with pytest.raises(ImagesInvalidError, match="2880 bytes"):
        check_images(io.BytesIO(data), len(data), "calibration", needed - 1, PREPROCESS)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (npz(images=IMAGES), "npz"),
        (npz(images=IMAGES, labels=np.arange(6)), "npz"),
        (npz(images=IMAGES.astype(np.float32), labels=np.zeros(6, np.uint8)), "npz"),
        (npy(IMAGES), "npy"),
        (npy(np.asfortranarray(IMAGES.astype(np.float64))), "npy"),
        (save({"images": IMAGES, "labels": np.arange(6)}), "safetensors"),
        (save({"images": IMAGES, "labels": np.zeros(6, np.uint8)}), "safetensors"),
    ],
)
def test_sound_files(data: bytes, kind: str) -> None:
    assert check(data) == kind


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (npz(pictures=IMAGES), "no array `images`; it has pictures"),
        (npz(images=IMAGES[:, 0]), r"shape \[6, 8, 8\]"),
        (npz(images=IMAGES[:0]), r"shape \[0, 1, 8, 8\]"),
        (npz(images=IMAGES.astype(np.int32)), "of type <i4"),
        (npz(images=IMAGES.astype(complex)), "of type <c16"),
        (npz(images=IMAGES, labels=np.arange(5)), r"shape \[5\] for 6 images"),
        (npz(images=IMAGES, labels=np.zeros(6)), "labels are of type"),
        (npz(images=np.array([None] * 6)), "Python objects"),
        (npy(np.array([{}])), "Python objects"),
        (
            npz(images=np.zeros((20_000, 1, 8, 8), np.uint8)),
            "1280000 bytes unpacked; this service takes 1000000",
        ),
        (npy(IMAGES)[:-1], "the file has 511"),
        (npz(images=IMAGES)[:-30], "cut short"),
        (npz(images=IMAGES)[:60], "cut short"),
        (save({"images": IMAGES})[:-1], "cut short"),
        (zipped(**{"images.npy": npy(IMAGES), "evil.py": b"x"}), "evil.py"),
        (zipped(**{"images.npy": b"\x93NUMPY"}), "does not begin"),
        (npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (10**9,)}"), "cannot be read"),
        (npy_header("__import__('os').system('true')"), "cannot be read"),
        (npy_header("{'descr': '|u1', 'shape': (1099511627776, 3, 8, 8)}"), "takes 211106232533053"),
        (npy_header("{'descr': '|u1', 'shape': (-1, 3, 8, 8)}"), r"shape is \(-1"),
        (b"P6 8 8 255\n" + bytes(192), "neither"),
    ],
)
def test_faults_are_named(data: bytes, words: str) -> None:
    with pytest.raises(ImagesInvalidError, match=words) as caught:
        check(data)
    assert caught.value.remedy


def test_a_lying_npz_entry_is_noticed() -> None:
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (100, 1, 8, 8)}"
    with pytest.raises(ImagesInvalidError, match="takes 6475 bytes"):
        check(zipped(**{"images.npy": npy_header(text, bytes(64))}))

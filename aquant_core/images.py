"""Calibration and evaluation images: reading them, and checking that they can be used."""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from aquant_core.config import Preprocess, QuantizationConfig
from aquant_core.errors import (
    ImageSetError,
    NonFiniteError,
    PreprocessMissingError,
    UnknownLayerError,
    memory_is_full,
)
from aquant_core.graph import CapturedModel
from aquant_core.image_archive import archive_kind, read_archive

MINIMUM_IMAGES = 16
ENOUGH_IMAGES = 256
_REMEDY = (
    "Give .npz, .npy or .safetensors with `images` (N, C, H, W), uint8 or float, and, if you have them, `labels` (N,); "
    "or a zip or tar of image files."
)
_CHANNELS_FIRST = "Put the channels first: images.transpose(0, 3, 1, 2) in numpy, images.permute(0, 3, 1, 2) in torch."
Kind = Literal["calibration", "evaluation"]

_UNREADABLE = (
    OSError, TypeError, ValueError, EOFError, LookupError, AttributeError, RuntimeError, SyntaxError,
    tokenize.TokenError, zlib.error, zipfile.BadZipFile, zipfile.LargeZipFile, tarfile.TarError, SafetensorError,
)  # fmt: skip
"""What numpy, zipfile, tarfile and safetensors raise on damaged files."""


@dataclass(frozen=True)
class ImageSet:
    """Images as the network takes them, and their classes if known.

    Attributes:
        images: (N, C, H, W) float32.
        labels: (N,) int64, or None.
    """

    images: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def digest(self) -> str:
        """sha256 over the images and the labels."""
        sha = hashlib.sha256(str(tuple(self.images.shape)).encode())
        sha.update(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            sha.update(self.labels.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file with ``images`` and ``labels``."""
        labels = {} if self.labels is None else {"labels": self.labels.contiguous()}
        save_file({"images": self.images.contiguous(), **labels}, path)

    @classmethod
    def load(cls, path: str | Path) -> ImageSet:
        """Reads what ``save`` wrote; see ``read_images``."""
        return read_images(path)


def read_images(path: str | Path, what: Kind = "calibration", preprocess: Preprocess | None = None) -> ImageSet:
    """Reads an image file and checks it by itself.

    uint8 images are scaled to [0, 1]; floats are taken as they are.

    Args:
        path: ``.npz`` (arrays ``images`` and, optionally, ``labels``; a single array of any name will do),
            ``.npy``, ``.safetensors``, or a zip or tar of image files (see ``image_archive.read_archive``). The
            content decides, not the name. Nothing is unpickled.
        what: how error messages call the set.
        preprocess: how image files are prepared; arrays are taken as prepared already.

    Raises:
        ImageSetError: unreadable, or of a wrong shape or type.
        NonFiniteError: NaN or infinity.
        MemoryError, RuntimeError: there is no memory for them, or for what their header claims.
    """
    if (archived := _read_archive(Path(path), what, preprocess)) is not None:
        return archived
    arrays = _read_arrays(Path(path), what)
    images = arrays.get("images", next(iter(arrays.values())) if len(arrays) == 1 else None)
    if images is None:
        raise ImageSetError(f"The {what} file has arrays {sorted(arrays)}, none called images.", _REMEDY)
    if images.ndim != 4 or images.size == 0:
        raise ImageSetError(f"The {what} images have shape {images.shape}, not (N, C, H, W).", _REMEDY)
    if images.dtype == np.uint8:
        tensor = torch.from_numpy(np.ascontiguousarray(images)).float().div_(255.0)
    elif images.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            tensor = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
    else:
        raise ImageSetError(f"The {what} images are {images.dtype}, not uint8 or float.", _REMEDY)
    check_values(tensor, what)
    return ImageSet(tensor, _read_labels(arrays.get("labels"), len(tensor), what))


def check_values(images: Tensor, what: Kind) -> None:
    """Whether there are images, and of finite values.

    Raises:
        ImageSetError: there are none, or they are not (N, C, H, W) of float32.
        NonFiniteError: NaN or infinity.
    """
    if images.dim() != 4 or images.numel() == 0 or images.dtype != torch.float32:
        raise ImageSetError(
            f"The {what} images are {images.dtype} of shape {tuple(images.shape)}, not float32 (N, C, H, W).", _REMEDY
        )
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).flatten(1).any(1).sum())
        raise NonFiniteError(f"{bad} of {len(images)} {what} images hold NaN or infinity.", "Remove them.")


def _read_labels(labels: np.ndarray | None, count: int, what: Kind) -> Tensor | None:
    if labels is None:
        return None
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ImageSetError(
            f"The {what} labels are {labels.dtype} of shape {labels.shape}, not integers of shape ({count},).",
            _REMEDY,
        )
    classes = torch.from_numpy(labels.astype(np.int64))
    if classes.min() < 0:
        raise ImageSetError(f"The {what} labels go down to {classes.min()}.", "Classes are numbered from 0.")
    return classes


def _read_archive(path: Path, what: Kind, preprocess: Preprocess | None) -> ImageSet | None:
    """The images of an archive of image files; None if the file is something else."""
    with _named_if_unreadable(what):
        kind = archive_kind(path)
        if kind is None:
            return None
        if preprocess is None:
            raise PreprocessMissingError(
                f"The {what} file is an archive of images, and nothing says how they are to be prepared.",
                'Set "preprocess" to the size, crop, mean and std of the training; {} takes the usual ones.',
            )
        return ImageSet(*read_archive(path, kind, preprocess))


def _read_arrays(path: Path, what: Kind) -> dict[str, np.ndarray]:
    with _named_if_unreadable(what), path.open("rb") as file:
        head = file.read(9)
        if head[8:9] == b"{" and not head.startswith(b"PK"):
            return dict(load_file(path))
        if not head.startswith((b"\x93NUMPY", b"PK")):  # numpy would take it for a pickle, and say so
            raise ValueError("it is neither .npz, .npy nor safetensors")
        file.seek(0)
        loaded: Any = np.load(file, allow_pickle=False)  # by its path, numpy leaves a damaged file open
        if isinstance(loaded, np.ndarray):
            return {"images": loaded}
        with loaded:
            arrays = {name: loaded[name] for name in loaded.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds something other than arrays")  # of which numpy gives the bytes
        return arrays


@contextlib.contextmanager
def _named_if_unreadable(what: Kind) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        if memory_is_full(error):
            raise
        raise ImageSetError(f"The {what} file cannot be read: {error}.", _REMEDY) from error


def check_images(
    model: CapturedModel,
    calibration: ImageSet,
    config: QuantizationConfig,
    evaluation: ImageSet | None = None,
) -> list[str]:
    """Checks that images, network and configuration belong together, before anything is computed.

    Returns:
        Warnings that do not stop the run.

    Raises:
        ImageSetError: too few images, duplicates only, another shape than the network's, labels too high.
        UnknownLayerError: the configuration names a layer that the network does not have.
    """
    names = [node.name for node in model.layers]
    for name in config.layers:
        if name not in names:
            raise UnknownLayerError(f"layers: {name!r} is not a layer of this network.", f"It has {', '.join(names)}.")
    if len(calibration) < MINIMUM_IMAGES:
        raise ImageSetError(
            f"{len(calibration)} calibration images are too few.",
            f"Give {MINIMUM_IMAGES} or more; 1,024 are usual.",
        )
    check_image_shape(model.input_shape, calibration.images, "calibration")
    warnings = []
    distinct = len(torch.unique(calibration.images.flatten(1), dim=0)) if len(calibration) <= 4096 else len(calibration)
    if distinct == 1:
        raise ImageSetError("All calibration images are the same.", "Give images like those the network will see.")
    if distinct < len(calibration):
        warnings.append(f"{len(calibration) - distinct} of {len(calibration)} calibration images are duplicates.")
    if len(calibration) < ENOUGH_IMAGES:
        warnings.append(f"{len(calibration)} calibration images are few; 1,024 are usual.")
    if evaluation is not None:
        check_image_shape(model.input_shape, evaluation.images, "evaluation")
        _check_labels_of(model, evaluation, "evaluation")
    _check_labels_of(model, calibration, "calibration")
    return warnings


def _check_labels_of(model: CapturedModel, images: ImageSet, what: Kind) -> None:
    if images.labels is not None:
        check_labels(int(model(images.images[:1]).shape[1]), images, what)


def check_labels(classes: int, images: ImageSet, what: Kind) -> None:
    """Whether the labels, if there are any, are among the network's classes.

    Raises:
        ImageSetError: they are not.
    """
    highest = -1 if images.labels is None else int(images.labels.max())
    if highest >= classes:
        raise ImageSetError(
            f"The {what} labels go up to {highest}, the network has {classes} classes.",
            f"Number the classes from 0 to {classes - 1}.",
        )


@contextlib.contextmanager
def named_if_unfit(wanted: Sequence[int | None], images: Tensor, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Runs a network on images; if it fails and they are not what it takes, the error says so.

    Height and width may differ where the network pools over all positions, so they are no error by themselves.

    Args:
        wanted: the (C, H, W) that the network takes, None being free.
        images: what it is given.
        dtype: the type it computes in; None where it converts the images.

    Raises:
        ImageSetError: the images are not (N, C, H, W) of a floating point type, or the network fails on their size or
            type.
        torch.OutOfMemoryError, torch.AcceleratorError: the device is full or broken, whatever the images' size.
        RuntimeError: the main memory is full; see ``memory_is_full``.
    """
    shape = tuple(images.shape)
    sizes = tuple("any" if size is None else size for size in wanted)
    last = len(shape) == 4 and wanted[0] not in (None, shape[1]) and _channels_last(wanted, shape[1:])
    unfit = ImageSetError(
        f"The images are {images.dtype} {shape}{' (channels last)' if last else ''}; the network takes "
        f"{dtype or 'floating point'} (N, C, H, W) with (C, H, W) = {sizes}.",
        _CHANNELS_FIRST if last else "Prepare them as for calibration, in a batch: one alone is images[None].",
    )
    if len(shape) != 4 or not images.is_floating_point() or wanted[0] not in (None, shape[1]):
        raise unfit
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError) as error:
        if memory_is_full(error):
            raise
        sized = all(size in (None, got) for size, got in zip(wanted, shape[1:], strict=True))
        if sized and dtype in (None, images.dtype):
            raise
        raise unfit from error


def check_image_shape(wanted: Sequence[int | None], images: Tensor, what: Kind) -> None:
    """Compares (N, C, H, W) images with the (C, H, W) a network takes, None being free.

    Raises:
        ImageSetError: they differ.
    """
    shape = tuple(images.shape[1:])
    if any(size is not None and size != got for size, got in zip(wanted, shape, strict=True)):
        last = _channels_last(wanted, shape)
        raise ImageSetError(
            f"The {what} images are {shape}{' (channels last)' if last else ''}, the network takes {tuple(wanted)} "
            "(channels, height, width).",
            _CHANNELS_FIRST if last else "Resize or convert them as for training.",
        )


def _channels_last(wanted: Sequence[int | None], shape: Sequence[int]) -> bool:
    """Whether (H, W, C) was given where (C, H, W) is taken."""
    height, width, channels = shape
    turned = (channels, height, width)
    return channels in (1, 3) and all(size in (None, got) for size, got in zip(wanted, turned, strict=True))

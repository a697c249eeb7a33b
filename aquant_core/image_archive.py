"""Archives of image files: read entry by entry within limits, prepared as torchvision does; nothing goes to disk."""

from __future__ import annotations

import functools
import gzip
import io
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor

from aquant_core.config import Preprocess
from aquant_core.errors import ImageSetError
from aquant_core.torchvision_import import import_torchvision

Archive = Literal["zip", "tar", "tgz"]

MAX_ENTRIES = 100_000
MAX_ENTRY_BYTES = 32 * 2**20
MAX_RATIO = 100
"""Largest share of unpacked to packed bytes, beyond the first ``_FREE_BYTES``: images do not shrink any further."""
MAX_PIXELS = 2**24
"""Most pixels of an image, as it is kept and as it is resized."""

_FREE_BYTES = 2**20
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MAX_TAR_HEADER_BYTES = 64 * 1024
_TAR_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
_REMEDY = (
    "Give a zip or tar (also .tar.gz) of PNG, JPEG, BMP or WebP files alone, in one folder for each class if they are "
    "labelled."
)


def archive_kind(path: Path) -> Archive | None:
    """What archive of images a file may be, by its first bytes; an ``.npz`` is none."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            return None if any(name.endswith(".npy") for name in archive.namelist()) else "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tgz"
    return "tar" if head[257:262] == b"ustar" else None


def read_archive(path: Path, kind: Archive, preprocess: Preprocess) -> tuple[Tensor, Tensor | None]:
    """The images of an archive and, if they lie in two folders or more, their classes.

    A class is a folder that holds images; classes are numbered in the order of their names, as by torchvision's
    ``ImageFolder``. The images come in turn from each folder, so that any part of them has some of every class.

    Args:
        path: a zip or tar of BMP, JPEG, PNG and WebP files.
        kind: which, from ``archive_kind``.
        preprocess: how each image is prepared.

    Returns:
        Images (N, C, H, W), float32, normalized, C being 1 or 3 by the number of means; labels (N,) int64, or None.

    Raises:
        ImageSetError: an entry that is no such file, or has no business in an archive of images; too many, too large.
        zipfile.BadZipFile, tarfile.TarError, OSError, EOFError, zlib.error: the archive is damaged.
    """
    prepare = _Preparation(preprocess)
    by_folder: dict[str, list[tuple[str, Tensor]]] = {}
    with path.open("rb") as file:
        for name, data in (_zip_entries if kind == "zip" else _tar_entries)(file, path.stat().st_size, kind):
            place = _checked_name(name)
            if _is_litter(place):
                continue
            if place.suffix.lower() not in _SUFFIXES:
                raise ImageSetError(f"The archive holds {_shown(name)}, which is no image.", _REMEDY)
            by_folder.setdefault(str(place.parent), []).append((place.name, prepare(_shown(name), data)))
    if not by_folder:
        raise ImageSetError("The archive holds no image.", _REMEDY)
    folders = sorted(by_folder)
    if len(folders) > 1 and "." in folders:
        raise ImageSetError("The archive has images in folders, and some beside the folders.", _REMEDY)
    entries = [
        (rank, label, image)
        for label, folder in enumerate(folders)
        for rank, (_, image) in enumerate(sorted(by_folder[folder], key=lambda entry: entry[0]))
    ]
    entries.sort(key=lambda entry: entry[:2])
    shapes = sorted({tuple(image.shape) for _, _, image in entries})
    if len(shapes) > 1:
        raise ImageSetError(
            f"The prepared images have {len(shapes)} shapes, {shapes[0]} and {shapes[-1]} among them.",
            "Set preprocess.crop, or preprocess.size to [height, width].",
        )
    images = torch.stack([image for _, _, image in entries]).float().div_(255.0)
    images.sub_(torch.tensor(preprocess.mean).view(1, -1, 1, 1)).div_(torch.tensor(preprocess.std).view(1, -1, 1, 1))
    labels = torch.tensor([label for _, label, _ in entries]) if len(folders) > 1 else None
    return images, labels


class _Preparation:
    """From an image file's bytes to uint8 (C, H, W)."""

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess

    @functools.cached_property
    def _steps(self) -> Callable[[Image.Image], Tensor]:
        transforms = import_torchvision().transforms  # takes a second or two: not before there is an image to prepare
        interpolation = transforms.InterpolationMode(self._preprocess.interpolation)
        steps = [transforms.Resize(self._preprocess.size, interpolation)]
        if self._preprocess.crop is not None:
            steps.append(transforms.CenterCrop(self._preprocess.crop))
        prepared: Callable[[Image.Image], Tensor] = transforms.Compose([*steps, transforms.PILToTensor()])
        return prepared

    def __call__(self, name: str, data: bytes) -> Tensor:
        with _decoded(name, data) as image:
            width, height = image.size
            _check_pixels(name, "has", width, height)
            _check_pixels(name, "would be resized to", *_resized(self._preprocess.size, width, height))
            try:
                converted = image.convert("L" if len(self._preprocess.mean) == 1 else "RGB")
            except (OSError, ValueError, SyntaxError, EOFError) as error:
                raise ImageSetError(f"Image {name} is damaged: {error}.", "Write it again.") from error
        return self._steps(converted)


def _decoded(name: str, data: bytes) -> Image.Image:
    """The image by its header; no pixel is read yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageSetError(f"Image {name} has too many pixels: {error}.", "Scale it down.") from error
    except Exception as error:  # Pillow's readers raise what they like on damaged files
        raise ImageSetError(
            f"Image {name} cannot be read as {', '.join(_FORMATS)} ({type(error).__name__}).", _REMEDY
        ) from error


def _resized(size: int | tuple[int, int], width: int, height: int) -> tuple[int, int]:
    if not isinstance(size, int):
        return size[1], size[0]
    short, long = sorted((width, height))
    return size, size * long // max(short, 1)


def _check_pixels(name: str, what: str, width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise ImageSetError(
            f"Image {name} {what} {width} x {height} pixels; 1 to {MAX_PIXELS} are read.", "Scale or crop it."
        )


def _zip_entries(file: IO[bytes], size: int, _: Archive) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        _check_count(len(entries))
        if sum(entry.compress_size for entry in entries) > size:
            raise ImageSetError("The archive's entries take more bytes than the archive: they overlap.", _REMEDY)
        for entry in entries:
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ImageSetError(f"The archive holds {_shown(entry.filename)}, a link or device.", _REMEDY)
            if entry.is_dir():
                continue
            if entry.flag_bits & 1:
                raise ImageSetError(f"{_shown(entry.filename)} in the archive is encrypted.", _REMEDY)
            limit = min(MAX_ENTRY_BYTES, _FREE_BYTES + MAX_RATIO * entry.compress_size)
            with archive.open(entry) as member:
                yield entry.filename, _read(member, limit, entry.filename)


def _tar_entries(file: IO[bytes], size: int, kind: Archive) -> Iterator[tuple[str, bytes]]:
    unpacked = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if kind == "tgz" else file
    stream = _Bounded(unpacked, _FREE_BYTES + MAX_RATIO * size)
    count = 0
    # As a stream: what is skipped is not kept, and nothing is read twice.
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_TarEntry) as archive:
        for entry in archive:
            count += 1
            _check_count(count)
            if entry.isdir():
                continue
            if not entry.isreg() or entry.issparse():
                raise ImageSetError(f"The archive holds {_shown(entry.name)}, a link or device.", _REMEDY)
            member = archive.extractfile(entry)
            assert member is not None  # it is a regular file
            yield entry.name, _read(member, MAX_ENTRY_BYTES, entry.name)


class _TarEntry(tarfile.TarInfo):
    """An entry whose size is checked when its header is read: tarfile takes some kinds whole, as part of the next."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _TarEntry:
        entry = super().frombuf(buf, encoding, errors)
        limit = _MAX_TAR_HEADER_BYTES if entry.type in _TAR_HEADERS else MAX_ENTRY_BYTES
        if entry.isreg() or entry.type in _TAR_HEADERS:
            if not 0 <= entry.size <= limit:
                raise ImageSetError(
                    f"{_shown(entry.name)} in the archive is said to have {entry.size} bytes; {limit} are read.",
                    _REMEDY,
                )
        elif not entry.isdir():
            raise ImageSetError(f"The archive holds {_shown(entry.name)}, a link or device.", _REMEDY)
        return entry


class _Bounded(io.RawIOBase):
    """A stream that unpacks no more than ``limit`` bytes."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file, self._left = file, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ImageSetError(f"The archive unpacks to more than {MAX_RATIO} times its size: images do not.", _REMEDY)
        return data


def _read(member: IO[bytes], limit: int, name: str) -> bytes:
    data = member.read(limit + 1)
    if len(data) > limit:
        raise ImageSetError(f"{_shown(name)} in the archive unpacks to more than {limit} bytes.", _REMEDY)
    return data


def _check_count(count: int) -> None:
    if count > MAX_ENTRIES:
        raise ImageSetError(f"The archive has more than {MAX_ENTRIES} entries.", "Give fewer images.")


def _checked_name(name: str) -> PurePosixPath:
    place = PurePosixPath(name)
    if place.is_absolute() or ".." in place.parts or "\\" in name or "\0" in name or not place.name:
        raise ImageSetError(f"The archive holds {_shown(name)}, which is no name of a file in a folder.", _REMEDY)
    return place


def _is_litter(place: PurePosixPath) -> bool:
    """What file managers put beside the files."""
    return "__MACOSX" in place.parts or place.name in (".DS_Store", "Thumbs.db", "desktop.ini")


def _shown(name: str) -> str:
    return repr(name if len(name) <= 100 else f"{name[:100]}...")

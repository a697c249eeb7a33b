"""Checks an image file by its headers alone: arrays that can be images, or an archive of image files."""

from __future__ import annotations

import ast
import math
import stat
import struct
import zipfile
from dataclasses import dataclass
from typing import IO, BinaryIO

from aquant_core.config import Preprocess
from service.jobs.errors import ImagesInvalidError, PreprocessMissingError
from service.jobs.safetensors_header import HeaderError, looks_like_safetensors, read_header
from service.jobs.zip_directory import DAMAGED, open_zip

FORMATS = (
    "Send an .npz with an array `images` of shape (N, C, H, W) (uint8 or float32) and, if there are any, "
    "`labels` of shape (N,); or the images alone as .npy; or the same names as safetensors; or, with "
    "config.preprocess, a zip or tar of PNG, JPEG, BMP or WebP files."
)
ARCHIVES = ("zip", "tar", "tgz")
"""The formats of archives of image files."""
_MAX_HEADER_BYTES = 10_000
"""numpy reads no longer ones either."""
_MAX_DIMENSIONS = 32
_LARGEST = 2**63 - 1
_MAX_ENTRIES = 64
# Of archives of image files; as the worker's reader has them (aquant_core.image_archive).
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MAX_FILE_BYTES = 32 * 1024 * 1024
_MAX_RATIO, _FREE_BYTES = 100, 1024 * 1024
_IMAGE_KINDS = {"uint8": 1, "float16": 2, "float32": 4, "float64": 8}
_NUMPY = {"|u1": "uint8", "<f2": "float16", "<f4": "float32", "<f8": "float64"}
_SAFETENSORS = {"U8": "uint8", "F16": "float16", "F32": "float32", "F64": "float64"}
_LABELS = {
    "uint8",
    "|i1",
    "<u2",
    "<i2",
    "<u4",
    "<i4",
    "<u8",
    "<i8",
    "I8",
    "U16",
    "I16",
    "U32",
    "I32",
    "U64",
    "I64",
}


@dataclass(frozen=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]


def check_images(file: BinaryIO, size: int, what: str, max_bytes: int, preprocess: Preprocess | None = None) -> str:
    """The format of an image file: ``npz``, ``npy``, ``safetensors``, or an archive: ``zip``, ``tar``, ``tgz``.

    Args:
        what: ``calibration`` or ``evaluation``, for the messages.
        max_bytes: the most that the images may take unpacked.
        preprocess: how the images of an archive are prepared.

    Raises:
        ImagesInvalidError: damaged, another format, or not images.
        PreprocessMissingError: an archive, but how its images are prepared is not said.
    """
    head = file.read(512)
    archive = _archive_kind(head)
    if archive == "zip" and _is_npz(file, size, what):
        kind, arrays = "npz", _npz_arrays(file, size, what)
    elif archive is not None:
        if preprocess is None:
            raise PreprocessMissingError(
                f"The {what} file is an archive of images, and nothing says how they are to be prepared.",
                "Set config.preprocess to the size, crop, mean and std of the training; {} takes the usual ones of "
                "ImageNet.",
            )
        if archive == "zip":
            _check_zip(file, size, what, max_bytes, preprocess)
        return archive  # a tar has no directory: it is read in the worker's sandbox
    elif head.startswith(b"\x93NUMPY"):
        kind, arrays = "npy", {"images": _npy_header(_from_start(file), size, what)}
    elif looks_like_safetensors(head):
        kind, arrays = "safetensors", _safetensors_arrays(file, size, what)
    else:
        raise ImagesInvalidError(f"The {what} file is neither .npz, .npy, safetensors, zip nor tar.", FORMATS)
    _check_arrays(arrays, what, max_bytes)
    return kind


def _check_arrays(arrays: dict[str, _Array], what: str, max_bytes: int) -> None:
    images = arrays.get("images")
    if images is None:
        raise ImagesInvalidError(
            f"The {what} file has no array `images`; it has {', '.join(sorted(arrays)) or 'none at all'}.",
            FORMATS,
        )
    if images.dtype not in _IMAGE_KINDS:
        raise ImagesInvalidError(f"The {what} images are of type {images.dtype}; uint8 or float32 is needed.", FORMATS)
    if len(images.shape) != 4 or not all(images.shape):
        raise ImagesInvalidError(
            f"The {what} images have the shape {list(images.shape)}; four dimensions (N, C, H, W) are "
            "needed, none of them 0.",
            FORMATS,
        )
    unpacked = math.prod(images.shape) * _IMAGE_KINDS[images.dtype]
    _check_bytes(unpacked, what, max_bytes)
    labels = arrays.get("labels")
    if labels is None:
        return
    if labels.dtype not in _LABELS:
        raise ImagesInvalidError(f"The {what} labels are of type {labels.dtype}; an integer type is needed.", FORMATS)
    if labels.shape != images.shape[:1]:
        raise ImagesInvalidError(
            f"The {what} labels have the shape {list(labels.shape)} for {images.shape[0]} images.",
            f"Give one label per image: shape [{images.shape[0]}].",
        )


def _safetensors_arrays(file: BinaryIO, size: int, what: str) -> dict[str, _Array]:
    try:
        entries = read_header(file, size)
    except HeaderError as error:
        raise ImagesInvalidError(
            f"The {what} file is a damaged safetensors file: {error}.", "Save or upload it again."
        ) from error
    return {name: _Array(_SAFETENSORS.get(entry.dtype, entry.dtype), entry.shape) for name, entry in entries.items()}


def _archive_kind(head: bytes) -> str | None:
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x1f\x8b"):
        return "tgz"
    return "tar" if head[257:262] == b"ustar" else None


def _entries(file: BinaryIO, size: int, what: str) -> list[zipfile.ZipInfo]:
    try:
        with open_zip(file, size) as archive:
            return archive.infolist()
    except DAMAGED as error:
        raise _damaged_zip(what, error) from error


def _damaged_zip(what: str, error: Exception) -> ImagesInvalidError:
    return ImagesInvalidError(
        f"The {what} file is a damaged zip or .npz archive ({error}), cut short perhaps.", "Save or upload it again."
    )


def _is_npz(file: BinaryIO, size: int, what: str) -> bool:
    return any(entry.filename.endswith(".npy") for entry in _entries(file, size, what))


def _check_zip(file: BinaryIO, size: int, what: str, max_bytes: int, preprocess: Preprocess) -> None:
    """What an archive's directory tells of its images; the worker looks at them themselves."""
    entries = [entry for entry in _entries(file, size, what) if not entry.is_dir()]
    for entry in entries:
        name = entry.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise ImagesInvalidError(
                f"The {what} archive holds {name!r}, which is no name of a file in a folder.", FORMATS
            )
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
            raise ImagesInvalidError(f"The {what} archive holds {name!r}, a link or device.", FORMATS)
        if entry.file_size > _MAX_FILE_BYTES or entry.file_size > _FREE_BYTES + _MAX_RATIO * entry.compress_size:
            raise ImagesInvalidError(
                f"{name!r} in the {what} archive unpacks from {entry.compress_size} to {entry.file_size} bytes.",
                f"An image file may have {_MAX_FILE_BYTES} bytes, and packs by no factor of {_MAX_RATIO}.",
            )
    images = sum(entry.filename.lower().endswith(_SUFFIXES) for entry in entries)
    if not images:
        raise ImagesInvalidError(f"The {what} archive holds no image file and no array.", FORMATS)
    if preprocess.crop is not None:
        height, width = (preprocess.crop,) * 2 if isinstance(preprocess.crop, int) else preprocess.crop
        _check_bytes(images * len(preprocess.mean) * height * width * 4, what, max_bytes)


def _check_bytes(unpacked: int, what: str, max_bytes: int) -> None:
    if unpacked > max_bytes:
        raise ImagesInvalidError(
            f"The {what} images take {unpacked} bytes unpacked; this service takes {max_bytes}.",
            "Send fewer images: 1,024 are enough to calibrate.",
        )


def _npz_arrays(file: BinaryIO, size: int, what: str) -> dict[str, _Array]:
    try:
        with open_zip(file, size) as archive:
            entries = archive.infolist()
            if len(entries) > _MAX_ENTRIES:
                raise ImagesInvalidError(f"The {what} archive has {len(entries)} entries.", FORMATS)
            arrays = {}
            for entry in entries:
                if not entry.filename.endswith(".npy"):
                    raise ImagesInvalidError(
                        f"The {what} archive holds {entry.filename!r}, which is no array.", FORMATS
                    )
                with archive.open(entry) as member:
                    arrays[entry.filename.removesuffix(".npy")] = _npy_header(_Counted(member), entry.file_size, what)
            return arrays
    except DAMAGED as error:
        raise _damaged_zip(what, error) from error


class _Counted:
    """Reads on from where a file stands and counts the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.position = file, 0

    def read(self, length: int) -> bytes:
        data = self._file.read(length)
        self.position += len(data)
        return data


def _from_start(file: BinaryIO) -> _Counted:
    file.seek(0)
    return _Counted(file)


def _npy_header(file: _Counted, size: int, what: str) -> _Array:
    """Type and shape of an .npy file of ``size`` bytes, which the two must account for to the byte."""
    damaged = f"The {what} file holds a damaged array: "
    magic = file.read(8)
    if len(magic) < 8 or not magic.startswith(b"\x93NUMPY"):
        raise ImagesInvalidError(f"{damaged}it does not begin as .npy does.", FORMATS)
    width, form = (2, "<H") if magic[6] == 1 else (4, "<I")
    (length,) = struct.unpack(form, file.read(width).ljust(width, b"\0"))
    if length > _MAX_HEADER_BYTES:
        raise ImagesInvalidError(f"{damaged}its header claims {length} bytes.", FORMATS)
    try:
        header = ast.literal_eval(file.read(length).decode("utf-8"))
        descr, shape = header["descr"], tuple(header["shape"])
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise ImagesInvalidError(f"{damaged}its header cannot be read.", FORMATS) from error
    if not isinstance(descr, str) or "O" in descr:
        raise ImagesInvalidError(
            f"The {what} file holds an array of Python objects or records, which is never read.", FORMATS
        )
    if len(shape) > _MAX_DIMENSIONS or not all(type(number) is int and 0 <= number <= _LARGEST for number in shape):
        raise ImagesInvalidError(f"{damaged}its shape is {str(shape)[:100]}.", FORMATS)
    if descr.lstrip("<|=>")[1:].isdigit():
        needed = file.position + math.prod(shape) * int(descr.lstrip("<|=>")[1:]) * (4 if "U" in descr else 1)
        if needed != size:
            raise ImagesInvalidError(
                f"{damaged}shape {list(shape)} of type {descr} takes {needed} bytes, the file has {size}.",
                "Save or upload it again.",
            )
    return _Array(_NUMPY.get(descr, descr), shape)

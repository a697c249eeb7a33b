"""Checks an image file by its headers alone: arrays of a shape and type that can be images."""

from __future__ import annotations

import ast
import math
import struct
import zipfile
from dataclasses import dataclass
from typing import IO, BinaryIO

from service.jobs.errors import ImagesInvalidError
from service.jobs.safetensors_header import HeaderError, looks_like_safetensors, read_header

FORMATS = (
    "Send an .npz with an array `images` of shape (N, C, H, W) (uint8 or float32) and, if there are any, "
    "`labels` of shape (N,); or the images alone as .npy; or the same names as safetensors."
)
_MAX_HEADER_BYTES = 64 * 1024
_MAX_ENTRIES = 64
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


def check_images(file: BinaryIO, size: int, what: str, max_bytes: int) -> str:
    """The format of an image file: ``npz``, ``npy`` or ``safetensors``.

    Args:
        what: ``calibration`` or ``evaluation``, for the messages.
        max_bytes: the most that the images may take unpacked.

    Raises:
        ImagesInvalidError: damaged, another format, or not images.
    """
    head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        kind, arrays = "npz", _npz_arrays(file, what)
    elif head.startswith(b"\x93NUMPY"):
        kind, arrays = "npy", {"images": _npy_header(_from_start(file), size, what)}
    elif looks_like_safetensors(head):
        kind, arrays = "safetensors", _safetensors_arrays(file, size, what)
    else:
        raise ImagesInvalidError(f"The {what} file is neither .npz, .npy nor safetensors.", FORMATS)
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
    if unpacked > max_bytes:
        raise ImagesInvalidError(
            f"The {what} images take {unpacked} bytes unpacked; this service takes {max_bytes}.",
            "Send fewer images: 1,024 are enough to calibrate.",
        )
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


def _npz_arrays(file: BinaryIO, what: str) -> dict[str, _Array]:
    try:
        with zipfile.ZipFile(file) as archive:
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
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        NotImplementedError,
        EOFError,
        OSError,
        RuntimeError,
    ) as error:
        # RuntimeError: an encrypted entry
        raise ImagesInvalidError(
            f"The {what} file is a damaged .npz archive ({error}), cut short perhaps.",
            "Save or upload it again.",
        ) from error


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
    if not all(type(number) is int and number >= 0 for number in shape):
        raise ImagesInvalidError(f"{damaged}its shape is {shape!r}.", FORMATS)
    if descr.lstrip("<|=>")[1:].isdigit():
        needed = file.position + math.prod(shape) * int(descr.lstrip("<|=>")[1:]) * (4 if "U" in descr else 1)
        if needed != size:
            raise ImagesInvalidError(
                f"{damaged}shape {list(shape)} of type {descr} takes {needed} bytes, the file has {size}.",
                "Save or upload it again.",
            )
    return _Array(_NUMPY.get(descr, descr), shape)

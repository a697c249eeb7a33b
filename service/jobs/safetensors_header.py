"""Reads a safetensors file's header and holds it against the file's length, without touching the tensors."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from aquant_core.config_reading import why_not_json

MAX_HEADER_BYTES = 4 * 1024 * 1024
"""Room for tens of thousands of tensors; the format's own bound, 100 MB, would take ten times as much of memory."""
_FORMATS_OWN_BOUND = 100_000_000
_LARGEST = 2**63 - 1

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class HeaderError(ValueError):
    """The header contradicts itself or the file; the message says how."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header."""

    dtype: str
    shape: tuple[int, ...]


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file that begins so claims to be safetensors: a length, then a JSON object."""
    if len(head) < 9:
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return 2 <= length <= _FORMATS_OWN_BOUND and head[8:9] == b"{"


def read_header(file: BinaryIO, size: int) -> dict[str, TensorEntry]:
    """The tensors a file of ``size`` bytes declares, by name.

    Raises:
        HeaderError: the header is not the one of a whole, sound file.
    """
    file.seek(0)
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_HEADER_BYTES:
        raise HeaderError(f"its header is said to be {length} bytes long; at most {MAX_HEADER_BYTES} are read")
    if 8 + length > size:
        raise HeaderError(f"its header is said to be {length} bytes long, the file has {size}: it is cut short")
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is not JSON ({why_not_json(error)})") from error
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, raw in header.items():
        entries[name], span = _read_entry(name, raw)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise HeaderError(f"its tensors leave a gap or overlap at byte {end}")
        end = stop
    if 8 + length + end != size:
        fault = "is cut short" if 8 + length + end > size else "has bytes to spare"
        raise HeaderError(f"its header describes {8 + length + end} bytes, the file has {size}: it {fault}")
    return entries


def _read_entry(name: str, raw: Any) -> tuple[TensorEntry, tuple[int, int]]:
    try:
        dtype, shape = str(raw["dtype"]), tuple(raw["shape"])
        start, stop = raw["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise HeaderError(f"the entry of tensor {name!r} lacks dtype, shape or data_offsets") from error
    if not all(type(number) is int and 0 <= number <= _LARGEST for number in (*shape, start, stop)):
        raise HeaderError(f"tensor {name!r} has a shape or offset that is no natural number")
    if dtype not in DTYPE_BITS:
        raise HeaderError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    if math.prod(shape) * DTYPE_BITS[dtype] != (stop - start) * 8:
        raise HeaderError(f"tensor {name!r} ({dtype}, shape {list(shape)}) does not fill its {stop - start} bytes")
    return TensorEntry(dtype, shape), (start, stop)

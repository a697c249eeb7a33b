"""Opens a zip archive only if its directory is small enough to be held, whatever it says of itself."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import BinaryIO

MAX_DIRECTORY_BYTES = 4 * 1024 * 1024
"""Room for tens of thousands of entries; zipfile reads the directory whole, and makes an object of each entry."""

DAMAGED = (
    zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, OSError, RuntimeError, ValueError,
    OverflowError, IndexError, struct.error, zlib.error,
)  # fmt: skip
"""What zipfile raises on archives that are cut, spoilt or made up (RuntimeError: encrypted)."""

_END, _END_64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64_BYTES = 20
_MAX_COMMENT_BYTES = 0xFFFF


def open_zip(file: BinaryIO, size: int) -> zipfile.ZipFile:
    """The archive, whose entries are known and lie within it side by side.

    Raises:
        DAMAGED: any of them; the message says what is wrong.
    """
    length = _directory_bytes(file, size)
    if length > MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"its directory takes {length} bytes; {MAX_DIRECTORY_BYTES} are read")
    archive = zipfile.ZipFile(file)
    for entry in archive.infolist():
        if not entry.filename:
            raise zipfile.BadZipFile("an entry has no name")
        if entry.flag_bits & 1:
            raise zipfile.BadZipFile("it is encrypted")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"it is compressed by method {entry.compress_type}; store or deflate it")
    if sum(entry.compress_size for entry in archive.infolist()) > size:
        raise zipfile.BadZipFile("its entries take more bytes than it has: they overlap")
    return archive


def _directory_bytes(file: BinaryIO, size: int) -> int:
    """How many bytes zipfile would read as the directory."""
    start = max(0, size - _END.size - _MAX_COMMENT_BYTES)
    file.seek(start)
    tail = file.read(size - start)
    # As zipfile looks for it: at the very end, else the last that is found.
    at = len(tail) - _END.size
    if at < 0 or tail[at : at + 4] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise zipfile.BadZipFile("it has no directory")
    length: int = _END.unpack_from(tail, at)[5]
    before = start + at - _LOCATOR_64_BYTES - _END_64.size
    if before >= 0:
        file.seek(before)
        large = file.read(_END_64.size + 4)
        if large[:4] == b"PK\x06\x06" and large[_END_64.size :] == b"PK\x06\x07":
            length = max(length, _END_64.unpack_from(large)[8])
    return length

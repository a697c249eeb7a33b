"""Spoils files as damage and malice do, for property tests; and keeps what once broke a reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

CORPUS = Path(__file__).parents[1] / "fuzz_corpus"
"""Files that once broke a reader, in a folder for each reader; they are read in every run."""

_INTERESTING = [
    value.to_bytes(width, order)
    for width in (1, 2, 4, 8)
    for value in (0, 1, 0x7F, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
    for order in ("little", "big")
]
_WORDS = [
    b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"\x93NUMPY", b"ustar", b"{", b"}",
    b"[", b"(", b"-", b"9" * 40, b'"', b"|O", b"../", b"\x00", b"\xff\xff\xff\xff\x0f", b"size=-512\n", b"NaN",
    b"1e999",
]  # fmt: skip


def found_before(reader: str) -> list[Path]:
    """The files of the corpus for a reader."""
    return sorted((CORPUS / reader).glob("*"))


@st.composite
def spoilt(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds after a few edits: bits, numbers, words, pieces lost, doubled, or taken from another seed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(("bit", "number", "word", "insert", "lose", "double", "cut", "splice", "bytes")))
        match kind:
            case "bit" if at < len(data):
                data[at] ^= 1 << length % 8
            case "number":
                number = draw(st.sampled_from(_INTERESTING))
                data[at : at + len(number)] = number
            case "word":
                word = draw(st.sampled_from(_WORDS))
                data[at : at + len(word)] = word
            case "insert":
                data[at:at] = draw(st.sampled_from(_WORDS))
            case "lose":
                del data[at : at + length]
            case "double":
                data[at:at] = data[at : at + length]
            case "cut":
                del data[at:]
            case "splice":
                other = draw(st.sampled_from(seeds))
                start = draw(st.integers(0, len(other)))
                data[at : at + length] = other[start : start + length]
            case "bytes":
                data[at : at + 8] = draw(st.binary(max_size=8))
    return bytes(data)

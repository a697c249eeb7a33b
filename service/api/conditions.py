"""Conditional and partial requests (RFC 9110): entity tags, ranges, and the digest of a representation (RFC 9530)."""

from __future__ import annotations

import base64
import re
from typing import Annotated, Any

from fastapi import Header

_TAG = re.compile(r'(?:W/)?("[^"]*")')
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")

IfNoneMatch = Annotated[
    str | None,
    Header(
        alias="If-None-Match", description="Entity tags that the client has; 304 if one of them is current, or for `*`."
    ),
]

NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "What the client has (If-None-Match) is current"}}
"""OpenAPI's entry for an answer without a body."""


class RangeNotSatisfiableError(Exception):
    """The range asked for has no byte in the file."""


def entity_tag(digest: str) -> str:
    """A strong entity tag."""
    return f'"{digest}"'


def is_current(if_none_match: str | None, tag: str) -> bool:
    """Whether the client has the representation already."""
    if if_none_match is None:
        return False
    return if_none_match.strip() == "*" or tag in _TAG.findall(if_none_match)


def repr_digest(sha256: str) -> str:
    """The ``Repr-Digest`` of a file whose sha256 is given in hex."""
    return f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"


def byte_range(asked: str | None, size: int) -> tuple[int, int] | None:
    """Start and stop (exclusive) of the one range asked for; None for the whole.

    A header that cannot be read, or asks for several pieces, may be ignored (section 14.2).

    Raises:
        RangeNotSatisfiableError: it lies outside the file.
    """
    match = None if asked is None else _RANGE.fullmatch(asked.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    else:
        start, stop = max(0, size - int(last)), size
    if start >= stop:
        raise RangeNotSatisfiableError(asked)
    return start, stop


def described(**headers: str) -> dict[str, Any]:
    """OpenAPI's entry for headers of an answer, by name (underscores for hyphens) and description."""
    return {
        name.replace("_", "-"): {"description": text, "schema": {"type": "string"}} for name, text in headers.items()
    }

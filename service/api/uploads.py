"""The endpoints of resumable uploads: a large file once, in pieces, named by the sha256 of its bytes.

What has arrived is kept in piece objects, each with a row, so that an upload goes on where it was cut off, also after
a restart. The last piece has them joined into one object, which is checked against the digest on the way.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from service.api.auth import Owner, OwnerDep
from service.api.conditions import described
from service.api.deps import Parts, PartsDep
from service.api.forms import DRAIN_BYTES
from service.api.problems import REFUSALS, responses
from service.artifacts import Artifacts, ArtifactsDownError, Stored, upload_prefix
from service.jobs.errors import (
    ContentRangeError,
    DigestMismatchError,
    ServiceError,
    UploadEmptyError,
    UploadNotFoundError,
    UploadOffsetError,
)
from service.jobs.records import UploadRecord
from service.jobs.schemas import UploadDocument

router = APIRouter(
    tags=["uploads"],
    responses=responses(*REFUSALS, "request_invalid", "database_unavailable", "artifacts_unavailable"),
)

PIECE_BYTES = 32 * 1024 * 1024
"""What is written as one object: the most that is lost when this process dies."""

Digest = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="The sha256 of the whole file, in hex.")]

_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")
_RANGE_REMEDY = "Send `bytes FIRST-LAST/SIZE` with exactly those bytes, or `bytes */SIZE` with none."
_HEADERS = described(
    Upload_Offset="Bytes that are there: where to go on.",
    Upload_Length="Bytes that the whole file will have.",
    Upload_Complete="?1 once it is whole and checked, else ?0.",
)


@dataclass(frozen=True)
class _Range:
    """Bytes ``start`` to ``stop`` (exclusive) of a file of ``size``."""

    start: int
    stop: int
    size: int


@router.put(
    "/uploads/{sha256}",
    responses={
        200: {"description": "It was complete before", "headers": _HEADERS},
        201: {"description": "It is complete", "headers": _HEADERS, "model": UploadDocument},
        202: {"description": "Go on at `offset`", "headers": _HEADERS, "model": UploadDocument},
        **responses(
            "content_range_invalid", "upload_offset_conflict", "upload_too_large", "upload_empty", "digest_mismatch",
            "request_invalid", "upload_not_found",
        ),
    },
    openapi_extra={
        "requestBody": {
            "required": False,
            "description": "The whole file, or the bytes that Content-Range names.",
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)  # fmt: skip
async def put_upload(
    request: Request,
    response: Response,
    parts: PartsDep,
    owner: OwnerDep,
    sha256: Digest,
    content_range: Annotated[
        str | None,
        Header(
            alias="Content-Range",
            description="Which bytes of the file these are, `bytes FIRST-LAST/SIZE`; those that are there already are "
            "passed over. `bytes */SIZE` with an empty body asks to finish. Without it the body is the whole file.",
            examples=["bytes 0-1048575/4194304"],
        ),
    ] = None,
    content_length: Annotated[str | None, Header(include_in_schema=False)] = None,
) -> UploadDocument:
    """Send a file, or the next piece of one."""
    body = _Body(request.stream())
    try:
        wanted = _read_range(content_range, content_length)
        upload = await run_in_threadpool(_begin, owner, sha256, wanted.size)
        if upload.key is not None:
            await body.drain()
            return _describe(parts, upload, response)
        upload = await _Receiver(parts.artifacts, owner, sha256).receive(upload, wanted, body)
    except (ServiceError, ArtifactsDownError):
        await body.drain()
        raise
    if body.broken:
        raise ClientDisconnect
    response.status_code = 202 if upload.key is None else 201
    return _describe(parts, upload, response)


@router.get(
    "/uploads/{sha256}",
    responses={200: {"description": "Where it stands", "headers": _HEADERS}, **responses("upload_not_found")},
)
def get_upload(response: Response, parts: PartsDep, owner: OwnerDep, sha256: Digest) -> UploadDocument:
    """Tell how far an upload is."""
    with owner.uploads() as uploads:
        return _describe(parts, uploads.get(sha256), response)


@router.head(
    "/uploads/{sha256}",
    response_class=Response,
    responses={200: {"description": "The headers of GET", "headers": _HEADERS}, **responses("upload_not_found")},
)
def head_upload(parts: PartsDep, owner: OwnerDep, sha256: Digest) -> Response:
    """Tell how far an upload is, in headers alone."""
    response = Response(media_type="application/json")
    get_upload(response, parts, owner, sha256)
    return response


@router.delete("/uploads/{sha256}", status_code=204, responses=responses("upload_not_found", "upload_in_use"))
def delete_upload(parts: PartsDep, owner: OwnerDep, sha256: Digest) -> None:
    """Remove an upload, complete or not, that no job uses."""
    with owner.uploads() as uploads:
        upload = uploads.delete(sha256)
    parts.artifacts.discard(upload_prefix(upload.place))


class _Body:
    """A request's body, read in pieces; it ends where the connection breaks."""

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks
        self._left = b""
        self.broken = False

    async def more(self) -> bool:
        """Whether there is another byte."""
        while not self._left:
            try:
                self._left = await anext(self._chunks)
            except StopAsyncIteration:
                return False
            except ClientDisconnect:
                self.broken = True
                return False
        return True

    async def take(self, count: int) -> AsyncIterator[bytes]:
        """The next ``count`` bytes, or what there is of them."""
        while count > 0 and await self.more():
            chunk, self._left = self._left[:count], self._left[count:]
            count -= len(chunk)
            yield chunk

    async def drain(self) -> None:
        """Read on without looking, so that a client that still sends gets to see the answer."""
        async for _ in self.take(DRAIN_BYTES):
            pass


class _Receiver:
    """Takes in one request's bytes of an upload."""

    def __init__(self, artifacts: Artifacts, owner: Owner, sha256: str) -> None:
        self._artifacts, self._owner, self._sha256 = artifacts, owner, sha256

    async def receive(self, upload: UploadRecord, wanted: _Range, body: _Body) -> UploadRecord:
        """Store what is new of the body; the upload as it is then.

        Raises:
            UploadOffsetError: the bytes between the upload's end and these are missing.
            ContentRangeError: the body is longer than it was said to be.
            DigestMismatchError: it is complete, and something else than was said.
        """
        if wanted.start > upload.offset:
            raise UploadOffsetError(
                f"The piece begins at byte {wanted.start}, but only {upload.offset} bytes are there.", upload.offset
            )
        async for _ in body.take(min(upload.offset, wanted.stop) - wanted.start):
            pass
        stored: Stored | None = None
        while upload.offset < wanted.stop and await body.more():
            key = self._new_key(upload, f"{upload.offset:018d}")
            count = min(PIECE_BYTES, wanted.stop - upload.offset)
            stored = await self._artifacts.put_stream(key, body.take(count))
            upload = await run_in_threadpool(self._advance, upload, stored)
        if not body.broken and await body.more():
            raise ContentRangeError("The body is longer than its Content-Range.", _RANGE_REMEDY)
        if upload.offset < upload.size:
            return upload
        try:
            return await self._finish(upload, stored)
        except FileNotFoundError:  # its pieces are gone: another request has just joined them, or it is deleted
            upload = await run_in_threadpool(self._as_it_is)
            if upload.key is None:
                raise UploadNotFoundError(self._sha256) from None
            return upload

    def _as_it_is(self) -> UploadRecord:
        with self._owner.uploads() as uploads:
            return uploads.get(self._sha256)

    async def _finish(self, upload: UploadRecord, last: Stored | None) -> UploadRecord:
        if last is None or last.size != upload.size:  # more than one piece
            pieces = await run_in_threadpool(self._pieces, upload)

            async def joined() -> AsyncIterator[bytes]:
                for key, size in pieces:
                    async for chunk in await self._artifacts.stream(key, 0, size):
                        yield chunk

            last = await self._artifacts.put_stream(self._new_key(upload, "whole"), joined())
        return await run_in_threadpool(self._complete, upload, last)

    def _new_key(self, upload: UploadRecord, name: str) -> str:
        """No two requests ever write to the same."""
        return f"{upload_prefix(upload.place)}{name}-{secrets.token_hex(4)}"

    def _advance(self, upload: UploadRecord, stored: Stored) -> UploadRecord:
        with self._owner.uploads() as uploads:
            if uploads.advance(upload, stored.size, stored.key):
                return uploads.get(self._sha256)
        self._artifacts.discard_objects([stored.key])
        with self._owner.uploads() as uploads:
            offset = uploads.get(self._sha256).offset
        raise UploadOffsetError(f"Another request has added to {self._sha256} meanwhile.", offset)

    def _pieces(self, upload: UploadRecord) -> list[tuple[str, int]]:
        with self._owner.uploads() as uploads:
            return [(piece.key, piece.size) for piece in uploads.pieces(upload)]

    def _complete(self, upload: UploadRecord, whole: Stored) -> UploadRecord:
        """Check the file and make it the upload's, or delete all of it."""
        if whole.sha256 != self._sha256:
            with self._owner.uploads() as uploads:
                gone = uploads.give_up(upload)
            if gone:  # else another request has completed it
                self._artifacts.discard(upload_prefix(upload.place))
            raise DigestMismatchError(
                f"The {whole.size} bytes have the sha256 {whole.sha256}, not {self._sha256}; they have been deleted.",
                "Compute the digest of the file again, and send it from the first byte.",
            )
        with self._owner.uploads() as uploads:
            pieces = [piece.key for piece in uploads.pieces(upload)]
            done = uploads.complete(upload, whole.key)
            upload = uploads.get(self._sha256)
        self._artifacts.discard_objects([key for key in (pieces if done else [whole.key]) if key != upload.key])
        return upload


def _begin(owner: Owner, sha256: str, size: int) -> UploadRecord:
    with owner.uploads() as uploads:
        upload = uploads.begin(sha256, size)
        if upload.key is None:
            return upload
        return uploads.use(sha256) or uploads.begin(sha256, size)  # sent again, it is kept for as long again


def _read_range(content_range: str | None, content_length: str | None) -> _Range:
    length = int(content_length) if content_length is not None and content_length.isdecimal() else None
    if content_range is None:
        if length is None:
            raise ContentRangeError(
                "Neither Content-Range nor Content-Length says how large the file is.", _RANGE_REMEDY
            )
        found = _Range(0, length, length)
    else:
        match = _RANGE.fullmatch(content_range.strip())
        if match is None:
            raise ContentRangeError(f"The Content-Range {content_range!r} cannot be read.", _RANGE_REMEDY)
        first, last, size = (None if number is None else int(number) for number in match.groups())
        assert size is not None
        found = _Range(0, 0, size) if first is None or last is None else _Range(first, last + 1, size)
        if first is not None and not found.start < found.stop <= found.size:
            raise ContentRangeError(f"There are no such bytes as {content_range!r}.", _RANGE_REMEDY)
        if length not in (None, found.stop - found.start):
            raise ContentRangeError(f"The body has {length} bytes, which {content_range!r} is not.", _RANGE_REMEDY)
    if found.size == 0:
        raise UploadEmptyError("The file has no bytes.", "Send the file's bytes.")
    return found


def _describe(parts: Parts, upload: UploadRecord, response: Response) -> UploadDocument:
    response.headers.update(
        {
            "Upload-Offset": str(upload.offset),
            "Upload-Length": str(upload.size),
            "Upload-Complete": "?0" if upload.key is None else "?1",
            "Cache-Control": "no-store",
        }
    )
    return UploadDocument(
        sha256=upload.sha256,
        size=upload.size,
        offset=upload.offset,
        complete=upload.key is not None,
        expires_at=upload.touched_at + timedelta(seconds=parts.settings.upload_keep_seconds),
    )

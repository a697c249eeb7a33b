"""The artifact store: uploads and results under one prefix per job, each written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.store import from_url

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK_BYTES = 5 * 1024 * 1024
"""Piece of a streamed write; the least that S3 takes."""
READ_BYTES = 1024 * 1024
"""Piece of a streamed read."""


class UnsupportedStoreError(ValueError):
    """The artifact store's URL is of a kind this version does not serve."""


@dataclass(frozen=True)
class Stored:
    """What was written: its key, its size in bytes and the sha256 of its bytes in hex."""

    key: str
    size: int
    sha256: str


class Artifacts:
    """Objects addressed by key (``jobs/<id>/<name>``) in the store behind ``url``."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "file":
            raise UnsupportedStoreError(
                f"The artifact store {url!r} is not a file:// URL. Set AQUANT_ARTIFACTS_URL to a folder, "
                "for example file:///srv/aquant/artifacts."
            )
        self._root = Path(unquote(parts.path))
        self._root.mkdir(parents=True, exist_ok=True)
        self._store = from_url(url, automatic_cleanup=True)

    async def put_stream(self, key: str, chunks: AsyncIterable[bytes]) -> Stored:
        """Write the chunks as one object, hashing on the way; if ``chunks`` raises, no object appears."""
        digest, size = hashlib.sha256(), 0

        async def hashed() -> AsyncIterator[Buffer]:
            nonlocal size
            async for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        await obstore.put_async(self._store, key, hashed(), chunk_size=CHUNK_BYTES, max_concurrency=2)
        return Stored(key, size, digest.hexdigest())

    def put_file(self, key: str, path: Path) -> Stored:
        """Write a local file as one object."""
        digest, size = hashlib.sha256(), 0

        def hashed() -> Iterator[Buffer]:
            nonlocal size
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk

        obstore.put(self._store, key, hashed(), chunk_size=CHUNK_BYTES, max_concurrency=2)
        return Stored(key, size, digest.hexdigest())

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to a local file.

        Raises:
            FileNotFoundError: there is no such object.
        """
        result = obstore.get(self._store, key)
        with path.open("wb") as file:
            for chunk in result.stream(READ_BYTES):
                file.write(chunk)

    def get_bytes(self, key: str) -> bytes:
        """A small object's bytes."""
        return bytes(obstore.get(self._store, key).bytes())

    async def stream(self, key: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes ``start`` to ``stop`` (exclusive) of an object, in pieces."""
        if start == stop:
            return
        result = await obstore.get_async(self._store, key, options={"range": (start, stop)})
        async for chunk in result.stream(READ_BYTES):
            yield bytes(chunk)

    def open(self, key: str) -> BinaryIO:
        """A seekable read-only view of an object; reads fetch only the ranges asked for."""
        size = obstore.head(self._store, key)["size"]
        return cast(BinaryIO, io.BufferedReader(_RangeReader(self._store, key, size), 64 * 1024))

    def keys(self, prefix: str) -> list[str]:
        """The keys of all objects under ``prefix``, in order."""
        return sorted(meta["path"] for batch in obstore.list(self._store, prefix) for meta in batch)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object under ``prefix``, and what interrupted writes left beside them."""
        if not prefix.strip("/"):
            raise ValueError("refusing to delete the whole store: the prefix is empty")
        for key in self.keys(prefix):
            self._delete_key(key)
        shutil.rmtree(self._root / prefix, ignore_errors=True)

    def _delete_key(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # a concurrent delete got there first
            obstore.delete(self._store, key)

    def folders(self, prefix: str) -> Iterator[tuple[str, float]]:
        """Names directly under ``prefix`` with the time (epoch seconds) they were last written to."""
        parent = self._root / prefix
        if not parent.is_dir():
            return
        for folder in parent.iterdir():
            try:
                yield folder.name, folder.stat().st_mtime
            except FileNotFoundError:
                continue


class _RangeReader(io.RawIOBase):
    """File protocol over ranged reads, so that zip directories can be read without fetching the archive."""

    def __init__(self, store: Any, key: str, size: int) -> None:
        self._store, self._key, self._size, self._position = store, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if origin + offset < 0:
            raise ValueError(f"negative seek position {origin + offset}")
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        data = obstore.get_range(self._store, self._key, start=self._position, length=length)
        buffer[:length] = memoryview(data)
        self._position += length
        return length


def job_prefix(job_id: str) -> str:
    """Where everything of one job is kept."""
    return f"jobs/{job_id}/"


def blocks_prefix(job_id: str) -> str:
    """Where a job's finished blocks are kept for its next attempt; to be deleted when the job has ended."""
    return f"{job_prefix(job_id)}blocks/"

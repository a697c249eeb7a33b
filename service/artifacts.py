"""The artifact store: files under one prefix for each job and each resumable upload, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, S3Store

from service.s3 import BucketNotMadeError, UnsupportedStoreError, create_bucket, error_code, open_bucket

if TYPE_CHECKING:
    from typing_extensions import Buffer

log = logging.getLogger(__name__)

CHUNK_BYTES = 5 * 1024 * 1024
"""Piece of a streamed write; the least that S3 takes."""
READ_BYTES = 4 * 1024 * 1024
"""Piece of a streamed read: a request of its own, so that no reader is too slow for a request's time limit."""

UPLOADS = "uploads/"
"""Where resumable uploads are kept; each is of one owner, and may be of several jobs."""


class ArtifactsDownError(Exception):
    """The artifact store cannot be reached, or refuses what is asked of it."""


@dataclass(frozen=True)
class Stored:
    """What was written: its key, its size in bytes and the sha256 of its bytes in hex."""

    key: str
    size: int
    sha256: str


def open_artifacts(url: str) -> Artifacts:
    """The store behind ``file:///folder`` or ``s3://bucket/prefix``; only the first is touched here.

    Raises:
        UnsupportedStoreError: the URL is neither, or names no folder or bucket.
        ArtifactsDownError: the folder cannot be made.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path.strip("/"):
        return ArtifactFolder(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return ArtifactBucket(url)
    raise UnsupportedStoreError(
        f"The artifact store {url!r} is neither a folder nor a bucket. Set AQUANT_ARTIFACTS_URL to one, "
        "for example file:///srv/aquant/artifacts or s3://bucket/aquant."
    )


class Artifacts(ABC):
    """Objects addressed by key (``jobs/<id>/<name>``).

    Every method raises ArtifactsDownError where the store does not answer, and every one that reads an object
    FileNotFoundError where there is none.
    """

    remedy: str
    """What an operator can do where the store does not answer."""

    def __init__(self, store: LocalStore | S3Store, url: str) -> None:
        self._store, self._url = store, url

    async def put_stream(self, key: str, chunks: AsyncIterable[bytes]) -> Stored:
        """Write the chunks as one object, hashing on the way; if ``chunks`` raises, no object appears."""
        digest, size = hashlib.sha256(), 0

        async def hashed() -> AsyncIterator[Buffer]:
            nonlocal size
            async for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        with self._answering():
            await obstore.put_async(self._store, key, hashed(), chunk_size=CHUNK_BYTES, max_concurrency=2)
        return Stored(key, size, digest.hexdigest())

    def put_file(self, key: str, path: Path) -> Stored:
        """Write a local file as one object."""
        digest, size = hashlib.sha256(), 0

        def hashed() -> Iterator[Buffer]:
            nonlocal size
            with path.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    yield chunk

        with self._answering():
            obstore.put(self._store, key, hashed(), chunk_size=CHUNK_BYTES, max_concurrency=2)
        return Stored(key, size, digest.hexdigest())

    def get_file(self, key: str, path: Path) -> None:
        """Copy an object to a local file."""
        size = self.size(key)
        with path.open("wb") as file:
            for start in range(0, size, READ_BYTES):
                file.write(self.get_range(key, start, min(size, start + READ_BYTES)))

    def copy(self, key: str, to: str) -> None:
        """Copy an object to another key, within the store."""
        with self._answering():
            obstore.copy(self._store, key, to)

    def get_bytes(self, key: str) -> bytes:
        """A small object's bytes."""
        with self._answering():
            return bytes(obstore.get(self._store, key).bytes())

    def get_range(self, key: str, start: int, stop: int) -> Buffer:
        """Bytes ``start`` to ``stop`` (exclusive, and after ``start``) of an object."""
        with self._answering():
            return obstore.get_range(self._store, key, start=start, end=stop)

    def size(self, key: str) -> int:
        """An object's size in bytes."""
        with self._answering():
            return obstore.head(self._store, key)["size"]

    async def stream(self, key: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes ``start`` to ``stop`` (exclusive) of an object, in pieces.

        The first has been read when this returns, so that a store that does not answer is known before anything
        is sent on.
        """

        async def read(at: int) -> bytes:
            with self._answering():
                end = min(stop, at + READ_BYTES)
                return bytes(await obstore.get_range_async(self._store, key, start=at, end=end))

        first = await read(start) if start < stop else b""

        async def pieces() -> AsyncIterator[bytes]:
            yield first
            for at in range(start + READ_BYTES, stop, READ_BYTES):
                yield await read(at)

        return pieces()

    def open(self, key: str) -> BinaryIO:
        """A seekable read-only view of an object; reads fetch only the ranges asked for."""
        return cast(BinaryIO, io.BufferedReader(_RangeReader(self, key), 64 * 1024))

    def keys(self, prefix: str) -> list[str]:
        """The keys of all objects under ``prefix``, in order."""
        with self._answering():
            return sorted(meta["path"] for batch in obstore.list(self._store, prefix) for meta in batch)

    def delete_prefix(self, prefix: str) -> None:
        """Remove every object under ``prefix``, and what interrupted writes left beside them, as far as is known."""
        if not prefix.strip("/"):
            raise ValueError("refusing to delete the whole store: the prefix is empty")
        self._delete_prefix(prefix)

    def discard(self, prefix: str) -> None:
        """As :meth:`delete_prefix`, but only a warning where the store does not answer: the reaper sweeps what stays
        of a job that is gone."""
        try:
            self.delete_prefix(prefix)
        except ArtifactsDownError as error:
            log.warning("%s stays in the store: %s", prefix, error)

    def discard_objects(self, keys: Sequence[str]) -> None:
        """Remove single objects; only a warning where the store does not answer."""
        try:
            with self._answering():
                self._delete_objects(keys)
        except ArtifactsDownError as error:
            log.warning("%d objects stay in the store: %s", len(keys), error)

    def try_out(self, prefix: str) -> None:
        """Write a small object under ``prefix``, read it and remove it: a server that has just started may list what
        it has before it does any of that."""
        key = f"{prefix}trial"
        with self._answering():
            obstore.put(self._store, key, b"trial")
            obstore.get(self._store, key).bytes()
            obstore.delete(self._store, key)

    @abstractmethod
    def check(self) -> None:
        """Raise ArtifactsDownError if the store cannot be used, as far as that is seen by listing what is in it."""

    @abstractmethod
    def create(self) -> None:
        """Make what holds the artifacts, unless it is there already; raises as :meth:`check` does."""

    @abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Names directly under ``prefix``; some S3 servers go on naming those that have become empty."""

    @abstractmethod
    def written_at(self, prefix: str) -> float | None:
        """When anything under ``prefix`` was last written to, in epoch seconds; None if nothing is there."""

    @abstractmethod
    def _delete_prefix(self, prefix: str) -> None: ...

    @abstractmethod
    def _delete_objects(self, keys: Sequence[str]) -> None: ...

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except BaseError as error:
            raise self._down(_reason(error)) from error

    def _down(self, reason: str) -> ArtifactsDownError:
        return ArtifactsDownError(f"The artifact store {self._url} cannot be used: {reason}. {self.remedy}")


class ArtifactFolder(Artifacts):
    """Artifacts in a local folder; what is being written lies beside its place, as ``<name>#<number>``."""

    remedy = "Check that AQUANT_ARTIFACTS_URL (or AQUANT_DATA_DIR) names a folder that can be written, with space left."

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self._url = root.as_uri()
            raise self._down(str(error)) from error
        super().__init__(LocalStore(root, automatic_cleanup=True), root.as_uri())

    def check(self) -> None:
        if not os.access(self._root, os.R_OK | os.W_OK | os.X_OK):
            raise self._down("it is not there, or this process may not write to it")

    def create(self) -> None:
        self.check()

    def folders(self, prefix: str) -> list[str]:
        parent = self._root / prefix
        return sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []

    def written_at(self, prefix: str) -> float | None:
        folder = self._root / prefix
        times = []
        for path in (folder, *folder.rglob("*")):
            with contextlib.suppress(FileNotFoundError):  # its writer is done with it
                times.append(path.stat().st_mtime)
        return max(times, default=None)

    def _delete_prefix(self, prefix: str) -> None:
        with self._answering():
            self._delete_objects(self.keys(prefix))
        shutil.rmtree(self._root / prefix, ignore_errors=True)

    def _delete_objects(self, keys: Sequence[str]) -> None:
        for key in keys:
            with contextlib.suppress(FileNotFoundError):  # a concurrent delete got there first
                obstore.delete(self._store, key)


class ArtifactBucket(Artifacts):
    """Artifacts under a prefix of an S3 bucket; credentials, region and endpoint come from AWS_* variables, of which
    AWS_SHARED_CREDENTIALS_FILE names a file with the keys.

    A write that raises is taken back; the pieces of one whose process died stay with the server, invisible,
    until a lifecycle rule removes them.
    """

    remedy = (
        "Check AQUANT_ARTIFACTS_URL, that its bucket exists, and AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION "
        "and, for a server other than Amazon's, AWS_ENDPOINT_URL."
    )

    def __init__(self, url: str) -> None:
        super().__init__(open_bucket(url), url)

    def check(self) -> None:
        self.folders("")

    def create(self) -> None:
        try:
            self.check()
        except ArtifactsDownError as error:
            if "NoSuchBucket" not in str(error):
                raise
            try:
                create_bucket(self._url)
            except BucketNotMadeError as refusal:
                raise self._down(f"its bucket is not there and cannot be made: {refusal}") from refusal

    def folders(self, prefix: str) -> list[str]:
        with self._answering():
            found = obstore.list_with_delimiter(self._store, prefix)
        return sorted(path.rpartition("/")[2] for path in found["common_prefixes"])

    def written_at(self, prefix: str) -> float | None:
        with self._answering():
            times = [meta["last_modified"] for batch in obstore.list(self._store, prefix) for meta in batch]
        return max(times).timestamp() if times else None

    def _delete_prefix(self, prefix: str) -> None:
        keys = self.keys(prefix)
        with self._answering():
            self._delete_objects(keys)

    def _delete_objects(self, keys: Sequence[str]) -> None:
        obstore.delete(self._store, keys)


class _RangeReader(io.RawIOBase):
    """File protocol over ranged reads, so that zip directories can be read without fetching the archive."""

    def __init__(self, artifacts: Artifacts, key: str) -> None:
        self._artifacts, self._key, self._size, self._position = artifacts, key, artifacts.size(key), 0

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
        data = self._artifacts.get_range(self._key, self._position, self._position + length)
        buffer[:length] = memoryview(data)
        self._position += length
        return length


def _reason(error: BaseError) -> str:
    """What went wrong, without the traces that the store's library appends and the XML that the server sends."""
    text = str(error).partition("\n\nDebug source")[0]
    return (text.partition("<?xml")[0] + error_code(text)).strip().rstrip(":.")


def job_prefix(job_id: str) -> str:
    """Where everything of one job is kept."""
    return f"jobs/{job_id}/"


def blocks_prefix(job_id: str) -> str:
    """Where a job's finished blocks are kept for its next attempt; to be deleted when the job has ended."""
    return f"{job_prefix(job_id)}blocks/"


def upload_prefix(place: str) -> str:
    """Where everything of one resumable upload is kept."""
    return f"{UPLOADS}{place}/"

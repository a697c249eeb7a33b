"""Objects of the artifact store appear whole or not at all."""

from __future__ import annotations

import asyncio
import hashlib
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.artifacts import Artifacts, UnsupportedStoreError, job_prefix
from service.settings import Settings

PIECE = bytes(range(256)) * 4096  # 1 MiB


async def pieces(count: int, broken: bool = False) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield PIECE
    if broken:
        raise ConnectionError("the sender is gone")


async def collect(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


def files(settings: Settings) -> list[str]:
    return [path.name for path in (settings.data_dir / "artifacts").rglob("*")]


def test_stream_is_stored_with_its_size_and_digest(artifacts: Artifacts, tmp_path: Path) -> None:
    stored = asyncio.run(artifacts.put_stream("jobs/a/model", pieces(12)))
    assert (stored.size, stored.sha256) == (12 * 2**20, hashlib.sha256(PIECE * 12).hexdigest())
    artifacts.get_file("jobs/a/model", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == PIECE * 12
    assert artifacts.put_file("jobs/a/again", tmp_path / "copy").sha256 == stored.sha256


@pytest.mark.parametrize("count", [1, 30])
def test_broken_stream_leaves_nothing(artifacts: Artifacts, settings: Settings, count: int) -> None:
    with pytest.raises(ConnectionError):
        asyncio.run(artifacts.put_stream("jobs/a/model", pieces(count, broken=True)))
    artifacts.delete_prefix(job_prefix("a"))
    assert files(settings) == ["jobs"]


def test_delete_takes_what_a_killed_process_left(artifacts: Artifacts, settings: Settings) -> None:
    asyncio.run(artifacts.put_stream("jobs/a/attempt-1/report.json", pieces(1)))
    asyncio.run(artifacts.put_stream("jobs/ab/model", pieces(1)))
    (settings.data_dir / "artifacts/jobs/a/model#1").write_bytes(b"half")
    artifacts.delete_prefix(job_prefix("a"))
    assert sorted(files(settings)) == ["ab", "jobs", "model"]
    with pytest.raises(ValueError, match="whole store"):
        artifacts.delete_prefix("/")


def test_ranges(artifacts: Artifacts) -> None:
    asyncio.run(artifacts.put_stream("jobs/a/model", pieces(3)))
    whole = PIECE * 3
    for start, stop in [(0, len(whole)), (5, 6), (2**20 - 1, 2**21 + 1), (7, 7)]:
        assert asyncio.run(collect(artifacts.stream("jobs/a/model", start, stop))) == whole[start:stop]


def test_open_reads_a_zip_in_place(artifacts: Artifacts, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("name", b"content")
    artifacts.put_file("jobs/a/z", tmp_path / "z")
    with artifacts.open("jobs/a/z") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("name") == b"content"


def test_other_stores_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedStoreError, match="s3://bucket"):
        Artifacts("s3://bucket/x")

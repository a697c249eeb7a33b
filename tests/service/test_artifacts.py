"""Objects of the artifact store appear whole or not at all, in a folder as in a bucket."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from servers import S3, STORES

from service.artifacts import Artifacts, ArtifactsDownError, job_prefix, open_artifacts
from service.s3 import UnsupportedStoreError, create_bucket
from service.settings import Settings

in_every_store = pytest.mark.parametrize("storage", STORES, indirect=True)
in_a_folder = pytest.mark.parametrize("storage", STORES[:1], indirect=True)
in_a_bucket = pytest.mark.parametrize("storage", STORES[1:], indirect=True)

PIECE = bytes(range(256)) * 4096  # 1 MiB


async def pieces(count: int, broken: bool = False) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield PIECE
    if broken:
        raise ConnectionError("the sender is gone")


def put(artifacts: Artifacts, key: str, count: int = 1) -> None:
    asyncio.run(artifacts.put_stream(key, pieces(count)))


def files(settings: Settings) -> list[str]:
    return [path.name for path in (settings.data_dir / "artifacts").rglob("*")]


@in_every_store
def test_stream_is_stored_with_its_size_and_digest(artifacts: Artifacts, tmp_path: Path) -> None:
    stored = asyncio.run(artifacts.put_stream("jobs/a/model", pieces(12)))
    assert (stored.size, stored.sha256) == (12 * 2**20, hashlib.sha256(PIECE * 12).hexdigest())
    artifacts.get_file("jobs/a/model", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == PIECE * 12
    assert artifacts.put_file("jobs/a/again", tmp_path / "copy").sha256 == stored.sha256
    assert artifacts.get_bytes("jobs/a/again") == PIECE * 12


@in_every_store
def test_a_copy_outlives_what_it_is_of(artifacts: Artifacts) -> None:
    put(artifacts, "jobs/a/model", 2)
    artifacts.copy("jobs/a/model", "jobs/b/model")
    artifacts.delete_prefix("jobs/a/")
    assert artifacts.keys("jobs") == ["jobs/b/model"]
    assert artifacts.get_bytes("jobs/b/model") == PIECE * 2
    put(artifacts, "jobs/b/model")
    assert artifacts.size("jobs/b/model") == len(PIECE)


@in_every_store
def test_an_object_may_be_empty(artifacts: Artifacts, tmp_path: Path) -> None:
    put(artifacts, "jobs/a/model", 0)
    artifacts.get_file("jobs/a/model", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == artifacts.get_bytes("jobs/a/model") == b""
    with artifacts.open("jobs/a/model") as file:
        assert file.read(16) == b""


@in_every_store
@pytest.mark.parametrize("count", [1, 30])
def test_broken_stream_leaves_no_object(artifacts: Artifacts, count: int) -> None:
    with pytest.raises(ConnectionError):
        asyncio.run(artifacts.put_stream("jobs/a/model", pieces(count, broken=True)))
    assert artifacts.keys("") == []


@in_a_folder
def test_broken_stream_leaves_no_file(artifacts: Artifacts, settings: Settings) -> None:
    with pytest.raises(ConnectionError):
        asyncio.run(artifacts.put_stream("jobs/a/model", pieces(30, broken=True)))
    artifacts.delete_prefix(job_prefix("a"))
    assert files(settings) == ["jobs"]


@in_a_bucket
def test_broken_stream_leaves_no_parts(artifacts: Artifacts, s3: S3) -> None:
    async def watched() -> AsyncIterator[bytes]:
        async for piece in pieces(30):
            yield piece
        seen.append(s3.unfinished_uploads())
        raise ConnectionError("the sender is gone")

    seen: list[list[str]] = []
    before = s3.unfinished_uploads()
    with pytest.raises(ConnectionError):
        asyncio.run(artifacts.put_stream("jobs/a/model", watched()))
    (begun,) = set(seen[0]) - set(before)  # others are of writers that were killed, and go when the server likes
    assert begun not in s3.unfinished_uploads()


@in_a_folder
def test_delete_takes_what_a_killed_process_left(artifacts: Artifacts, settings: Settings) -> None:
    put(artifacts, "jobs/a/attempt-1/report.json")
    (settings.data_dir / "artifacts/jobs/a/model#1").write_bytes(b"half")
    artifacts.delete_prefix(job_prefix("a"))
    assert files(settings) == ["jobs"]


@in_every_store
def test_delete_takes_one_prefix_and_never_all(artifacts: Artifacts) -> None:
    for key in ("jobs/a/model", "jobs/a/attempt-1/report.json", "jobs/ab/model"):
        put(artifacts, key)
    artifacts.delete_prefix(job_prefix("a"))
    assert artifacts.keys("") == ["jobs/ab/model"]
    artifacts.delete_prefix(job_prefix("a"))  # nothing is there any more
    for prefix in ("", "/"):
        with pytest.raises(ValueError, match="whole store"):
            artifacts.delete_prefix(prefix)
    assert artifacts.keys("") == ["jobs/ab/model"]


@in_every_store
def test_folders_and_when_they_were_written_to(artifacts: Artifacts) -> None:
    before = time.time() - 2  # S3 keeps whole seconds
    for key in ("jobs/b/model", "jobs/a/attempt-1/report.json", "other/c/model"):
        put(artifacts, key)
    assert artifacts.folders("jobs") == ["a", "b"]
    assert artifacts.folders("none") == []
    for name in "ab":
        at = artifacts.written_at(job_prefix(name))
        assert at is not None
        assert before < at < time.time() + 2
    assert artifacts.written_at(job_prefix("c")) is None


@in_a_folder
def test_an_upload_under_way_is_a_sign_of_life(artifacts: Artifacts, settings: Settings) -> None:
    folder = settings.data_dir / "artifacts/jobs/a"
    folder.mkdir(parents=True)
    (folder / "model#1").write_bytes(b"half")
    os.utime(folder, (1000, 1000))
    at = artifacts.written_at(job_prefix("a"))
    assert at is not None
    assert at > time.time() - 60


@in_every_store
def test_ranges(artifacts: Artifacts) -> None:
    async def collect(start: int, stop: int) -> bytes:
        return b"".join([piece async for piece in await artifacts.stream("jobs/a/model", start, stop)])

    put(artifacts, "jobs/a/model", 9)  # more than two pieces of a read
    whole = PIECE * 9
    for start, stop in [(0, len(whole)), (5, 6), (2**20 - 1, 2**23 + 1), (7, 7), (2**22, 2**23), (3, 2**22 + 3)]:
        assert asyncio.run(collect(start, stop)) == whole[start:stop]


@in_every_store
def test_open_reads_a_zip_in_place(artifacts: Artifacts, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("name", b"content")
    artifacts.put_file("jobs/a/z", tmp_path / "z")
    with artifacts.open("jobs/a/z") as file, zipfile.ZipFile(file) as archive:
        assert archive.read("name") == b"content"


@in_every_store
def test_what_is_not_there_is_a_missing_file(artifacts: Artifacts, tmp_path: Path) -> None:
    for read in (
        lambda: artifacts.get_file("jobs/a/model", tmp_path / "copy"),
        lambda: artifacts.get_bytes("jobs/a/model"),
        lambda: artifacts.copy("jobs/a/model", "jobs/b/model"),
        lambda: artifacts.open("jobs/a/model"),
        lambda: asyncio.run(artifacts.stream("jobs/a/model", 0, 10)),
    ):
        with pytest.raises(FileNotFoundError):
            read()
    assert list(tmp_path.glob("copy")) == []


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "s3:///x", "file:///", "file://host/x", "/srv/x"])
def test_other_stores_are_refused_by_name(url: str) -> None:
    with pytest.raises(UnsupportedStoreError, match=f"{url!r} is neither a folder nor a bucket"):
        open_artifacts(url)


def test_endpoint_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(UnsupportedStoreError, match="AWS_ENDPOINT_URL is 'localhost:9000'"):
        open_artifacts("s3://bucket/x")


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ArtifactsDownError, match=r"Not a directory.*AQUANT_ARTIFACTS_URL"):
        open_artifacts((tmp_path / "file/artifacts").as_uri())


@in_every_store
def test_a_sound_store_passes_the_check(artifacts: Artifacts) -> None:
    artifacts.check()


@in_every_store
def test_a_store_that_is_there_is_left_as_it_is(artifacts: Artifacts) -> None:
    put(artifacts, "jobs/a/model")
    artifacts.create()
    assert artifacts.keys("jobs") == ["jobs/a/model"]


@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1"])
def test_a_bucket_is_made_once(s3: S3, monkeypatch: pytest.MonkeyPatch, region: str) -> None:
    for name, value in (s3.environment() | {"AWS_REGION": region}).items():
        monkeypatch.setenv(name, value)
    url = f"s3://made-in-{region}/x"
    artifacts = open_artifacts(url)
    with pytest.raises(ArtifactsDownError, match="NoSuchBucket"):
        artifacts.check()
    artifacts.create()
    put(artifacts, "jobs/a/model")
    artifacts.create()
    create_bucket(url)  # as the second of two that found none does
    assert artifacts.keys("jobs") == ["jobs/a/model"]


def test_a_bucket_that_cannot_be_made_says_why(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ArtifactsDownError, match=r"s3://Under_Score/x cannot be used: .*InvalidBucketName"):
        open_artifacts("s3://Under_Score/x").create()


def test_keys_are_read_from_amazons_file(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = s3.environment()
    lines = [f"{name.lower()} = {keys.pop(name)}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
    file = tmp_path / "credentials"
    file.write_text("\n".join(["[default]", "aws_access_key_id = other", "", "[of the tests]", *lines]))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    changes = {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "of the tests"}
    for name, value in (keys | changes).items():
        monkeypatch.setenv(name, value)
    open_artifacts(s3.url()).check()
    monkeypatch.delenv("AWS_PROFILE")
    with pytest.raises(UnsupportedStoreError, match=r"credentials lacks them\. It needs a section \[default\]"):
        open_artifacts(s3.url())
    file.unlink()
    with pytest.raises(UnsupportedStoreError, match=r"AWS_SHARED_CREDENTIALS_FILE.*No such file"):
        open_artifacts(s3.url())


@in_every_store
def test_a_store_is_tried_out_without_a_trace(artifacts: Artifacts) -> None:
    artifacts.try_out("jobs/a/")
    assert artifacts.keys("jobs") == []


@in_a_folder
def test_folder_that_has_gone_fails_the_check(artifacts: Artifacts, settings: Settings) -> None:
    (settings.data_dir / "artifacts").rmdir()
    with pytest.raises(ArtifactsDownError, match="not there"):
        artifacts.check()


@pytest.mark.parametrize(
    ("url", "changes", "reason"),
    [
        ("s3://no-such-bucket/x", {}, "NoSuchBucket"),
        (f"s3://{S3.bucket}/x", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        (f"s3://{S3.bucket}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "error sending request"),
    ],
)
def test_bucket_that_cannot_be_used_says_why(
    s3: S3, monkeypatch: pytest.MonkeyPatch, url: str, changes: dict[str, str], reason: str
) -> None:
    for name, value in (s3.environment() | changes).items():
        monkeypatch.setenv(name, value)
    artifacts = open_artifacts(url)
    for use in (artifacts.check, lambda: artifacts.keys("jobs"), lambda: artifacts.delete_prefix("jobs/a/")):
        with pytest.raises(ArtifactsDownError, match=f"{url} cannot be used: .*{reason}.*Check AQUANT_ARTIFACTS_URL"):
            use()

"""Finished blocks reach the next attempt, each stored once."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers import STORES

from service.artifacts import Artifacts, job_prefix
from worker.blocks import BlockStore

pytestmark = pytest.mark.parametrize("storage", STORES, indirect=True)


def test_the_next_attempt_finds_what_was_finished(tmp_path: Path, artifacts: Artifacts) -> None:
    first = BlockStore("job", tmp_path / "first", artifacts)
    first.fetch()
    first.store()
    (first.folder / "block-0000.safetensors").write_bytes(b"zero")
    (first.folder / "block-0001.partial").write_bytes(b"half")
    first.store()
    (first.folder / "block-0001.safetensors").write_bytes(b"one")
    (first.folder / "block-qdrop-0000.safetensors").write_bytes(b"another method's")
    first.store()

    second = BlockStore("job", tmp_path / "second", artifacts)
    second.fetch()
    found = {path.name: path.read_bytes() for path in second.folder.iterdir()}
    assert found == {
        "block-0000.safetensors": b"zero",
        "block-0001.safetensors": b"one",
        "block-qdrop-0000.safetensors": b"another method's",
    }
    other = BlockStore("other", tmp_path / "other", artifacts)
    other.fetch()
    assert list(other.folder.iterdir()) == []


def test_each_file_is_stored_once(tmp_path: Path, artifacts: Artifacts) -> None:
    blocks = BlockStore("job", tmp_path / "blocks", artifacts)
    path = blocks.folder / "block-0000.safetensors"
    path.write_bytes(b"zero")
    blocks.store()
    path.write_bytes(b"changed")
    blocks.store()
    (key,) = artifacts.keys(job_prefix("job"))
    assert artifacts.get_bytes(key) == b"zero"

"""Readers refuse hostile files by themselves, without the sandbox around them, and run nothing that is in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile import Hostile, corpus

from aquant_core.capture_model import capture
from aquant_core.config import Preprocess, QuantizationConfig
from aquant_core.errors import AQuantError
from aquant_core.images import check_images, read_images

NEEDS_LIMITS = ("upload_too_large_for_memory",)
FILES = [
    one for one in corpus() if one.slot != "config" and (one.inside or one.payload) and one.code not in NEEDS_LIMITS
]


def read(one: Hostile, path: Path) -> None:
    """As the worker's intake does, but here."""
    config = QuantizationConfig(weight_bits=2, activation_bits=2, **one.config)
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    if one.slot == "model":
        capture(path, config.architecture, images[:2])
        return
    preprocess = Preprocess(**one.config["preprocess"]) if one.config else None
    found = read_images(path, one.slot, preprocess)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    check_images(capture(network, example=images[:2]), found, config, found)


@pytest.mark.parametrize("one", FILES, ids=lambda one: f"{one.slot}: {one.name}")
def test_refused_by_the_reader(one: Hostile, tmp_path: Path) -> None:
    path, marker = tmp_path / "upload", tmp_path / "marker"
    path.write_bytes(one.data(marker))
    with pytest.raises(AQuantError) as caught:
        read(one, path)
    if one.inside:  # else the service refuses it before, perhaps for another reason
        assert caught.value.code == one.code
    assert not marker.exists()


def test_the_payload_would_run(tmp_path: Path) -> None:
    """Or the other tests would show nothing."""
    import pickle

    from hostile_files import pickled

    with pytest.raises(SystemExit, match="the payload ran"):
        pickle.loads(pickled(tmp_path / "marker"))
    assert (tmp_path / "marker").exists()


def test_the_corpus_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = ([one.data(tmp_path) for one in corpus()] for _ in range(2))
    assert first == second

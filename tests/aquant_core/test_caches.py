"""Caches: the same bytes wherever they are kept, and what the ones on disk take of memory, disk and folder."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquant_core.caches import Cache, Placement
from aquant_core.resources import resident_bytes, return_free_memory

CPU = torch.device("cpu")
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
MIB = 1 << 20


def make_cache(shape: tuple[int, ...], placement: Placement, folder: Path | None = None) -> Cache:
    return Cache(torch.Size(shape), CPU, placement, folder)


@st.composite
def fillings(draw: st.DrawFn) -> tuple[Tensor, list[tuple[int, int]], list[int], tuple[int, int]]:
    """Values, the ranges in the order in which they are written, images to gather, and a range to read."""
    images = draw(st.integers(1, 9))
    shape = (images, *draw(st.lists(st.integers(1, 4), max_size=3)))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    cuts = sorted(draw(st.sets(st.integers(1, images - 1)))) if images > 1 else []
    ranges = draw(st.permutations(list(zip([0, *cuts], [*cuts, images], strict=True))))
    chosen = draw(st.lists(st.integers(0, images - 1), min_size=1, max_size=12))  # in any order, some twice
    start = draw(st.integers(0, images - 1))
    return values, ranges, chosen, (start, draw(st.integers(start + 1, images)))


@pytest.mark.parametrize("placement", PLACEMENTS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(filling=fillings())
def test_what_is_written_is_read_and_gathered(
    placement: Placement, filling: tuple[Tensor, list[tuple[int, int]], list[int], tuple[int, int]]
) -> None:
    values, ranges, chosen, (start, stop) = filling
    cache = make_cache(tuple(values.shape), placement)
    for first, last in ranges:
        cache.write(first, values[first:last])
    assert (len(cache), cache.shape, cache.image_shape) == (len(values), values.shape, values.shape[1:])
    assert cache.placement == placement
    assert torch.equal(cache.read(start, stop), values[start:stop])
    out = torch.empty(len(chosen), *values.shape[1:])
    cache.gather(torch.tensor(chosen), out)
    assert torch.equal(out, values[chosen])
    assert torch.equal(cache.read(0, len(cache)), values)  # reading and gathering have left it as it was


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_second_write_replaces_the_first(placement: Placement) -> None:
    cache = make_cache((4, 2), placement)
    cache.write(0, torch.zeros(4, 2))
    cache.write(1, torch.ones(2, 2))
    assert cache.read(0, 4)[:, 0].tolist() == [0, 1, 1, 0]


def mapped_files(folder: Path) -> list[str]:
    """The files of a folder that this process has mapped, with or without a name."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{folder}/" in line]


def open_files(folder: Path) -> list[Path]:
    """The files of a folder that this process holds open, as links that can be followed without a name."""
    return [link for link in Path("/proc/self/fd").iterdir() if _target(link).startswith(f"{folder}/")]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # the one by which the folder itself was listed
        return ""


def test_on_disk_means_in_the_folder_and_without_a_name(tmp_path: Path) -> None:
    cache = make_cache((8, 1000), "disk", tmp_path)
    cache.write(0, torch.ones(8, 1000))
    assert mapped_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
    del cache
    gc.collect()
    assert not mapped_files(tmp_path)
    assert not open_files(tmp_path)


@pytest.mark.parametrize("placement", ["device", "memory"])
def test_in_memory_means_not_in_the_folder(placement: Placement, tmp_path: Path) -> None:
    cache = make_cache((8, 1000), placement, tmp_path)
    cache.write(0, torch.ones(8, 1000))
    assert not mapped_files(tmp_path)


def test_the_disk_space_is_taken_at_once(tmp_path: Path) -> None:
    """Else a disk that fills up later would end the process by a signal (SIGBUS) in the middle of a write."""
    cache = make_cache((16, MIB // 4), "disk", tmp_path)
    (file,) = open_files(tmp_path)
    assert file.stat().st_size == 16 * MIB
    assert 512 * file.stat().st_blocks >= 16 * MIB
    assert len(cache) == 16


def test_a_full_disk_is_an_error_at_creation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        make_cache((8, 1000), "disk", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not open_files(tmp_path)
    assert not mapped_files(tmp_path)


def test_a_folder_that_is_not_there_is_an_error_at_creation(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make_cache((8, 1000), "disk", tmp_path / "missing")


def held() -> int:
    """Memory in use, without what the allocator keeps for later."""
    return_free_memory()
    return resident_bytes()


@pytest.mark.parametrize(("placement", "stays"), [("memory", True), ("disk", False)])
def test_pages_on_disk_are_not_this_processs_memory(placement: Placement, stays: bool, tmp_path: Path) -> None:
    part = torch.ones(4, MIB)  # 16 MiB
    gathered, chosen = torch.zeros(4, MIB), torch.tensor([15, 0, 7, 3])
    before = held()
    cache = make_cache((16, MIB), placement, tmp_path)
    grown = []
    for start in range(0, 16, 4):
        cache.write(start, part)
    grown.append(held() - before)
    for start in range(0, 16, 4):
        assert float(cache.read(start, start + 4).sum()) == 4 * MIB
    grown.append(held() - before)
    cache.gather(chosen, gathered)
    grown.append(held() - before)
    assert torch.equal(gathered, part)
    if stays:
        assert min(grown) > 48 * MIB  # the measure sees what there is
    else:
        assert max(grown) < 32 * MIB


def test_what_was_read_from_disk_outlives_the_cache(tmp_path: Path) -> None:
    cache = make_cache((3, 5), "disk", tmp_path)
    cache.write(0, torch.arange(15.0).view(3, 5))
    values = cache.read(1, 3)
    cache.write(0, torch.zeros(3, 5))
    del cache
    assert torch.equal(values, torch.arange(5.0, 15.0).view(2, 5))


def test_images_that_are_there_stay_where_they_are() -> None:
    images = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    cache = Cache.of(images, CPU)
    assert (len(cache), cache.shape, cache.image_shape) == (6, images.shape, images.shape[1:])
    assert cache.read(2, 6).data_ptr() == images[2:].data_ptr()
    out = torch.empty(2, 3, 4, 4)
    cache.gather(torch.tensor([5, 1]), out)
    assert torch.equal(out, images[[5, 1]])

"""Where a block's inputs and targets are kept between iterations: on the device, in memory, or in mapped files."""

from __future__ import annotations

import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Placement = Literal["device", "memory", "disk"]


class Cache:
    """One float32 value an image, (N, ...); read and written by ranges of images or by their numbers.

    Attributes:
        shape: of all images, N first.
        placement: where it lies.
        device: where its values are wanted.
    """

    def __init__(self, shape: torch.Size, device: torch.device, placement: Placement, folder: Path | None) -> None:
        self.shape, self.placement, self.device = shape, placement, device
        self._map: mmap.mmap | None = None
        if placement == "disk":
            self._map = _map_new_file(4 * shape.numel(), folder)
            self._values = torch.from_numpy(np.frombuffer(self._map, np.float32)).view(shape)
        elif placement == "memory":
            self._values = torch.empty(shape, pin_memory=device.type == "cuda")
        else:
            self._values = torch.empty(shape, device=device)

    @classmethod
    def of(cls, images: Tensor, device: torch.device) -> Cache:
        """Images that are there already; on another device they stay where they are."""
        cache = cls(torch.Size([0, *images.shape[1:]]), device, "memory", None)
        cache.shape, cache._values = images.shape, images
        return cache

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def image_shape(self) -> torch.Size:
        """Of one image's value, without N."""
        return self.shape[1:]

    @property
    def lies_on(self) -> torch.device:
        """The device whose memory holds it; the CPU for files."""
        return self._values.device

    def write(self, start: int, values: Tensor) -> None:
        """Puts the values of neighbouring images, from image ``start`` on."""
        self._values[start : start + len(values)] = values
        self._drop_pages()

    def read(self, start: int, stop: int) -> Tensor:
        """The values of neighbouring images, on the device; not to be written to."""
        return self._moved(self._values[start:stop])

    def gather(self, chosen: Tensor, out: Tensor) -> None:
        """Copies the values of the ``chosen`` images into ``out``, on the device.

        Args:
            chosen: (B,) int64 image numbers, on the device that the cache ``lies_on``.
            out: (B, ...).
        """
        if self._values.device == out.device:
            torch.index_select(self._values, 0, chosen, out=out)
        else:
            out.copy_(self._values.index_select(0, chosen).pin_memory(), non_blocking=True)
        self._drop_pages()

    def _moved(self, values: Tensor) -> Tensor:
        moved = values.to(self.device)
        if self._map is None:
            return moved
        moved = moved.clone() if moved.device == values.device else moved
        self._drop_pages()
        return moved

    def _drop_pages(self) -> None:
        """The pages stay in the system's cache, but no longer count as this process's memory."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)


def _map_new_file(size: int, folder: Path | None) -> mmap.mmap:
    """A mapped file without a name, so that nothing is left behind however the process ends.

    Raises:
        OSError: the disk is full. All space is taken now: a write to a hole of the map would be a SIGBUS.
    """
    with tempfile.TemporaryFile(dir=folder, prefix="aquant-cache-") as file:
        os.posix_fallocate(file.fileno(), 0, max(size, 1))
        return mmap.mmap(file.fileno(), max(size, 1))


@dataclass
class BlockCache:
    """What a block is learned from, image by image.

    Attributes:
        noised: the block's input from the quantized predecessors, X'.
        clean: the same from the float network.
        target: the float block's output.
    """

    noised: Cache
    clean: Cache
    target: Cache

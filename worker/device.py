"""Device and memory that a worker's jobs get, and take; imports torch: only for the process that computes."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from aquant_core import Resources
from service.jobs.states import Device
from service.settings import Settings


class GpuLostError(Exception):
    """The GPU that this worker began with is not there any more."""


def resources(settings: Settings, device: Device, folder: Path) -> Resources:
    """What the settings allow, on this machine.

    Args:
        settings: ``memory_bytes`` and ``device_memory_bytes``, and ``job_memory_bytes``, above which the lease
            stops a job.
        device: what the worker has found itself to run on.
        folder: where block inputs and outputs go that do not fit into memory.

    Raises:
        GpuLostError: it was a GPU.
    """
    if device == "gpu" and not torch.cuda.is_available():
        raise GpuLostError
    name = "cuda" if device == "gpu" else "cpu"
    return Resources(
        torch.device(name), settings.device_memory_bytes, settings.memory_bytes, folder, settings.job_memory_bytes
    )


def gpu_is_lost(error: BaseException) -> bool:
    """Whether it says that the GPU or this process's hold on it is broken, for this job and any other."""
    return isinstance(error, GpuLostError | torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def gpu_is_full(error: BaseException) -> bool:
    """Whether it says that the GPU's memory does not do."""
    return isinstance(error, torch.OutOfMemoryError)


class GpuMemory:
    """What a GPU's memory is taken by, asked for from the thread that computes, between two of its steps."""

    EVERY_SECONDS = 1.0

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._read: dict[str, int] | None = None
        self._next = 0.0

    def read(self) -> dict[str, int] | None:
        """The bytes in use, in all, and at the most by tensors since the core began to count; None without a GPU.

        The driver is asked once a second; in between it is what it was.
        """
        if self._device.type == "cuda" and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.EVERY_SECONDS
            free, total = torch.cuda.mem_get_info(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
            self._read = {"used_bytes": total - free, "total_bytes": total, "peak_bytes": peak}
        return self._read

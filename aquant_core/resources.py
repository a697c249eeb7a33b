"""What a run may use, and what it does use: device, memory budgets, folder for spilled caches, peak memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from aquant_core.errors import DeviceError

_REMEDY = 'Choose "cpu", or "cuda" where there is a GPU.'

_SHARE_OF_LIMIT = 0.9
"""No block in ``benchmarks/results/memory.json`` took more than 1.1 times its forecast, by which budgets are kept."""

_CLEAR_PEAK = "5"
"""Written to /proc/self/clear_refs, it resets the peak resident size (proc(5))."""

_CONTROL_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Limit and use of memory, in version 2 and in version 1."""


@dataclass(frozen=True, init=False)
class Resources:
    """What a quantization may use.

    Attributes:
        device: where the arithmetic is done; given as a name or CUDA's number, too.
        device_bytes: memory it may take on an accelerator; None for 9/10 of what is free. Not used on a CPU.
        memory_bytes: memory the process may fill in all before block inputs and outputs go to disk; None for what it
            has and 8/10 of what is available, at most 9/10 of ``limit_bytes``.
        folder: where block inputs and outputs go that fit into neither; None for the system's temporary folder.
        limit_bytes: main memory above which whoever runs the process stops it, mapped files left out; None without such
            a limit. A plan tells whether its forecast is beyond it.

    Raises:
        DeviceError: the device is not there, or neither a CPU nor one of CUDA.
    """

    device: torch.device
    device_bytes: int | None
    memory_bytes: int | None
    folder: Path | None
    limit_bytes: int | None

    def __init__(
        self,
        device: str | int | torch.device = "cpu",
        device_bytes: int | None = None,
        memory_bytes: int | None = None,
        folder: Path | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        found = usable_device(device)
        if found.type not in ("cpu", "cuda"):
            raise DeviceError(f"{str(found)!r} is neither cpu nor cuda.", _REMEDY)
        given = (found, device_bytes, memory_bytes, folder, limit_bytes)
        for attribute, value in zip(fields(self), given, strict=True):
            object.__setattr__(self, attribute.name, value)

    def device_budget(self) -> int:
        """Bytes on the accelerator; 0 on a CPU."""
        if self.device.type == "cpu":
            return 0
        if self.device_bytes is not None:
            return self.device_bytes
        free = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return int(0.9 * free)

    def memory_budget(self) -> int:
        """Bytes of main memory, those that the process holds already included."""
        if self.memory_bytes is not None:
            return self.memory_bytes
        fits = resident_bytes() + int(0.8 * available_bytes())
        return fits if self.limit_bytes is None else min(fits, int(_SHARE_OF_LIMIT * self.limit_bytes))


def usable_device(device: str | int | torch.device) -> torch.device:
    """A device by its name or, on CUDA, its number; one of CUDA is there.

    Raises:
        DeviceError: it is no device, or there are not as many of CUDA.
    """
    try:
        found = torch.device(f"cuda:{device}" if isinstance(device, int) else device)
    except RuntimeError as error:
        raise DeviceError(f"{device!r} is no device.", _REMEDY) from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0  # some are counted that cannot be used
    if found.type == "cuda" and (found.index or 0) >= count:
        built = "" if torch.version.cuda else ", and this torch was built without CUDA"
        raise DeviceError(
            f"Device {str(found)!r} is not there: {count} CUDA devices are usable{built}.",
            _REMEDY + " A GPU needs the NVIDIA driver and a torch that was built for CUDA.",
        )
    return found


def resident_bytes() -> int:
    """Main memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int:
    """Main memory that could still be had, by the machine and by the control group."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(values["MemAvailable"].split()[0]) * 1024
    for limit, used in _CONTROL_GROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # of the other version, or without a limit ("max")
            available = min(available, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return max(available, 0)


class PeakMemory:
    """Peak memory on a device since this object was made; on a CPU, of the whole process.

    Attributes:
        device: the device.
        start: bytes in use when it was made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            return_free_memory()
            with contextlib.suppress(OSError):  # a read-only /proc: the peak is then that of the process's life
                Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
            self.start = resident_bytes()
        else:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)

    def read(self) -> int:
        """Bytes at the highest point until now."""
        if self.device.type != "cpu":
            return torch.cuda.max_memory_allocated(self.device)
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def return_free_memory() -> None:
    """Has glibc give back what it keeps for later, lest it add to the next step's peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

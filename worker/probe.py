"""Finds out, before a worker takes its first job, what it can compute on: a GPU that really computes, or the CPU.

The worker's parent process must not touch CUDA, so a child tries it (`python -m worker.probe`).
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from dataclasses import dataclass

from service.jobs.states import Device
from service.settings import Settings

NO_GPU = "no usable GPU"

PROBE_SECONDS = 120.0
"""To import torch and begin with CUDA takes seconds; on a cold disk, more."""


class NoUsableGpuError(Exception):
    """The settings insist on a GPU, and there is none that computes."""


@dataclass(frozen=True)
class Found:
    """What a worker runs on, and that in words: the device's name, or why it has no GPU."""

    device: Device
    detail: str


def find_device(settings: Settings) -> Found:
    """What this worker can compute on.

    Raises:
        NoUsableGpuError: ``device`` is cuda, and no GPU is usable.
    """
    cores = f"{len(os.sched_getaffinity(0))} CPU cores"
    if settings.device == "cpu":
        return Found("cpu", cores)
    gpu, why = _try_gpu()
    if gpu is not None:
        return Found("gpu", gpu)
    if settings.device == "cuda":
        raise NoUsableGpuError(
            f"AQUANT_DEVICE is cuda, but there is no usable GPU: {why}. Mend that, or set AQUANT_DEVICE to auto or cpu."
        )
    return Found("cpu", f"{cores}; {NO_GPU}: {why}")


def _try_gpu() -> tuple[str | None, str]:
    """The GPU's name, or None and why there is none."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "there is no NVIDIA driver here"  # told without the seconds that torch takes
    try:
        child = subprocess.run(
            [sys.executable, "-m", "worker.probe"], capture_output=True, text=True, timeout=PROBE_SECONDS, check=False
        )
        answer = json.loads(child.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return None, f"it did not answer within {PROBE_SECONDS:.0f} seconds"
    except (ValueError, IndexError):
        return None, f"the process that tried it ended with status {child.returncode}"
    return answer["gpu"], answer["why"]


def main() -> None:
    """Try the GPU, and print what came of it as JSON."""
    print(json.dumps(_compute()))


def _compute() -> dict[str, str | None]:
    import torch  # only in the child

    try:
        if not torch.cuda.is_available():
            built = "torch finds none" if torch.version.cuda else "torch is built without CUDA"
            return {"gpu": None, "why": built}
        ones = torch.ones(64, 64, device="cuda")
        if (ones @ ones).sum().item() != 64**3:
            return {"gpu": None, "why": "it computes wrong sums"}
        of_gpu = torch.cuda.get_device_properties(0)
    except RuntimeError as error:
        return {"gpu": None, "why": str(error).splitlines()[0]}
    return {"gpu": f"{of_gpu.name}, {of_gpu.total_memory / 2**30:.0f} GiB", "why": ""}


if __name__ == "__main__":
    main()

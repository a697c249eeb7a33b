"""What each worker of an embedded stack is given: a GPU of its own, or its share of the cores, and of the memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

import psutil

from service.settings import Settings

MEMORY_SHARE = 0.8
"""Of the memory that is available, so much for all workers together."""
LIST_SECONDS = 20.0


class TooFewGpusError(Exception):
    """More workers than GPUs were asked for, and all of them are to have one."""


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """The GPUs that processes with this environment see, as CUDA_VISIBLE_DEVICES names them."""
    chosen = environment.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name.strip() not in ("", "-1")]
    command = shutil.which("nvidia-smi", path=environment.get("PATH"))
    if command is None:
        return []
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=LIST_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []  # its worker tries the GPU itself, and says what it finds
    return [str(number) for number, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def environments(settings: Settings, given: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of every worker; one worker alone gets what is given as it is.

    Args:
        settings: ``workers`` is how many there are to be, else one for each GPU, or one; ``device``.
        given: what they have in common.

    Raises:
        TooFewGpusError: not all of them can have a GPU, and ``device`` is cuda.
    """
    gpus = [] if settings.device == "cpu" else visible_gpus(given)
    count = settings.workers or max(1, len(gpus))
    if count == 1:
        return [dict(given)]
    if settings.device == "cuda" and count > len(gpus):
        raise TooFewGpusError(
            f"AQUANT_DEVICE is cuda and there are to be {count} workers, but there are {len(gpus)} GPUs: one worker "
            "uses one. Start fewer, or set AQUANT_DEVICE to auto: the others then take jobs for the CPU."
        )
    memory = settings.memory_bytes or int(MEMORY_SHARE * psutil.virtual_memory().available) // count
    shared = {**given, "AQUANT_MEMORY_BYTES": str(memory)}
    of_gpus = [{**shared, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus[:count]]
    without = count - len(of_gpus)
    if without:
        threads = max(1, len(os.sched_getaffinity(0)) // without)
        shared = {"OMP_NUM_THREADS": str(threads), **shared, "AQUANT_DEVICE": "cpu"}
    return of_gpus + [shared] * without

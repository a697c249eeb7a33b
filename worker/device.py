"""Which device and how much memory a worker's jobs get; imports torch, so only for the process that computes."""

from __future__ import annotations

from pathlib import Path

import torch

from aquant_core import Resources
from service.settings import Settings


def resources(settings: Settings, folder: Path) -> Resources:
    """What the settings allow, on this machine.

    Args:
        settings: ``device``, ``memory_bytes`` and ``device_memory_bytes``.
        folder: where block inputs and outputs go that do not fit into memory.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return Resources(torch.device(name), settings.device_memory_bytes, settings.memory_bytes, folder)

"""AQuant: post-training quantization of CNNs with an adaptive rounding border.

Public names are resolved when first used, so that importing ``aquant_core.config`` loads no torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aquant_core.capture_model import capture
    from aquant_core.checkpoint_torch import load
    from aquant_core.config import QuantizationConfig
    from aquant_core.export_onnx import write_onnx
    from aquant_core.graph import CapturedModel
    from aquant_core.images import ImageSet, check_images, read_images
    from aquant_core.pipeline import QuantizationResult, quantize
    from aquant_core.planning import plan
    from aquant_core.progress import Progress
    from aquant_core.resources import Resources
    from aquant_core.runtime import IntegerModel

# Before any module imports onnxruntime, whose published builds report to their maker otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_MODULE_OF_NAME = {
    "CapturedModel": "graph",
    "ImageSet": "images",
    "IntegerModel": "runtime",
    "Progress": "progress",
    "QuantizationConfig": "config",
    "QuantizationResult": "pipeline",
    "Resources": "resources",
    "capture": "capture_model",  # a module named capture would hide the function
    "check_images": "images",
    "load": "checkpoint_torch",
    "plan": "planning",
    "quantize": "pipeline",
    "read_images": "images",
    "write_onnx": "export_onnx",
}

__all__ = [
    "CapturedModel",
    "ImageSet",
    "IntegerModel",
    "Progress",
    "QuantizationConfig",
    "QuantizationResult",
    "Resources",
    "capture",
    "check_images",
    "load",
    "plan",
    "quantize",
    "read_images",
    "write_onnx",
]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)

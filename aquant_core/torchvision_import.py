"""Imports torchvision where its compiled operators do not load.

torchvision's published wheel is built against the CUDA libraries; beside a CPU-only torch its extension
cannot be loaded, and then its own registrations fail at import ("operator torchvision::nms does not exist").
Declaring the operators' schemas first lets models and transforms work. The detection operators stay without
an implementation.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "roi_align(Tensor i, Tensor r, float s, int h, int w, int n, bool a) -> Tensor",
    "_roi_align_backward(Tensor g, Tensor r, float s, int h, int w, int b, int c, int y, int x, int n, "
    "bool a) -> Tensor",
    "qroi_align(Tensor i, Tensor r, float s, int h, int w, int n, bool a) -> Tensor",
    "ps_roi_align(Tensor i, Tensor r, float s, int h, int w, int n) -> (Tensor, Tensor)",
    "_ps_roi_align_backward(Tensor g, Tensor r, Tensor m, float s, int h, int w, int n, int b, int c, "
    "int y, int x)"
    " -> Tensor",
    "roi_pool(Tensor i, Tensor r, float s, int h, int w) -> (Tensor, Tensor)",
    "_roi_pool_backward(Tensor g, Tensor r, Tensor a, float s, int h, int w, int b, int c, int y, int x) -> Tensor",
    "ps_roi_pool(Tensor i, Tensor r, float s, int h, int w) -> (Tensor, Tensor)",
    "_ps_roi_pool_backward(Tensor g, Tensor r, Tensor m, float s, int h, int w, int b, int c, int y, int x) -> Tensor",
    "deform_conv2d(Tensor i, Tensor w, Tensor o, Tensor m, Tensor b, int sy, int sx, int py, int px, "
    "int dy, int dx,"
    " int g, int og, bool u) -> Tensor",
    "_deform_conv2d_backward(Tensor g, Tensor i, Tensor w, Tensor o, Tensor m, Tensor b, int sy, int sx, "
    "int py, int px,"
    " int dy, int dx, int n, int og, bool u) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """The torchvision package.

    Raises:
        ImportError: it is not installed.
    """
    global _library
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed: pip install 'aquant-service[core]'")
    if _library is None and not hasattr(torch.ops.torchvision, "nms"):
        for extension in Path(spec.origin).parent.glob("_C*.so"):
            with contextlib.suppress(OSError):
                torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
        if not hasattr(torch.ops.torchvision, "nms"):
            _library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
            for schema in _SCHEMAS:
                _library.define(schema)  # type: ignore[no-untyped-call]
    import torchvision

    module: ModuleType = torchvision
    return module

"""im2col in ONNX: a window's positions as slices of the padded map."""

from __future__ import annotations

import numpy as np

from aquant_core.onnx_graph import OnnxGraph
from cupy_kernels.specification import Window

_TO_THE_END = np.iinfo(np.int64).max


def columns_of(graph: OnnxGraph, padded: str, window: Window) -> str:
    """im2col of a padded map: (N, C, H, W) to (N, C, K, H_out, W_out)."""
    axis = graph.constant([2], np.int64)
    views = [
        graph.add("Unsqueeze", [graph.add("Slice", [padded, *slices]), axis])
        for slices in slices_of(graph, window, (2, 3))
    ]
    return graph.add("Concat", views, axis=2)


def slices_of(graph: OnnxGraph, window: Window, axes: tuple[int, int]) -> list[list[str]]:
    """Slice's inputs after the padded map, for each position of the window in order.

    The end is counted from the map's, so that the map may have any size.
    """
    slices = []
    for position in range(window.positions):
        offset = divmod(position, window.kernel_size[1])
        starts = [at * d for at, d in zip(offset, window.dilation, strict=True)]
        spans = [d * (k - 1) for k, d in zip(window.kernel_size, window.dilation, strict=True)]
        ends = [start - span or _TO_THE_END for start, span in zip(starts, spans, strict=True)]
        slices.append([graph.constant(values, np.int64) for values in (starts, ends, axes, window.stride)])
    return slices


def inside_of(window: Window, size: tuple[int, int]) -> np.ndarray:
    """Which im2col slots lie inside a map of ``size``: bool (1, 1, K, H_out, W_out)."""
    counts = window.output_size(*size)
    rows, columns = (_hits(window, axis, count, size[axis]) for axis, count in enumerate(counts))
    inside: np.ndarray = rows[:, None, :, None] & columns[None, :, None, :]  # (k_y, k_x, H_out, W_out)
    return np.reshape(inside, (1, 1, window.positions, *counts))


def _hits(window: Window, axis: int, count: int, extent: int) -> np.ndarray:
    """Whether the windows' positions along one axis lie inside: (k, windows)."""
    starts = np.arange(count) * window.stride[axis] - window.padding[axis]
    places = starts + np.arange(window.kernel_size[axis])[:, None] * window.dilation[axis]
    inside: np.ndarray = (places >= 0) & (places < extent)
    return inside

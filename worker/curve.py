"""The loss curve of the block under way, as short as can be told twice a second."""

from __future__ import annotations

import math
import threading
from typing import Any

from aquant_core.progress import Progress

MOST = 64
"""Points of a curve; once there are as many, two neighbours become one."""


class RunningCurve:
    """Means of equally many readings of a block's loss, each at the last one's iteration; begins anew with a block.

    Iterations are counted from 0, as in a report's curves, and not from 1 as in Progress.
    The working thread adds, the lease's thread reads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._block: tuple[str | None, int] | None = None
        self._points: list[tuple[int, float]] = []
        self._width, self._sum, self._count = 1, 0.0, 0

    def add(self, progress: Progress) -> None:
        """Take in one report; one that tells of no loss, or of one that is not finite, adds nothing."""
        with self._lock:
            block = (progress.method, progress.block)
            if block != self._block:
                self._block, self._points = block, []
                self._width, self._sum, self._count = 1, 0.0, 0
            if progress.loss is None or not math.isfinite(progress.loss):
                return
            self._sum, self._count = self._sum + progress.loss, self._count + 1
            if self._count == self._width:
                self._points.append((progress.iteration - 1, self._sum / self._width))
                self._sum, self._count = 0.0, 0
            if len(self._points) == MOST:
                pairs = zip(self._points[::2], self._points[1::2], strict=True)
                self._points = [(at, (first + second) / 2) for (_, first), (at, second) in pairs]
                self._width *= 2

    def document(self) -> dict[str, Any] | None:
        """A LossCurve; None before there is anything to draw."""
        with self._lock:
            if len(self._points) < 2:
                return None
            iterations, values = zip(*self._points, strict=True)
            return {"iterations": list(iterations), "values": list(values)}

"""What a running quantization says of itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Stage = Literal["intake", "capture", "forecast", "search", "nearest", "reconstruct", "evaluate", "sensitivity", "save"]


@dataclass(frozen=True)
class Progress:
    """One progress report.

    Attributes:
        stage: the step of the pipeline under way.
        block: one-based number of the block under reconstruction, 0 outside ``reconstruct``.
        blocks: number of blocks of the network, times the networks that a search for a target learns.
        iteration: step within the block; in ``search`` and ``sensitivity`` the number of the layer's width on trial.
        iterations: steps per block, or widths to be tried.
        loss: reconstruction loss of that step (Algorithm 1's MSE, without the regulariser).
        eta_seconds: estimated seconds until all blocks are done, without what follows; None while none is under way.
        method: the method under way; None while all of a run's are.
        forecast: what the blocks will take (``Forecast.document``), told once when it is known.
    """

    stage: Stage
    block: int = 0
    blocks: int = 0
    iteration: int = 0
    iterations: int = 0
    loss: float | None = None
    eta_seconds: float | None = None
    forecast: dict[str, Any] | None = None
    method: str | None = None


OnProgress = Callable[[Progress], None]
"""Called from the thread that quantizes; an exception raised here ends the run and reaches its caller."""

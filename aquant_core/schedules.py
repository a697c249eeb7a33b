"""What changes over the iterations of one block's reconstruction: pure functions of the step."""

from __future__ import annotations

import math

WARM_UP = 0.2
"""Share of the iterations in which neither rounding error nor weight regulariser acts (appendix B; QDrop)."""


def _after_warm_up(step: int, iterations: int) -> float:
    """0 during the warm-up, then linearly to 1 at the last step."""
    start = WARM_UP * iterations
    return min(max((step - start) / max(iterations - 1 - start, 1.0), 0.0), 1.0)


def rounding_schedule(step: int, iterations: int) -> float:
    """alpha of appendix Eq. 2: 0 for the first 20 %, then linear to 1."""
    return _after_warm_up(step, iterations)


def regulariser_beta(step: int, iterations: int, first: float, last: float) -> float:
    """beta of appendix Eq. 4: ``first`` until the warm-up ends, then linear to ``last``."""
    return first + (last - first) * _after_warm_up(step, iterations)


def regulariser_acts(step: int, iterations: int) -> bool:
    """Whether the weight regulariser is on: not in the first 20 %."""
    return step >= WARM_UP * iterations


def cosine(step: int, iterations: int) -> float:
    """Factor of a learning rate that decays: 1 at first, 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * step / iterations))

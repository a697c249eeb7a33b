"""The loss curve of a running block: short, true, and of that block alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aquant_core.progress import Progress
from worker.curve import MOST, RunningCurve


def step(iteration: int, loss: float | None, block: int = 1, method: str = "aquant") -> Progress:
    """Progress counts from 1, a curve from 0."""
    return Progress("reconstruct", block, 5, iteration + 1, 10_000, loss, method=method)


@given(st.integers(2, 1000))
def test_however_long_the_block_the_curve_is_short_and_spans_it(count: int) -> None:
    curve = RunningCurve()
    for index in range(count):
        curve.add(step(10 * index, float(index)))
    document = curve.document()
    assert document is not None
    iterations, values = document["iterations"], document["values"]
    assert len(iterations) == len(values) <= MOST
    width = 1
    while count // width >= MOST:
        width *= 2
    assert iterations == [10 * (width * n - 1) for n in range(1, count // width + 1)]
    assert values == [width * n - 1 - (width - 1) / 2 for n in range(1, count // width + 1)]


def test_another_block_begins_anew() -> None:
    curve = RunningCurve()
    for iteration in (0, 10, 20):
        curve.add(step(iteration, 1.0))
    for changes in ({"block": 2}, {"block": 2, "method": "qdrop"}):
        curve.add(step(0, 5.0, **changes))
        assert curve.document() is None
        curve.add(step(10, 4.0, **changes))
        assert curve.document() == {"iterations": [0, 10], "values": [5.0, 4.0]}


def test_what_json_cannot_hold_is_left_out() -> None:
    curve = RunningCurve()
    for iteration, loss in enumerate((1.0, None, float("nan"), float("inf"), 2.0)):
        curve.add(step(iteration, loss))
    assert curve.document() == {"iterations": [0, 4], "values": [1.0, 2.0]}

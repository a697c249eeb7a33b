"""Schedules at their ends and in the middle."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquant_core.schedules import cosine, regulariser_acts, regulariser_beta, rounding_schedule

STEPS = st.integers(1, 30_000).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))


@pytest.mark.parametrize(
    ("step", "iterations", "expected"),
    [
        (0, 100, 0.0),
        (19, 100, 0.0),
        (20, 100, 0.0),
        (21, 100, 1 / 79),
        (60, 100, 40 / 79),
        (99, 100, 1.0),
        (0, 1, 0.0),
        (0, 20_000, 0.0),
        (19_999, 20_000, 1.0),
    ],
)
def test_rounding_schedule(step: int, iterations: int, expected: float) -> None:
    assert rounding_schedule(step, iterations) == pytest.approx(expected)


def test_rounding_schedule_ends_at_exactly_one() -> None:
    # The kernels and a layer's forward take 1.0 as "no schedule"; 0.999... would never round fully.
    assert all(rounding_schedule(n - 1, n) == 1.0 for n in (3, 7, 20, 300, 20_000))


@pytest.mark.parametrize(("step", "expected"), [(0, 16.0), (20, 16.0), (60, 16 - 14 * 40 / 79), (99, 2.0)])
def test_beta(step: int, expected: float) -> None:
    assert regulariser_beta(step, 100, 16.0, 2.0) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "acts"), [(0, False), (19, False), (20, True), (99, True)])
def test_regulariser_is_off_for_the_first_fifth(step: int, acts: bool) -> None:
    assert regulariser_acts(step, 100) is acts


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (25, 0.853553), (50, 0.5), (100, 0.0)])
def test_cosine(step: int, expected: float) -> None:
    assert cosine(step, 100) == pytest.approx(expected, abs=1e-6)


@given(STEPS)
def test_within_bounds_and_monotonic(moment: tuple[int, int]) -> None:
    step, iterations = moment
    now, later = rounding_schedule(step, iterations), rounding_schedule(step + 1, iterations)
    assert 0 <= now <= later <= 1
    assert 20 >= regulariser_beta(step, iterations, 20, 2) >= regulariser_beta(step + 1, iterations, 20, 2) - 1e-12
    assert 1 >= cosine(step, iterations) >= cosine(step + 1, iterations) >= -1e-12
    if not regulariser_acts(step, iterations):
        assert now == 0

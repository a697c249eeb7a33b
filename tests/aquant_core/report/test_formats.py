"""How the page writes numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aquant_core.report import formats


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (formats.percent(0.90604), "90.60 %"),
        (formats.percent(None), "–"),  # noqa: RUF001
        (formats.points(-0.035), "−3.50"),  # noqa: RUF001
        (formats.points(0.0123, 1), "+1.2"),
        (formats.in_bytes(999), "999 B"),
        (formats.in_bytes(71_568), "71.6 kB"),
        (formats.in_bytes(999_600), "1.00 MB"),
        (formats.in_bytes(46_827_520), "46.8 MB"),
        (formats.count(1_728), "1,728"),
        (formats.count(1_806_336), "1.81 M"),
        (formats.count(20_668_350_464), "20.7 G"),
        (formats.duration(77.277), "77.3 s"),
        (formats.duration(1800), "30.0 min"),
        (formats.duration(86_400), "24.0 h"),
        (formats.number(4.093894858669955e-05), "4.094e−5"),  # noqa: RUF001
        (formats.number(-5.30539), "−5.305"),  # noqa: RUF001
        (formats.fixed(0.02), "0.020"),
        (formats.decibels(200.0), "exact"),
        (formats.decibels(7.5191), "7.5"),
        (formats.bits(32), "float"),
    ],
)
def test_numbers(written: str, expected: str) -> None:
    assert written.replace(formats.SPACE, " ") == expected


@given(st.floats(1, 1e14))
def test_a_size_is_read_back_to_three_digits(size: float) -> None:
    number, unit = formats.in_bytes(size).split(formats.SPACE)
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert float(number.replace(",", "")) * factor == pytest.approx(size, rel=6e-3, abs=0.5)
    assert len(number) <= 4

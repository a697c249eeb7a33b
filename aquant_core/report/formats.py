"""How the report's page writes numbers and names; what takes a number takes None for one that is not known."""

from __future__ import annotations

import re
from collections.abc import Callable

from aquant_core.config import FLOAT_BITS

MISSING, MINUS, SPACE = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{NO-BREAK SPACE}"

NAMES = {
    "float": "Float",
    "nearest": "Rounding to nearest",
    "a_rounding": "A-rounding",
    "adaround": "AdaRound",
    "brecq": "BRECQ",
    "qdrop": "QDrop",
    "qdrop_refactored": "QDrop, at layer inputs",
    "aquant_no_border": "AQuant without border",
    "aquant": "AQuant",
}
"""What methods are called."""

NO_NOISE = 200.0
"""dB that stand for no error at all."""


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction in per cent."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f}{SPACE}%"


def points(fraction: float | None, digits: int = 2) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return MISSING if fraction is None else signed(100 * fraction, f"+.{digits}f")


def in_bytes(size: float | None) -> str:
    """A size in the unit that suits it, of 1000."""
    if size is None or abs(size) < 1000:
        return MISSING if size is None else f"{size:.0f}{SPACE}B"
    return _scaled(size, ("kB", "MB", "GB", "TB"))


def count(number: float | None) -> str:
    """A count, in full up to four digits."""
    if number is None or abs(number) < 10_000:
        return MISSING if number is None else f"{number:,.0f}"
    return _scaled(number, ("k", "M", "G", "T", "P"))


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return MISSING
    for limit, length, unit in ((120, 1, "s"), (7200, 60, "min")):
        if seconds < limit:
            return f"{seconds / length:.1f}{SPACE}{unit}"
    return f"{seconds / 3600:.1f}{SPACE}h"


def number(value: float | None, digits: int = 4) -> str:
    """To so many significant digits."""
    return MISSING if value is None else re.sub(r"(?<=e.)0+", "", signed(value, f".{digits}g"))


def fixed(value: float | None, digits: int = 3) -> str:
    """To so many digits behind the point."""
    return MISSING if value is None else signed(value, f".{digits}f")


def decibels(value: float | None) -> str:
    """A ratio in dB, to a tenth."""
    return "exact" if value is not None and value >= NO_NOISE else fixed(value, 1)


def bits(width: int) -> str:
    """A width, or that there is none."""
    return "float" if width == FLOAT_BITS else str(width)


def method(name: str) -> str:
    """What a method is called."""
    return NAMES.get(name, name)


def signed(value: float, form: str) -> str:
    """By a format specification, with a true minus."""
    return format(value, form).replace("-", MINUS)


def _scaled(value: float, units: tuple[str, ...]) -> str:
    """To three digits in the unit of a power of 1000 that suits."""
    for unit in units:
        value /= 1000
        if abs(value) < 999.5 or unit == units[-1]:
            break
    return f"{value:,.{2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0}f}{SPACE}{unit}"


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "points": points,
    "bytes": in_bytes,
    "count": count,
    "duration": duration,
    "number": number,
    "fixed": fixed,
    "decibels": decibels,
    "bits": bits,
    "method": method,
}
"""By the names under which templates know them."""

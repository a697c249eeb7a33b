"""How the report's page writes numbers; each takes None for what is not known."""

from __future__ import annotations

from collections.abc import Callable

from aquant_core.config import FLOAT_BITS
from aquant_core.report.plots import NO_NOISE

MISSING, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction in per cent."""
    return MISSING if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(fraction: float, digits: int = 2) -> str:
    """A difference of fractions in percentage points, with its sign."""
    return f"{100 * fraction:+.{digits}f}".replace("-", MINUS)


def in_bytes(size: float | None) -> str:
    """A size in the unit that suits it, of 1000."""
    if size is None:
        return MISSING
    for unit in ("B", "kB", "MB"):
        if abs(size) < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:,.4g} GB"


def count(number: float | None) -> str:
    """A count in words that fit a table: 20.2 M."""
    if number is None:
        return MISSING
    for unit in ("", " k", " M", " G"):
        if abs(number) < 10_000:
            return f"{number:,.4g}{unit}" if unit else f"{number:,.0f}"
        number /= 1000
    return f"{number:,.4g} T"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def number(value: float | None, digits: int = 4) -> str:
    """To so many significant digits."""
    return MISSING if value is None else f"{value:.{digits}g}".replace("-", MINUS)


def decibels(value: float | None) -> str:
    """A ratio in dB, to a tenth."""
    if value is None:
        return MISSING
    return "exact" if value >= NO_NOISE else f"{value:.1f}".replace("-", MINUS)


def bits(width: int) -> str:
    """A width, or that there is none."""
    return "float" if width == FLOAT_BITS else str(width)


FILTERS: dict[str, Callable[..., str]] = {
    "percent": percent,
    "points": points,
    "bytes": in_bytes,
    "count": count,
    "duration": duration,
    "number": number,
    "decibels": decibels,
    "bits": bits,
}
"""By the names under which templates know them."""

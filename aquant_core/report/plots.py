"""The report's plots as inline SVG: colours come from the page's style sheet, sizes grow with its text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from aquant_core.report.formats import NO_NOISE, number, percent, points, signed
from aquant_core.report.schema import Distribution, LayerSqnr, LossCurve

_REM = 16.0
"""Units of a plot's coordinates in one rem, so that a plot grows with the reader's text."""

_ROW = 22.0


@dataclass(frozen=True)
class Shape:
    """How wide a plot with a row for each is, its column of names on the left, and how many letters fit there."""

    width: float
    labels: float
    letters: int


_FULL = Shape(656, 168, 28)
_HALF = Shape(552, 168, 28)
"""Two of these fit beside each other on a wide page."""
_SLIM = Shape(336, 122, 16)
"""For a telephone, on which letters would be too small if the others were scaled down."""


class Svg:
    """One drawing, with a title and a description for those who do not see it.

    Args:
        width, height: in units of which 16 are one rem.
        key: unique on the page; plain letters, digits and hyphens.
        title: what it is.
        description: what it shows, in words.
    """

    def __init__(self, width: float, height: float, key: str, title: str, description: str) -> None:
        self._parts = [
            Markup(
                '<svg role="img" aria-labelledby="{key}-t {key}-d" viewBox="0 0 {width} {height}" width="{rem}rem">'
                '<title id="{key}-t">{title}</title><desc id="{key}-d">{description}</desc>'
            ).format(
                key=key,
                width=_at(width),
                height=_at(height),
                rem=f"{width / _REM:.4g}",
                title=title,
                description=description,
            )
        ]

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self._add('<line x1="{}" y1="{}" x2="{}" y2="{}" class="{}"/>', _at(x1), _at(y1), _at(x2), _at(y2), kind)

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A filled rectangle; nothing where it has no area."""
        if width > 0 and height > 0:
            self._add(
                '<rect x="{}" y="{}" width="{}" height="{}" class="{}"/>', _at(x), _at(y), _at(width), _at(height), kind
            )

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        """Words on the base line ``y``."""
        self._add('<text x="{}" y="{}" text-anchor="{}" class="{}">{}</text>', _at(x), _at(y), anchor, kind, words)

    def path(self, points: Sequence[tuple[float, float]], kind: str, closed: bool = False) -> None:
        """A line through the points, or the area within."""
        if points:
            steps = " ".join(f"{_at(x)},{_at(y)}" for x, y in points)
            self._add('<{} points="{}" class="{}"/>', "polygon" if closed else "polyline", steps, kind)

    def dot(self, x: float, y: float, kind: str) -> None:
        """A mark: a disc, or with ``kind`` "second" a square and with "third" a diamond, told apart without colour."""
        if kind == "second":
            self.box(x - 3.5, y - 3.5, 7, 7, kind)
        elif kind == "third":
            self.path([(x - 5, y), (x, y - 5), (x + 5, y), (x, y + 5)], kind, closed=True)
        else:
            self._add('<circle cx="{}" cy="{}" r="4" class="{}"/>', _at(x), _at(y), kind)

    def finish(self) -> Markup:
        """The element."""
        return Markup("").join([*self._parts, Markup("</svg>")])

    def _add(self, pattern: str, *values: str) -> None:
        self._parts.append(Markup(pattern).format(*values))


@dataclass(frozen=True)
class Bar:
    """A fraction with its interval, under a name."""

    name: str
    value: float
    interval: Sequence[float]
    kind: str = ""

    @property
    def low(self) -> float:
        return self.interval[0]

    @property
    def high(self) -> float:
        return self.interval[1]


def accuracy_bars(bars: Sequence[Bar], what: str, key: str) -> Markup:
    """Fractions from 0 to 100 %, each with its 95 % interval."""
    return _for_both(lambda shape, key: _accuracy_bars(bars, what, key, shape), _HALF, key)


def _accuracy_bars(bars: Sequence[Bar], what: str, key: str, shape: Shape) -> Markup:
    left, right, top = shape.labels, shape.width - 64, 8.0
    bottom = top + _ROW * len(bars)
    told = "; ".join(f"{bar.name} {percent(bar.value)} ({percent(bar.low)} to {percent(bar.high)})" for bar in bars)
    svg = Svg(shape.width, bottom + 24, key, what, f"{told}.")
    quarters = range(0, 5, 1 if right - left > 200 else 2)
    for share in (quarter / 4 for quarter in quarters):
        x = left + (right - left) * share
        svg.line(x, top, x, bottom, "grid")
        svg.text(x, bottom + 17, percent(share, 0), "tick", "middle")
    for index, bar in enumerate(bars):
        y = top + _ROW * (index + 0.5)
        low, value, high = (left + (right - left) * share for share in (bar.low, bar.value, bar.high))
        svg.text(left - 10, y + 4, shortened(bar.name, shape.letters), "name", "end")
        svg.box(left, y - 7, value - left, 14, f"bar {bar.kind}")
        _whisker(svg, low, high, y)
        svg.text(right + 10, y + 4, percent(bar.value), "value")
    return svg.finish()


def difference_plot(bars: Sequence[Bar], what: str, key: str) -> Markup:
    """Differences in percentage points around 0, each with its 95 % interval."""
    return _for_both(lambda shape, key: _difference_plot(bars, what, key, shape), _HALF, key)


def _difference_plot(bars: Sequence[Bar], what: str, key: str, shape: Shape) -> Markup:
    left, right, top = shape.labels, shape.width - 64, 8.0
    bottom = top + _ROW * len(bars)
    told = "; ".join(f"{bar.name} {points(bar.value)} ({points(bar.low)} to {points(bar.high)})" for bar in bars)
    svg = Svg(shape.width, bottom + 24, key, what, f"In percentage points: {told}.")
    lowest, highest = min(0.0, *(bar.low for bar in bars)), max(0.0, *(bar.high for bar in bars))
    ticks = _ticks(100 * lowest, 100 * highest, _ticks_between(left, right))
    scale = _Scale(ticks[0], ticks[-1], left, right)
    for tick in ticks:
        svg.line(scale(tick), top, scale(tick), bottom, "axis" if tick == 0 else "grid")
        svg.text(scale(tick), bottom + 17, signed(tick, "+g") if tick else "0", "tick", "middle")
    for index, bar in enumerate(bars):
        y = top + _ROW * (index + 0.5)
        svg.text(left - 10, y + 4, shortened(bar.name, shape.letters), "name", "end")
        _whisker(svg, scale(100 * bar.low), scale(100 * bar.high), y)
        svg.dot(scale(100 * bar.value), y, "first")
        svg.text(right + 10, y + 4, points(bar.value), "value")
    return svg.finish()


@dataclass(frozen=True)
class SqnrRow:
    """A layer's SQNR in dB."""

    name: str
    sqnr: LayerSqnr

    def badness(self) -> float:
        """To sort by: lowest for the worst output."""
        return math.inf if self.sqnr.output is None else self.sqnr.output

    def marks(self) -> list[tuple[str, float]]:
        """What there is to be drawn: not where nothing is quantized, or no error is left."""
        values = (("second", self.sqnr.weight), ("third", self.sqnr.input), ("first", self.sqnr.output))
        return [(kind, value) for kind, value in values if value is not None and value < NO_NOISE]


def sqnr_plot(rows: Sequence[SqnrRow], key: str) -> Markup:
    """A row of three marks for each layer, in the network's order."""
    return _for_both(lambda shape, key: _sqnr_plot(rows, key, shape), _FULL, key)


def _sqnr_plot(rows: Sequence[SqnrRow], key: str, shape: Shape) -> Markup:
    left, right, top = shape.labels, shape.width - 20, 34.0
    row = 18.0
    bottom = top + row * len(rows)
    values = [value for each in rows for _, value in each.marks()]
    lowest = min(rows, key=SqnrRow.badness)
    told = f"Lowest at the output: {lowest.name}, {lowest.sqnr.output} dB. The table below has every number."
    svg = Svg(shape.width, bottom + 40, key, "SQNR of each layer", told)
    ticks = _ticks(min(0.0, *values), max(10.0, *values), _ticks_between(left, right))
    scale = _Scale(ticks[0], ticks[-1], left, right)
    place = min(left, right - 260)
    for kind, words in (("first", "output"), ("second", "weight"), ("third", "input")):
        svg.dot(place + 5, 12, kind)
        svg.text(place + 16, 16, words, "legend")
        place += 90
    for tick in ticks:
        svg.line(scale(tick), top, scale(tick), bottom, "grid")
        svg.text(scale(tick), bottom + 17, signed(tick, "g"), "tick", "middle")
    svg.text((left + right) / 2, bottom + 34, "dB", "tick", "middle")
    for index, each in enumerate(rows):
        y = top + row * (index + 0.5)
        svg.text(left - 10, y + 4, shortened(each.name, shape.letters), "name", "end")
        svg.line(left, y, right, y, "faint")
        for kind, value in each.marks():
            svg.dot(scale(value), y, kind)
    return svg.finish()


def loss_plot(curve: LossCurve, iterations: int, name: str, key: str) -> Markup | None:
    """One block's loss over all its iterations, of which the curve may have the first alone, on a logarithmic scale.

    None where there is no curve to draw.
    """
    readings = [(i, v) for i, v in zip(curve.iterations, curve.values, strict=True) if v is not None and v > 0]
    if len(readings) < 2:
        return None
    width, height, left, right, top = 224.0, 132.0, 52.0, 216.0, 8.0
    bottom = height - 22
    values = [value for _, value in readings]
    told = (
        f"From {values[0]:.3g} to {values[-1]:.3g} in {readings[-1][0] + 1:,} of {iterations:,} iterations; "
        f"lowest {min(values):.3g}."
    )
    svg = Svg(width, height, key, f"Loss of block {name}", told)
    low, high = math.log10(min(values)), math.log10(max(values))
    across = _Scale(0, max(iterations - 1, readings[-1][0]), left, right)
    up = _Scale(low, high if high > low else low + 1, bottom - 4, top + 4)
    for value in sorted({min(values), max(values)}):
        svg.line(left, up(math.log10(value)), right, up(math.log10(value)), "grid")
        svg.text(left - 6, up(math.log10(value)) + 4, number(value, 2), "tick", "end")
    svg.line(left, bottom, right, bottom, "axis")
    svg.text(left, height - 6, "1", "tick")
    svg.text((left + right) / 2, height - 6, "iteration", "tick", "middle")
    svg.text(right, height - 6, f"{iterations:,}", "tick", "end")
    svg.path([(across(i), up(math.log10(value))) for i, value in readings], "curve")
    return svg.finish()


def activation_plot(seen: Distribution, name: str, key: str) -> Markup:
    """A histogram of what a layer is given, with the edges of its codes; below it the border's shift, if it has one."""
    width = _FULL.width
    left, right, top = 58.0, width - 16, 26.0
    middle = top + 120
    bottom = middle + (126 if seen.shift else 0)
    histogram, counts = seen.histogram, seen.histogram.counts
    total = sum(counts) + histogram.below + histogram.above + histogram.zeros
    told = (
        f"{histogram.zeros / total:.1%} of the inputs are zero; codes stand for {seen.low:.4g} to {seen.high:.4g}, "
        f"{(histogram.below + histogram.above) / total:.2%} of the inputs lie beyond the plot."
    )
    svg = Svg(width, bottom + 40, key, f"Activations of {name}", told)
    across = _Scale(histogram.low, histogram.high, left, right)
    svg.box(across(seen.low), top, across(seen.high) - across(seen.low), bottom - top, "range")
    highest = math.sqrt(max(*counts, 1))
    step = (right - left) / len(counts)
    for index, count in enumerate(counts):
        tall = (middle - top) * math.sqrt(count) / highest
        svg.box(left + step * index, middle - tall, step * 0.92, tall, "bar")
    svg.line(left, middle, right, middle, "axis")
    svg.text(left - 8, top + 10, f"{max(counts):,}", "tick", "end")
    svg.text(left - 8, middle, "0", "tick", "end")
    ends = seen.edges
    for edge in ends:
        svg.line(across(edge), top - 2, across(edge), bottom, "edge")
    if ends:
        centres = [seen.low, *((first + second) / 2 for first, second in itertools.pairwise(ends)), seen.high]
        for code, centre in enumerate(centres):
            svg.text(across(centre), top - 8, str(code), "code", "middle")
    if seen.shift is not None:
        _draw_shift(svg, seen, across, middle + 14, bottom)
    ticks = [tick for tick in _ticks(histogram.low, histogram.high, 8) if histogram.low <= tick <= histogram.high]
    for tick in ticks:
        svg.line(across(tick), bottom, across(tick), bottom + 4, "axis")
        svg.text(across(tick), bottom + 17, signed(tick, "g"), "tick", "middle")
    svg.text((left + right) / 2, bottom + 34, "activation", "tick", "middle")
    return svg.finish()


def _draw_shift(svg: Svg, seen: Distribution, across: _Scale, top: float, bottom: float) -> None:
    """Mean of B - 1/2 over the activation, within a band of one standard deviation."""
    assert seen.shift is not None
    up = _Scale(-0.5, 0.5, bottom, top)
    for tick in (-0.5, 0.0, 0.5):
        svg.line(across.start, up(tick), across.end, up(tick), "axis" if tick in (-0.5, 0.0) else "grid")
        svg.text(across.start - 8, up(tick) + 4, signed(tick, "+.1f") if tick else "0", "tick", "end")
    bins = len(seen.shift.mean)
    known = [
        (across(seen.low + (seen.high - seen.low) * (index + 0.5) / bins), mean, std)
        for index, (mean, std) in enumerate(zip(seen.shift.mean, seen.shift.std, strict=True))
        if mean is not None and std is not None
    ]
    upper = [(x, up(min(mean + std, 0.5))) for x, mean, std in known]
    lower = [(x, up(max(mean - std, -0.5))) for x, mean, std in known]
    svg.path([*upper, *reversed(lower)], "band", closed=True)
    svg.path([(x, up(mean)) for x, mean, _ in known], "curve")


def _for_both(draw: Callable[[Shape, str], Markup], wide: Shape, key: str) -> Markup:
    """A drawing for wide pages and one for slim ones, of which the style sheet shows one."""
    return Markup('<div class="wide">{}</div><div class="slim">{}</div>').format(
        draw(wide, key), draw(_SLIM, f"{key}-slim")
    )


def _ticks_between(left: float, right: float) -> int:
    """About how many ticks there is room for."""
    return max(3, round((right - left) / 60))


def shortened(name: str, at_most: int) -> str:
    """A name that fits beside a plot: what is left out is its middle."""
    return name if len(name) <= at_most else f"{name[: at_most // 2 - 1]}…{name[-(at_most // 2) :]}"


@dataclass(frozen=True)
class _Scale:
    """From values to coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        extent = self.high - self.low or 1.0
        return self.start + (self.end - self.start) * (value - self.low) / extent


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers, evenly spaced, the first at or below ``low`` and the last at or above ``high``."""
    rough = max(high - low, 1e-12) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(step * index, 12) for index in range(math.floor(low / step), math.ceil(high / step - 1e-9) + 1)]


def _whisker(svg: Svg, low: float, high: float, y: float) -> None:
    svg.line(low, y, high, y, "whisker")
    for end in (low, high):
        svg.line(end, y - 4, end, y + 4, "whisker")


def _at(value: float) -> str:
    """A coordinate, to a tenth of a unit."""
    return f"{value:.1f}".removesuffix(".0")

"""Plots say what they are of, for pages of every width."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from aquant_core.report.plots import Bar, accuracy_bars, difference_plot, loss_plot
from aquant_core.report.schema import LossCurve


def words(plot: ElementTree.Element) -> list[str | None]:
    return [text.text for text in plot.iter("text")]


@pytest.mark.parametrize(("last", "end"), [(99, 216.0), (49, 52 + 164 * 49 / 99)])
def test_a_loss_curve_lies_where_it_is_among_all_iterations(last: int, end: float) -> None:
    """Also while its block is under way: it ends where the block is, and the axis where the block will."""
    curve = LossCurve(iterations=[9, last], values=[2.0, 1.0])
    drawn = loss_plot(curve, 100, "stem", "loss")
    assert drawn is not None
    plot = ElementTree.fromstring(drawn)
    line = next(plot.iter("polyline")).attrib["points"].split()
    across = [float(point.split(",")[0]) for point in line]
    assert across == pytest.approx([52 + 164 * 9 / 99, end], abs=0.06)
    assert words(plot)[-3:] == ["1", "iteration", "100"]
    assert f"in {last + 1} of 100 iterations" in (plot.findtext("desc") or "")


def test_of_one_reading_there_is_no_curve() -> None:
    assert loss_plot(LossCurve(iterations=[0], values=[1.0]), 100, "stem", "loss") is None


@pytest.mark.parametrize("draw", [accuracy_bars, difference_plot])
def test_plots_of_rows_are_drawn_for_wide_and_for_slim_pages(draw: Callable[[list[Bar], str, str], Markup]) -> None:
    bars = [Bar("layer3.0.downsample.conv", 0.5, [0.25, 0.75]), Bar("fc", 0.25, [0.125, 0.5])]
    drawn = draw(bars, "What it is", "bars")
    both = ElementTree.fromstring(f"<both>{drawn}</both>")
    assert [part.get("class") for part in both] == ["wide", "slim"]
    wide, slim = (part[0] for part in both)
    assert words(wide)[-2:] == words(slim)[-2:]  # the last name and its value
    assert "layer3.0.downsample.conv" in words(wide)
    assert "layer3.…ple.conv" in words(slim)
    assert wide.findtext("desc") == slim.findtext("desc")
    assert float(slim.attrib["viewBox"].split()[2]) == 336

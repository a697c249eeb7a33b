"""The report, or a dry run's plan, in a few lines for a terminal; it needs neither torch nor Jinja2."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from aquant_core.report import formats
from aquant_core.report.advice import MEASURES, Advice, advice_of
from aquant_core.report.naming import heading
from aquant_core.report.plan import Plan
from aquant_core.report.schema import Difference, Report, SensitiveLayer

FIRST_LAYERS = 5
"""So many of the layers that hurt most are named."""


def summary(document: Mapping[str, Any]) -> list[str]:
    """What a person wants to know of a report, or of a plan: lines of text.

    Raises:
        pydantic.ValidationError: it is neither.
    """
    if document.get("dry_run"):
        plan = Plan.model_validate(document)
        title = f"{heading(plan)}: what it would take (a dry run: nothing is quantized)"
        return _printable([title, "", *_planned(plan), *_cautions("Before you start it:", plan.cautions)])
    report = Report.model_validate(document)
    return _printable(
        [
            heading(report),
            "",
            *_methods(report),
            "",
            *_facts(report),
            *_cautions("Before you rely on this:", report.warnings),
            *_sensitivity(report),
        ]
    )


def ending(document: Mapping[str, Any]) -> list[str]:
    """What the end of a run is to tell: how accurate it is, what became of a target, which layer to raise first.

    Raises:
        pydantic.ValidationError: it is neither a report nor a plan.
    """
    if document.get("dry_run"):
        return _printable(_planned(Plan.model_validate(document)))
    report = Report.model_validate(document)
    if report.accuracy is not None:
        accuracies = {name: getattr(report.accuracy, name) for name in ("float", "nearest", "quantized")}
        lines = [
            f"{name:<10} {_percent(each.top1)} of {each.n:,} (95 %: {_interval(each.interval)})"
            for name, each in accuracies.items()
        ]
    else:
        lines = [
            f"{name:<10} decides as the float network on {_percent(each.agreement)} of {each.n:,}"
            for name, each in (("nearest", report.fidelity.nearest), ("quantized", report.fidelity.quantized))
        ]
    advice = advice_of(report)
    return _printable([*lines, *_target(report), *([] if advice is None else [f"{'advice':<10} {_said(advice)}"])])


def _methods(report: Report) -> list[str]:
    """The table of accuracies; without labels, of agreements."""
    rows = report.measured()
    to_float = {each.method: each for each in report.differences if each.baseline == "float"}
    if report.accuracy is None:
        cells = [
            [formats.method(name), _percent(each.agreement), _interval(each.interval)]
            for name, _, each in rows
            if each is not None
        ]
        return _table(["", "agrees with float", "95 %"], cells)
    cells = [
        [
            formats.method(name),
            _percent(None if each is None else each.top1),
            _interval(None if each is None else each.interval),
            *_difference(to_float.get(name)),
        ]
        for name, each, _ in rows
    ]
    return _table(["", "top-1", "95 %", "less float, points", "95 %, paired"], cells)


def _difference(each: Difference | None) -> tuple[str, str]:
    return ("", "") if each is None else (_points(each.top1), _signed_interval(each.interval))


def _facts(report: Report) -> Iterator[str]:
    size, table = report.size, report.accuracy
    n = report.fidelity.quantized.n if table is None else table.quantized.n
    yield f"{'images':<10} {n:,} to measure on" + (", without labels" if table is None else "")
    yield _size(size.float_bytes, size.quantized_bytes)
    peak = "" if report.peak_bytes is None else f", peak memory {_plain(formats.in_bytes(report.peak_bytes))}"
    where = "" if report.device is None else f" on {report.device}"
    yield f"{'time':<10} {_plain(formats.duration(report.seconds))}{where}{peak}"
    yield from _target(report)


def _target(report: Report) -> Iterator[str]:
    """What became of a target."""
    target = report.target
    if target is not None:
        bits = target.candidates[target.chosen].mean_weight_bits
        held = "holds" if target.held else "does not hold, nor did any network tried: this is the best of them"
        yield (
            f"{'target':<10} {target.max_accuracy_drop:g} points lost at most: {target.drop:.2f} "
            f"with {bits:.2f} bits a weight {held}"
        )


def _sensitivity(report: Report) -> Iterator[str]:
    advice = advice_of(report)
    if report.sensitivity is None or advice is None:
        return
    layers = report.sensitivity.layers
    yield ""
    yield f"Which layers hurt most: points of {MEASURES[report.sensitivity.metric]} gained by raising one"
    yield from _table(
        ["layer", "bits", "raised to", "gain", "95 %", "costs"],
        [
            [each.layer, _widths(each.bits), _widths(each.raised_bits), _points(each.gain), *_gained(each)]
            for each in layers[:FIRST_LAYERS]
        ],
    )
    if len(layers) > FIRST_LAYERS:
        yield f"and {len(layers) - FIRST_LAYERS} more"
    yield _said(advice)


def _gained(each: SensitiveLayer) -> tuple[str, str]:
    return _signed_interval(each.interval), _plain(formats.in_bytes(each.cost_bytes))


def _said(advice: Advice) -> str:
    """In a line, with what to type."""
    if advice.layer is None:
        return f"{advice.headline}: {advice.words}"
    gain = f"{_points(advice.layer.gain)} points (95 %: {_signed_interval(advice.layer.interval)})"
    option = shlex.join(["--config", json.dumps({"layers": advice.layers})])
    words = f" ({advice.words})" if advice.words else ""
    return f"{advice.headline}, about {gain}{words}: run it again with {option}"


def _planned(plan: Plan) -> Iterator[str]:
    if plan.forecast is None:
        yield f"{'time':<10} nothing is learned: little more than measuring takes"
    else:
        learning = _plain(formats.duration(plan.forecast["seconds"]))
        yield f"{'time':<10} about {learning} of learning; reading and measuring not counted"
        yield f"{'memory':<10} up to {_plain(formats.in_bytes(plan.forecast['peak_bytes']))}{_standing(plan)}"
    yield _size(plan.size.float_bytes, plan.size.quantized_bytes)
    others = f", {len(plan.other_bits)} of them at other bits than asked for" if plan.other_bits else ""
    yield f"{'layers':<10} {len(plan.layers)}{others}"
    yield f"{'device':<10} {plan.device}"


def _standing(plan: Plan) -> str:
    budget, limit = (_plain(formats.in_bytes(each)) for each in (plan.budget_bytes, plan.limit_bytes))
    words = {
        "within": f", within the {budget} that it may fill here",
        "on_disk": f", within the {budget} that it may fill here, with what is beyond them on disk",
        "beyond_budget": f", more than the {budget} that it is to fill here",
        "beyond_limit": f", beyond the {limit} above which a run is stopped here",
    }
    return "" if plan.standing is None else words[plan.standing]


def _size(of_float: int, of_quantized: int) -> str:
    smaller = f"{of_float / of_quantized:.1f} times smaller"
    sizes = " to ".join(_plain(formats.in_bytes(size)) for size in (of_float, of_quantized))
    return f"{'size':<10} {sizes}, {smaller}"


def _cautions(title: str, warnings: Sequence[str]) -> list[str]:
    return ["", title, *(f"- {warning}" for warning in warnings)] if warnings else []


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be, the first to the left."""
    lines = [head, *rows]
    first, *wide = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["  ".join([name.ljust(first), *map(str.rjust, cells, wide)]).rstrip() for name, *cells in lines]


def _widths(bits: Sequence[int]) -> str:
    return f"W{formats.bits(bits[0])}A{formats.bits(bits[1])}"


def _percent(fraction: float | None) -> str:
    return _plain(formats.percent(fraction))


def _points(fraction: float | None) -> str:
    return _plain(formats.points(fraction))


def _interval(of: Sequence[float] | None) -> str:
    return "" if of is None else f"{100 * of[0]:.2f} to {100 * of[1]:.2f}"


def _signed_interval(of: Sequence[float]) -> str:
    return f"{_points(of[0])} to {_points(of[1])}"


def _plain(number: str) -> str:
    """A number as terminals and programs that search take it."""
    return number.translate({ord(formats.MINUS): "-", ord(formats.MISSING): "-", ord(formats.SPACE): " "})


def _printable(lines: Iterable[str]) -> list[str]:
    """Names come from files: nothing in them moves the cursor."""
    return [
        "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in line)
        for line in lines
    ]

"""The report, or a dry run's plan, as one self-contained HTML page: from its JSON alone, so old ones are shown, too.

It stands in the core and not in the service because a run without a service ends in the same page; it needs Jinja2
and no torch, and the service may import it.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from aquant_core.report import plots
from aquant_core.report.advice import advice_of
from aquant_core.report.commands import Sources, repeat
from aquant_core.report.formats import FILTERS, method
from aquant_core.report.naming import heading
from aquant_core.report.plan import Plan
from aquant_core.report.plots import Bar, SqnrRow
from aquant_core.report.schema import Difference, Layer, Report, Value


def render(report: Mapping[str, Any], origin: str = "") -> str:
    """The page of a report, which is the JSON document of a finished run of this version or an older one.

    That of a dry run is a plan, and has a page of its own.

    Args:
        report: the document.
        origin: a sentence on where it comes from, which the document does not know.

    Raises:
        pydantic.ValidationError: it is not such a document.
    """
    if report.get("dry_run"):
        return _render_plan(Plan.model_validate(report), origin)
    document = Report.model_validate(report)
    methods = _methods(document)
    return _page(
        "report.html",
        report=document,
        title=heading(document),
        origin=origin,
        advice=advice_of(document),
        methods=methods,
        figures=_figures(document, methods),
        distributions=_distributions(document),
    )


def _render_plan(plan: Plan, origin: str) -> str:
    return _page(
        "plan.html",
        plan=plan,
        title=heading(plan),
        origin=origin,
        methods=[method(name) for name in dict.fromkeys((plan.method, *plan.config.compare))],
        start=repeat(plan.config.model_copy(update={"dry_run": False}), Sources()),
    )


def _page(template: str, **values: Any) -> str:
    look = {"style": _text("report.css"), "script": _text("report.js"), "policy": content_policy()}
    return _environment().get_template(template).render(**look, **values)


@cache
def content_policy() -> str:
    """Content-Security-Policy of the page: its own style and script by their digests, and nothing from anywhere."""
    style, script = (f"'sha256-{_digest(_text(name))}'" for name in ("report.css", "report.js"))
    return f"default-src 'none'; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__, ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment


def _methods(report: Report) -> list[dict[str, Any]]:
    """Float, to nearest, those compared with the chosen method, and it: what each is worth."""
    to_float = {each.method: each for each in report.differences if each.baseline == "float"}
    return [
        {
            "method": name,
            "accuracy": accuracy,
            "fidelity": fidelity,
            "chosen": name == report.method,
            "to_float": to_float.get(name),
        }
        for name, accuracy, fidelity in report.measured()
    ]


def _figures(report: Report, methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The plots that stand once on the page, the loss curves, and which layer is shown first."""
    gains = [Bar(method(each.baseline), each.top1, each.interval) for each in _of_the_chosen(report)]
    sqnr = [SqnrRow(each.name, each.sqnr_db) for each in report.layers if each.sqnr_db is not None]
    rows = [row for row in sqnr if row.marks()]
    curves = [
        (block, plots.loss_plot(block.loss, block.iterations, block.name, f"loss-{index}"))
        for index, block in enumerate(report.blocks)
    ]
    raised = [] if report.sensitivity is None else report.sensitivity.layers
    hurt = [Bar(each.layer, each.gain, each.interval) for each in raised]
    title = f"{method(report.method)} less each of the others"
    return {
        "accuracy": _accuracy_bars(report, methods),
        "differences": plots.difference_plot(gains, title, "differences") if gains else None,
        "sqnr": plots.sqnr_plot(rows, "sqnr") if rows else None,
        "losses": [(block, curve) for block, curve in curves if curve is not None],
        "sensitivity": plots.difference_plot(hurt, "Gain by raising a layer's bits", "gains") if hurt else None,
        "shown": min(rows, key=SqnrRow.badness).name if rows else None,
    }


def _of_the_chosen(report: Report) -> list[Difference]:
    return [each for each in report.differences if each.method == report.method]


def _accuracy_bars(report: Report, methods: Sequence[Mapping[str, Any]]) -> Markup:
    """Top-1, or without labels the share of decisions that are the float network's."""
    bars = []
    for row in methods:
        kind = "chosen" if row["chosen"] else ""
        if row["accuracy"] is not None:
            bars.append(Bar(method(row["method"]), row["accuracy"].top1, row["accuracy"].interval, kind))
        elif row["fidelity"] is not None:
            agreement = row["fidelity"].agreement
            bars.append(Bar(method(row["method"]), agreement, row["fidelity"].interval or [agreement] * 2, kind))
    what = "Top-1 accuracy" if report.accuracy else "Agreement with the float network"
    return plots.accuracy_bars(bars, what, "bars")


def _distributions(report: Report) -> list[tuple[Layer | Value, Markup]]:
    """Quantizers with a plot of what they are given."""
    parts: list[Layer | Value] = [*report.layers, *report.values]
    return [
        (part, plots.activation_plot(part.distribution, part.name, f"activations-{index}"))
        for index, part in enumerate(parts)
        if part.distribution is not None
    ]

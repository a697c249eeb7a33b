"""The page that the ``type`` of every problem leads to, served by the service itself so that it is there offline."""

from __future__ import annotations

import re
from html import escape

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.api.problems import responses
from service.jobs.problem_kinds import KINDS, PAGE, Kind, title_of

router = APIRouter(tags=["documentation"])

_STYLE = (
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:48rem;margin:2rem auto;padding:0 1rem}"
    "section:target{outline:2px solid;outline-offset:.5rem}code{font-size:.95em}"
)


@router.get(PAGE, response_class=HTMLResponse, responses=responses())
def error_page() -> str:
    """Cause and remedy of every kind of problem, each under its code."""
    sections = "".join(_section(code, kind) for code, kind in KINDS.items())
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>AQuant service: errors</title>'
        f"<style>{_STYLE}</style><h1>Errors</h1>{sections}</html>"
    )


def where(kind: Kind) -> str:
    """Where a kind of problem is met, in words."""
    answer = "" if kind.status is None else f"HTTP {kind.status}"
    return " and ".join(filter(None, (answer, "the error of a failed job" if kind.in_job else "")))


def _section(code: str, kind: Kind) -> str:
    return (
        f'<section id="{code}"><h2>{title_of(code)}</h2><p><code>{code}</code>: {where(kind)}.</p>'
        f"<p>{_text(kind.cause)}</p><p><b>What to do.</b> {_text(kind.remedy)}</p></section>"
    )


def _text(markdown: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(markdown))

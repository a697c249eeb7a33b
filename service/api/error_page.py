"""The page that the ``type`` of every problem leads to, served by the service itself so that it is there offline."""

from __future__ import annotations

import re
from html import escape

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from markupsafe import Markup

from service.api.page_route import HEADERS
from service.api.problems import responses
from service.jobs.problem_kinds import KINDS, PAGE, Kind, title_of
from service.pages.render import render

router = APIRouter(tags=["documentation"])


@router.get(PAGE, response_class=HTMLResponse, responses=responses())
def error_page() -> HTMLResponse:
    """Cause and remedy of every kind of problem, each under its code."""
    kinds = [
        {
            "code": code,
            "title": title_of(code),
            "where": where(kind),
            "cause": _text(kind.cause),
            "remedy": _text(kind.remedy),
        }
        for code, kind in KINDS.items()
    ]
    return HTMLResponse(render("errors.html", kinds=kinds), headers=HEADERS)


def where(kind: Kind) -> str:
    """Where a kind of problem is met, in words."""
    answer = "" if kind.status is None else f"HTTP {kind.status}"
    places = (answer, "the error of a failed job" if kind.in_job else "")
    return " and ".join(filter(None, places)) or "an exception of the library"


def _text(markdown: str) -> Markup:
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(markdown)))

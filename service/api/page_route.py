"""How the routes of the page answer: with headers that keep other sites out, and with problems in words."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import urlencode

from fastapi import Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute

from service.api.locality import SAFE_METHODS
from service.api.problems import answer_to
from service.jobs.errors import KeyInvalidError, KeyMissingError
from service.jobs.schemas import Problem
from service.pages.render import render

SIGN_IN = "/page/sign-in"
SUBMIT = "/page/jobs"
"""Where the form of a submission is sent."""

# No inline script and no inline style: what an upload smuggles into a page is text, and stays text.
CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: with it a browser calls the origin of the page's own forms "null".
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A page shows an owner's jobs; who comes after the sign-out does not find it under the back button.
    "Cache-Control": "no-store",
}


class PageRoute(APIRoute):
    """A route whose errors are pages, too; who has to sign in is sent to where that can be done."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, with what goes wrong in it caught."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                response = await handle(request)
            except (KeyMissingError, KeyInvalidError) as error:
                response = _to_sign_in(request) if request.method in SAFE_METHODS else await in_words(request, error)
            except Exception as error:
                response = await in_words(request, error)
            for name, value in HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        return answer


def _to_sign_in(request: Request) -> Response:
    here = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"{SIGN_IN}?{urlencode({'next': here})}", 303)


async def in_words(request: Request, error: Exception, template: str = "problem.html", **values: Any) -> Response:
    """The page that tells of an error; its status and headers are those of the problem document."""
    answer = await answer_to(request, error)
    if not answer.body:
        return answer
    problem = Problem.model_validate_json(bytes(answer.body))
    sent = (request.method, request.url.path) == ("POST", SUBMIT)
    kept = {name: answer.headers[name] for name in ("retry-after", "www-authenticate") if name in answer.headers}
    return HTMLResponse(render(template, problem=problem, sent=sent, **values), answer.status_code, kept)

"""Every error as an RFC 9457 problem document: the service's own, the framework's, and the unforeseen."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Match

from service.artifacts import ArtifactsDownError
from service.jobs.database import DATABASE_DOWN
from service.jobs.errors import ServiceError
from service.jobs.problem_kinds import KINDS, address_of, title_of
from service.jobs.schemas import Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

_RETRY = {"Retry-After": "5"}
"""When to ask again while a part of the service does not answer."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_LATER = "Try again later; if it stays, tell the operator: the server's log has the reason."

FRAMEWORK = {
    404: ("not_found", "See /docs for the paths there are."),
    405: ("method_not_allowed", "See the Allow header, or /docs."),
    413: ("body_too_large", "Send a smaller body."),
    415: ("content_type_unsupported", "See /docs for the content type of this call."),
}
"""Code and remedy of what the framework refuses by itself."""

REFUSALS = (
    "key_missing",
    "key_invalid",
    "key_scope_insufficient",
    "keys_required",
    "host_refused",
    "origin_refused",
    "rate_limited",
)
"""What every call but the public ones may be answered with (``service.api.auth``)."""


def responses(*codes: str) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's entries for the problems that a call may answer with: one for each status, an example for each code."""
    found: dict[int | str, dict[str, Any]] = {}
    for code in sorted({*codes, "internal_error"}):
        kind = KINDS[code]
        assert kind.status is not None, f"{code} is met in jobs alone"
        entry = found.setdefault(
            kind.status,
            {
                "description": "",
                "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}},
            },
        )
        entry["description"] = ", ".join(filter(None, (entry["description"], f"`{code}`")))
        example = _document(code, kind.status, kind.cause, kind.remedy)
        entry["content"][MEDIA_TYPE]["examples"][code] = {"value": example.model_dump(mode="json")}
    return found


def problem(code: str, detail: str, remedy: str, headers: Mapping[str, str] | None = None, **members: Any) -> Response:
    """A problem as a response; ``members`` are extension members of the document."""
    status = KINDS[code].status
    assert status is not None, f"{code} is met in jobs alone"
    return _respond(_document(code, status, detail, remedy, **members), headers)


def _document(code: str, status: int, detail: str, remedy: str, **members: Any) -> Problem:
    return Problem(
        type=address_of(code),
        title=title_of(code),
        status=status,
        code=code,
        detail=detail,
        remedy=remedy,
        **members,
    )


def _respond(document: Problem, headers: Mapping[str, str] | None) -> Response:
    return Response(document.model_dump_json(), document.status or 500, headers, MEDIA_TYPE)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    _note(request, error.code, error.detail)
    return problem(error.code, error.detail, error.remedy, error.headers, **error.members)


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{' '.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
    detail = f"{'; '.join(faults)}."
    _note(request, "request_invalid", detail)
    return problem("request_invalid", detail, "See /docs for the parameters of this call.")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, remedy = FRAMEWORK.get(error.status_code, ("http_error", "See /docs."))
    detail = f"{request.method} {request.url.path}: {error.detail}."
    _note(request, code, detail)
    headers = dict(error.headers or {})
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = ", ".join(sorted(_methods(request)))
    return _respond(_document(code, error.status_code, detail, remedy), headers)


def _methods(request: Request) -> set[str]:
    """The methods of all routes of this path; the framework tells those of the first alone."""
    found: set[str] = set()
    for method in METHODS:
        for route in request.app.router.routes:
            match, _ = route.matches({**request.scope, "method": method})
            if match == Match.FULL:
                found.add(method)
    return found


async def _database_down(request: Request, error: Exception) -> Response:
    log.warning("%s %s: %s", request.method, request.url.path, error)
    return problem("database_unavailable", "The service's database does not answer.", _LATER, _RETRY)


async def _artifacts_down(request: Request, error: Exception) -> Response:
    log.warning("%s %s: %s", request.method, request.url.path, error)
    return problem("artifacts_unavailable", "The store of the service's files does not answer.", _LATER, _RETRY)


async def _disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


def unforeseen(request: Request, error: Exception) -> Response:
    """The answer to a request that failed for a reason nobody thought of."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(
        "internal_error",
        "The service met an error it did not expect.",
        "Try again; if it stays, report it with this answer's X-Request-ID: the server's log has the details.",
    )


def _note(request: Request, code: str, detail: str) -> None:
    log.info("%s %s is answered with %s: %s", request.method, request.url.path, code, detail)


_ANSWERS: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    ServiceError: _service_error,
    RequestValidationError: _invalid_request,
    HTTPException: _http_error,
    **dict.fromkeys(DATABASE_DOWN, _database_down),
    ArtifactsDownError: _artifacts_down,
    ClientDisconnect: _disconnected,
}


def install(app: FastAPI) -> None:
    """Make the application answer with problems; those of unforeseen errors are ``requests.EveryRequest``'s."""
    for kind, answer in _ANSWERS.items():
        app.add_exception_handler(kind, answer)


async def answer_to(request: Request, error: Exception) -> Response:
    """The problem that an error is answered with, for routes that show it in another form."""
    for kind in type(error).__mro__:
        if kind in _ANSWERS:
            return await _ANSWERS[kind](request, error)
    return unforeseen(request, error)

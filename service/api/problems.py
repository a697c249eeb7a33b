"""Every error as an RFC 9457 problem document: the service's own, the framework's, and the unforeseen."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from service.artifacts import ArtifactsDownError
from service.jobs.database import DATABASE_DOWN
from service.jobs.errors import ServiceError
from service.jobs.schemas import Problem

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"

RETRY_SECONDS = "5"
"""When to ask again while a part of the service does not answer."""

STATUS = {
    "job_not_found": HTTPStatus.NOT_FOUND,
    "job_state_conflict": HTTPStatus.CONFLICT,
    "artifact_not_ready": HTTPStatus.CONFLICT,
    "onnx_export_unsupported": HTTPStatus.CONFLICT,
    "cursor_invalid": HTTPStatus.UNPROCESSABLE_ENTITY,
    "form_invalid": HTTPStatus.BAD_REQUEST,
    "content_type_unsupported": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "upload_too_large": HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    "upload_empty": HTTPStatus.UNPROCESSABLE_ENTITY,
    "config_invalid": HTTPStatus.UNPROCESSABLE_ENTITY,
    "model_format_unsupported": HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    "model_invalid": HTTPStatus.UNPROCESSABLE_ENTITY,
    "architecture_missing": HTTPStatus.UNPROCESSABLE_ENTITY,
    "images_invalid": HTTPStatus.UNPROCESSABLE_ENTITY,
    "preprocess_missing": HTTPStatus.UNPROCESSABLE_ENTITY,
    "preprocess_unused": HTTPStatus.UNPROCESSABLE_ENTITY,
    "dry_run_has_no_checkpoint": HTTPStatus.NOT_FOUND,
    "range_not_satisfiable": HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
    "key_missing": HTTPStatus.UNAUTHORIZED,
    "key_invalid": HTTPStatus.UNAUTHORIZED,
    "key_scope_insufficient": HTTPStatus.FORBIDDEN,
    "keys_required": HTTPStatus.FORBIDDEN,
    "host_refused": HTTPStatus.FORBIDDEN,
    "origin_refused": HTTPStatus.FORBIDDEN,
    "rate_limited": HTTPStatus.TOO_MANY_REQUESTS,
    "job_quota_exceeded": HTTPStatus.TOO_MANY_REQUESTS,
    "storage_quota_exceeded": HTTPStatus.FORBIDDEN,
}
"""HTTP status of each of the service's error codes."""

REMEDIES = {
    404: ("not_found", "See /docs for the paths there are."),
    405: ("method_not_allowed", "See the Allow header, or /docs."),
    413: ("body_too_large", "Send a smaller body."),
    415: ("content_type_unsupported", "See /docs for the content type of this call."),
}

RESPONSE: dict[str, Any] = {
    "description": "A problem document",
    "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
"""OpenAPI's entry for a problem."""


def problem(
    status: int, code: str, detail: str, remedy: str, headers: dict[str, str] | None = None, **members: Any
) -> Response:
    """A problem as a response; ``members`` are extension members of the document."""
    document = Problem(
        title=HTTPStatus(status).phrase, status=status, code=code, detail=detail, remedy=remedy, **members
    )
    return Response(document.model_dump_json(), status, headers, MEDIA_TYPE)


async def _service_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    _note(request, error.code, error.detail)
    return problem(STATUS[error.code], error.code, error.detail, error.remedy, dict(error.headers), **error.members)


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    faults = [f"{' '.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()]
    detail = f"{'; '.join(faults)}."
    _note(request, "request_invalid", detail)
    return problem(422, "request_invalid", detail, "See /docs for the parameters of this call.")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code, remedy = REMEDIES.get(error.status_code, ("http_error", "See /docs."))
    detail = f"{request.method} {request.url.path}: {error.detail}."
    _note(request, code, detail)
    return problem(error.status_code, code, detail, remedy, dict(error.headers or {}))


async def _database_down(request: Request, error: Exception) -> Response:
    return _unavailable(request, error, "database_unavailable", "The service's database does not answer.")


async def _artifacts_down(request: Request, error: Exception) -> Response:
    return _unavailable(request, error, "artifacts_unavailable", "The store of the service's files does not answer.")


def _unavailable(request: Request, error: Exception, code: str, detail: str) -> Response:
    log.warning("%s %s: %s", request.method, request.url.path, error)
    remedy = "Try again later; if it stays, tell the operator: the server's log has the reason."
    return problem(503, code, detail, remedy, {"Retry-After": RETRY_SECONDS})


async def _disconnected(_request: Request, _error: Exception) -> Response:
    return Response(status_code=400)  # nobody is there to read it


def unforeseen(request: Request, error: Exception) -> Response:
    """The answer to a request that failed for a reason nobody thought of."""
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return problem(
        500,
        "internal_error",
        "The service met an error it did not expect.",
        "Try again; if it stays, report it with this answer's X-Request-ID: the server's log has the details.",
    )


def _note(request: Request, code: str, detail: str) -> None:
    log.info("%s %s is answered with %s: %s", request.method, request.url.path, code, detail)


def install(app: FastAPI) -> None:
    """Make the application answer with problems; those of unforeseen errors are ``requests.EveryRequest``'s."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _invalid_request)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in DATABASE_DOWN:
        app.add_exception_handler(kind, _database_down)
    app.add_exception_handler(ArtifactsDownError, _artifacts_down)
    app.add_exception_handler(ClientDisconnect, _disconnected)

"""The endpoints of a finished job's files: report, checkpoint and ONNX, the latter two in ranges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from aquant_core.report.plan import Plan
from aquant_core.report.schema import Report
from service.api.auth import Owner, OwnerDep
from service.api.conditions import (
    NOT_MODIFIED,
    IfNoneMatch,
    RangeNotSatisfiableError,
    byte_range,
    described,
    entity_tag,
    is_current,
    repr_digest,
)
from service.api.deps import Parts, PartsDep
from service.api.problems import REFUSALS, problem, responses
from service.api.report_pages import page_of, prefers_page
from service.jobs.errors import ArtifactNotReadyError, DryRunError, OnnxUnavailableError
from service.jobs.records import ONNX_PROBLEM
from service.jobs.schemas import Problem
from service.jobs.states import JobState

router = APIRouter(
    tags=["results"],
    responses=responses(
        *REFUSALS,
        "job_not_found",
        "artifact_not_ready",
        "request_invalid",
        "database_unavailable",
        "artifacts_unavailable",
    ),
)

_HEADERS = described(
    ETag="The sha256 of the whole file, in hex and quotes.",
    Repr_Digest="The same as RFC 9530 writes it.",
)
_RANGED = {**_HEADERS, **described(Accept_Ranges="bytes", Content_Disposition="A name to keep it under.")}
RangeHeader = Annotated[
    str | None, Header(alias="Range", description="One range of bytes; where several are asked for, all is sent.")
]
IfRangeHeader = Annotated[
    str | None, Header(alias="If-Range", description="The range only if this entity tag is current; else all.")
]
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@dataclass(frozen=True)
class _File:
    key: str
    size: int
    sha256: str
    origin: str

    @property
    def etag(self) -> str:
        return entity_tag(self.sha256)

    @property
    def headers(self) -> dict[str, str]:
        return {"ETag": self.etag, "Repr-Digest": repr_digest(self.sha256), "Cache-Control": "no-cache"}


@router.get(
    "/jobs/{job_id}/report",
    response_model=Report | Plan,
    responses={
        200: {
            "description": "The report",
            "content": {"text/html": {"schema": {"type": "string"}}},
            "headers": {**_HEADERS, **described(Vary="Accept")},
        },
        **NOT_MODIFIED,
    },
)
async def report(
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    accept: Annotated[str | None, Header(alias="Accept", description="text/html for a page, else JSON.")] = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The accuracy report of a job that succeeded: JSON or, by Accept, one self-contained HTML page.

    That of a dry run is its plan.
    """
    file = await run_in_threadpool(_find, owner, job_id, "report")
    if prefers_page(accept):
        body = await run_in_threadpool(parts.artifacts.get_bytes, file.key)
        page = await run_in_threadpool(page_of, body, file.origin, if_none_match)
        if page is not None:
            return page
    headers = {**file.headers, "Vary": "Accept"}
    if is_current(if_none_match, file.etag):
        return Response(status_code=304, headers=headers)
    body = await run_in_threadpool(parts.artifacts.get_bytes, file.key)
    return Response(body, media_type="application/json", headers=headers)


def _file_responses(what: str) -> dict[int | str, dict[str, Any]]:
    return {
        200: {"description": f"The whole {what}", "content": _BINARY, "headers": _RANGED},
        206: {
            "description": "The range asked for",
            "content": _BINARY,
            "headers": {**_RANGED, **described(Content_Range="Where the range lies in the file.")},
        },
        **NOT_MODIFIED,
        **responses("range_not_satisfiable", "job_not_found", "dry_run_has_no_checkpoint"),
    }


@router.get(
    "/jobs/{job_id}/checkpoint", response_class=StreamingResponse, responses=_file_responses("quantized checkpoint")
)
async def checkpoint(
    request: Request,
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    range: RangeHeader = None,
    if_range: IfRangeHeader = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The quantized checkpoint of a job that succeeded (safetensors); its ETag is the sha256 of its bytes."""
    file = await run_in_threadpool(_find, owner, job_id, "checkpoint")
    return await _deliver(request, parts, file, f"aquant-{job_id}.safetensors", range, if_range, if_none_match)


_ONNX_PROBLEMS = responses("artifact_not_ready", "onnx_export_unsupported")


@router.get(
    "/jobs/{job_id}/onnx",
    response_class=StreamingResponse,
    responses={**_file_responses("quantized network"), **_ONNX_PROBLEMS},
)
async def onnx(
    request: Request,
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    range: RangeHeader = None,
    if_range: IfRangeHeader = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """The quantized network as ONNX with standard operators; 409 says why where it cannot be written so."""
    file = await run_in_threadpool(_find_onnx, parts, owner, job_id)
    return await _deliver(request, parts, file, f"aquant-{job_id}.onnx", range, if_range, if_none_match)


# Routes of their own for HEAD, each with its own id in the OpenAPI document.
_HEAD = {
    200: {"description": "The headers of GET", "headers": _RANGED},
    **NOT_MODIFIED,
    **responses("job_not_found", "dry_run_has_no_checkpoint"),
}
router.head("/jobs/{job_id}/checkpoint", name="checkpoint_head", response_class=Response, responses=_HEAD)(checkpoint)
router.head("/jobs/{job_id}/onnx", name="onnx_head", response_class=Response, responses={**_HEAD, **_ONNX_PROBLEMS})(
    onnx
)


async def _deliver(
    request: Request,
    parts: Parts,
    file: _File,
    name: str,
    range: str | None,
    if_range: str | None,
    if_none_match: str | None,
) -> Response:
    """A file, or the range of it that is asked for, to be kept under a name."""
    headers = {
        **file.headers,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    if is_current(if_none_match, file.etag):
        return Response(status_code=304, headers=headers)
    # A range is a matter of GET alone (RFC 9110, 14.2).
    wanted = range if request.method == "GET" and if_range in (None, file.etag) else None
    try:
        part = byte_range(wanted, file.size)
    except RangeNotSatisfiableError:
        return problem(
            "range_not_satisfiable",
            f"The range {range!r} lies outside the file's {file.size} bytes.",
            "Ask for a range that begins inside the file.",
            {"Content-Range": f"bytes */{file.size}"},
        )
    start, stop = part or (0, file.size)
    headers["Content-Length"] = str(stop - start)
    if part is not None:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    if request.method == "HEAD":
        return Response(headers=headers, media_type="application/octet-stream")
    body = await parts.artifacts.stream(file.key, start, stop)
    return StreamingResponse(body, 200 if part is None else 206, headers, "application/octet-stream")


_REMEDY = {
    JobState.FAILED: "It never will; the job's error says why.",
    JobState.CANCELLED: "It never will; submit it again.",
}


def _find(owner: Owner, job_id: str, name: str) -> _File:
    with owner.jobs() as jobs:
        job = jobs.get(job_id)
        artifact = job.artifact(name)
        if artifact is None and name != "report" and job.config.get("dry_run"):
            raise DryRunError(
                f"Job {job_id} is a dry run, which has no {name}.", "Read its report; submit it again without dry_run."
            )
        if artifact is None:
            raise ArtifactNotReadyError(
                f"Job {job_id} is {job.state} and has no {name}.",
                _REMEDY.get(job.state, "Ask again once it has succeeded."),
            )
        ended = "" if job.finished_at is None else f", finished {job.finished_at:%Y-%m-%d %H:%M} UTC"
        return _File(artifact.key, artifact.size, artifact.sha256, f"Job {job_id}{ended}.")


def _find_onnx(parts: Parts, owner: Owner, job_id: str) -> _File:
    """The file; where there can be none, the reason that the worker left."""
    with owner.jobs() as jobs:
        reason = jobs.get(job_id).artifact(ONNX_PROBLEM)
    if reason is None:
        return _find(owner, job_id, "onnx")
    found = Problem.model_validate_json(parts.artifacts.get_bytes(reason.key))
    raise OnnxUnavailableError(found.detail, found.remedy)

"""The endpoints of a finished job's files: report, checkpoint and ONNX, the latter two in ranges."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from aquant_core.report.plan import Plan
from aquant_core.report.schema import Report
from service.api.auth import Owner, OwnerDep
from service.api.deps import Parts, PartsDep
from service.api.problems import RESPONSE, problem
from service.api.report_pages import page_of, prefers_page
from service.jobs.errors import ArtifactNotReadyError, DryRunError, OnnxUnavailableError
from service.jobs.records import ONNX_PROBLEM
from service.jobs.schemas import Problem
from service.jobs.states import JobState

router = APIRouter(tags=["results"], responses={"4XX": RESPONSE, 422: RESPONSE, 503: RESPONSE})

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class _File:
    key: str
    size: int
    etag: str


@router.get("/jobs/{job_id}/report", response_model=Report | Plan, responses={200: {"content": {"text/html": {}}}})
async def report(
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    accept: Annotated[str | None, Header(description="text/html for a page, else JSON.")] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """The accuracy report of a job that succeeded: JSON or, by Accept, one self-contained HTML page.

    That of a dry run is its plan, and JSON alone.
    """
    file = await run_in_threadpool(_find, owner, job_id, "report")
    if prefers_page(accept):
        body = await run_in_threadpool(parts.artifacts.get_bytes, file.key)
        page = await run_in_threadpool(page_of, body, if_none_match)
        if page is not None:
            return page
    headers = {"ETag": file.etag, "Vary": "Accept"}
    if if_none_match is not None and file.etag in if_none_match:
        return Response(status_code=304, headers=headers)
    body = await run_in_threadpool(parts.artifacts.get_bytes, file.key)
    return Response(body, media_type="application/json", headers=headers)


_FILE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {}}, "description": "The whole file"},
    206: {"content": {"application/octet-stream": {}}, "description": "The range asked for"},
}
_Range = Annotated[str | None, Header(description="One range of bytes.")]
_Condition = Annotated[str | None, Header()]


@router.head("/jobs/{job_id}/checkpoint", include_in_schema=False)
@router.get("/jobs/{job_id}/checkpoint", responses=_FILE_RESPONSES)
async def checkpoint(
    request: Request,
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    range: _Range = None,
    if_range: _Condition = None,
    if_none_match: _Condition = None,
) -> Response:
    """The quantized checkpoint of a job that succeeded; its ETag is the sha256 of its bytes."""
    file = await run_in_threadpool(_find, owner, job_id, "checkpoint")
    return await _deliver(request, parts, file, f"aquant-{job_id}.safetensors", range, if_range, if_none_match)


@router.head("/jobs/{job_id}/onnx", include_in_schema=False)
@router.get("/jobs/{job_id}/onnx", responses=_FILE_RESPONSES)
async def onnx(
    request: Request,
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    range: _Range = None,
    if_range: _Condition = None,
    if_none_match: _Condition = None,
) -> Response:
    """The quantized network as ONNX with standard operators; 409 says why where it cannot be written so."""
    file = await run_in_threadpool(_find_onnx, parts, owner, job_id)
    return await _deliver(request, parts, file, f"aquant-{job_id}.onnx", range, if_range, if_none_match)


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
        "ETag": file.etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    if if_none_match is not None and file.etag in if_none_match:
        return Response(status_code=304, headers=headers)
    start, stop, status = 0, file.size, 200
    match = _RANGE.fullmatch(range.strip()) if range is not None else None
    # A Range that cannot be read, or asks for several pieces, may be ignored (RFC 9110, 14.2).
    if match and match.group(0) != "bytes=-" and if_range in (None, file.etag):
        first, last = match.groups()
        if first:
            start, stop = int(first), min(file.size, int(last) + 1 if last else file.size)
        else:
            start = max(0, file.size - int(last))
        if start >= stop:
            return problem(
                416,
                "range_not_satisfiable",
                f"The range {range!r} lies outside the file's {file.size} bytes.",
                "Ask for a range that begins inside the file.",
                {"Content-Range": f"bytes */{file.size}"},
            )
        status = 206
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    headers["Content-Length"] = str(stop - start)
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type="application/octet-stream")
    body = await parts.artifacts.stream(file.key, start, stop)
    return StreamingResponse(body, status, headers, "application/octet-stream")


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
        return _File(artifact.key, artifact.size, f'"{artifact.sha256}"')


def _find_onnx(parts: Parts, owner: Owner, job_id: str) -> _File:
    """The file; where there can be none, the reason that the worker left."""
    with owner.jobs() as jobs:
        reason = jobs.get(job_id).artifact(ONNX_PROBLEM)
    if reason is None:
        return _find(owner, job_id, "onnx")
    found = Problem.model_validate_json(parts.artifacts.get_bytes(reason.key))
    raise OnnxUnavailableError(found.detail, found.remedy)

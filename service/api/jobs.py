"""The endpoints of jobs: submit, list, follow, cancel, delete."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from service.api.auth import Owner, OwnerDep
from service.api.conditions import NOT_MODIFIED, IfNoneMatch, described, entity_tag, is_current
from service.api.deps import PartsDep
from service.api.documents import describe
from service.api.openapi import SUBMISSION
from service.api.problems import REFUSALS, responses
from service.api.submitting import JobFields, take_in
from service.artifacts import blocks_prefix, job_prefix
from service.jobs.schemas import JobDocument, JobPage
from service.jobs.states import JobState

router = APIRouter(tags=["jobs"], responses=responses(*REFUSALS, "request_invalid", "database_unavailable"))

MAX_WAIT_SECONDS = 20.0
RETRY_AFTER = {"Retry-After": "1"}

_LOCATION = described(Location="The job's address.", Retry_After="Seconds after which to ask how it stands.")


@router.post(
    "/jobs",
    status_code=202,
    responses={
        200: {
            "description": "`reuse` was asked for, and this job has done the same",
            "model": JobDocument,
            "headers": described(Location="The job's address."),
        },
        202: {
            "description": "The job is queued",
            "headers": {
                **_LOCATION,
                **described(Idempotency_Replayed="?1 where the job came of an earlier request with the same key."),
            },
        },
        **responses(
            "form_invalid", "content_type_unsupported", "model_format_unsupported", "upload_too_large", "upload_empty",
            "config_invalid", "model_invalid", "architecture_missing", "images_invalid", "upload_missing",
            "job_file_missing", "preprocess_missing", "preprocess_unused",
            "idempotency_key_reused", "idempotent_job_deleted", "webhook_refused", "request_invalid",
            "job_quota_exceeded", "storage_quota_exceeded", "database_unavailable", "artifacts_unavailable", *REFUSALS,
        ),
    },
    openapi_extra=SUBMISSION,
)  # fmt: skip
async def submit(
    request: Request,
    response: Response,
    parts: PartsDep,
    owner: OwnerDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            max_length=255,
            pattern="^[!-~]+$",
            description="Whatever names this request: sent again with the same key, it is answered with the same job.",
            examples=["4b1a5b3e-6d0c-4c0e-9c55-1d7b0a4b8f10"],
        ),
    ] = None,
) -> JobDocument:
    """Send a model and calibration images to be quantized, as a form with files or as JSON that names uploads."""
    submitted = await take_in(request, parts, owner, JobFields(parts.settings), idempotency_key)
    document = await run_in_threadpool(load, owner, submitted.job_id)
    response.headers["Location"] = document.links.self
    if submitted.outcome == "reused":
        response.status_code = 200
    else:
        response.headers.update(RETRY_AFTER)
    if submitted.outcome == "replayed":
        response.headers["Idempotency-Replayed"] = "?1"
    return document


@router.get(
    "/jobs",
    responses={
        200: {
            "description": "A page of jobs",
            "headers": described(Link='`<...>; rel="next"`: the next page; absent on the last.'),
        },
        **responses("cursor_invalid", "request_invalid"),
    },
)
def list_jobs(
    request: Request,
    response: Response,
    owner: OwnerDep,
    limit: Annotated[int, Query(ge=1, le=100, description="Most jobs on a page.")] = 20,
    cursor: Annotated[str | None, Query(max_length=200, description="From the `next` link of a page.")] = None,
    state: Annotated[JobState | None, Query(description="Only jobs in this state.")] = None,
) -> JobPage:
    """List jobs, newest first."""
    with owner.jobs() as repository:
        page = repository.page(limit, cursor, state)
        workers = repository.devices()
        jobs = [describe(job, repository.queue_position(job), workers) for job in page.jobs]
    following = None
    if page.cursor is not None:
        url = request.url.include_query_params(limit=limit, cursor=page.cursor)
        following = f"{url.path}?{url.query}"
        response.headers["Link"] = f'<{following}>; rel="next"'
    return JobPage(jobs=jobs, next=following)


@router.get(
    "/jobs/{job_id}",
    response_model=JobDocument,
    responses={
        200: {
            "description": "The job as it stands",
            "headers": described(ETag="Changes with the document.", Retry_After="While it has not ended."),
        },
        **NOT_MODIFIED,
        **responses("job_not_found", "request_invalid"),
    },
)
async def show(
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    if_none_match: IfNoneMatch = None,
    wait: Annotated[
        float,
        Query(
            ge=0,
            le=MAX_WAIT_SECONDS,
            description="Answer only when the job differs from If-None-Match or, without it, has finished; "
            "or after this many seconds.",
        ),
    ] = 0,
) -> Response:
    """Tell where a job stands."""
    deadline = time.monotonic() + wait
    with parts.watch.on(job_id) if wait else contextlib.nullcontext(asyncio.Event()) as changed:
        while True:
            changed.clear()
            document = await run_in_threadpool(load, owner, job_id)
            body = document.model_dump_json().encode()
            tag = entity_tag(hashlib.sha256(body).hexdigest()[:32])
            unchanged = is_current(if_none_match, tag)
            settled = document.finished or (if_none_match is not None and not unchanged)
            left = deadline - time.monotonic()
            if settled or left <= 0:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), left)
    headers = {"ETag": tag, "Cache-Control": "no-cache", **({} if document.finished else RETRY_AFTER)}
    if unchanged:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.post(
    "/jobs/{job_id}/cancel",
    status_code=202,
    responses=responses("job_not_found", "job_state_conflict", "request_invalid"),
)
def cancel(parts: PartsDep, owner: OwnerDep, job_id: str) -> JobDocument:
    """Stop a job: a queued one at once, a running one at its next step."""
    with owner.jobs() as jobs:
        document = describe(jobs.cancel(job_id))
    if document.finished:  # it was between two attempts: no worker will clear up
        parts.artifacts.discard(blocks_prefix(job_id))
    return document


@router.delete(
    "/jobs/{job_id}", status_code=204, responses=responses("job_not_found", "job_state_conflict", "request_invalid")
)
def delete(parts: PartsDep, owner: OwnerDep, job_id: str) -> None:
    """Remove a job and its files; one that is running must be cancelled first (409)."""
    with owner.jobs() as jobs:
        jobs.delete(job_id)
    parts.artifacts.discard(job_prefix(job_id))  # what stays is the reaper's


def load(owner: Owner, job_id: str) -> JobDocument:
    with owner.jobs() as jobs:
        job = jobs.get(job_id)
        return describe(job, jobs.queue_position(job), jobs.devices())

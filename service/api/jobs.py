"""The endpoints of jobs: submit, list, follow, cancel, delete."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from aquant_core.config import QuantizationConfig
from service.api.auth import Owner, OwnerDep
from service.api.conditions import NOT_MODIFIED, IfNoneMatch, described, entity_tag, is_current
from service.api.deps import Parts, PartsDep
from service.api.documents import describe
from service.api.forms import REMEDY, FormStream, Part
from service.api.openapi import SUBMISSION
from service.api.problems import REFUSALS, responses
from service.artifacts import ArtifactsDownError, Stored, blocks_prefix, job_prefix
from service.jobs.errors import FormError, ServiceError, UploadTooLargeError
from service.jobs.owners import Room, check_queued
from service.jobs.schemas import JobDocument, JobPage, JobRequest, WebhookRequest
from service.jobs.states import Device, JobState
from service.jobs.submission import (
    UPLOADS,
    Submission,
    Submitted,
    UploadName,
    faults_of,
    new_job_id,
    read_config,
    read_device,
)
from service.logs import about

router = APIRouter(tags=["jobs"], responses=responses(*REFUSALS, "request_invalid", "database_unavailable"))

MAX_WAIT_SECONDS = 20.0
MAX_FIELD_BYTES = 4096
RETRY_AFTER = {"Retry-After": "1"}

_REFERENCE = re.compile(r"sha256:([0-9a-f]{64})")
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
    job_id = new_job_id()
    content_type = request.headers.get("content-type")
    form: FormStream | None = None
    submitted: Submitted | None = None
    try:
        if content_type is not None and content_type.partition(";")[0].strip().lower() == "application/json":
            submission = await _read_json(job_id, request, owner, idempotency_key, parts.settings.max_config_bytes)
        else:
            form = FormStream(request.stream(), content_type)
            room = await run_in_threadpool(_room, owner, idempotency_key)
            submission = await _receive(job_id, form, owner, idempotency_key, parts, room)
        with about(job_id=job_id):
            submitted = await run_in_threadpool(parts.submitter.submit, submission)
    except (ServiceError, ArtifactsDownError):
        if form is not None:
            await form.drain()
        raise
    finally:
        if submitted is None or submitted.job_id != job_id:
            # Whatever went wrong, a lost connection included: nothing of it stays in the store.
            await asyncio.shield(run_in_threadpool(parts.artifacts.discard, job_prefix(job_id)))
    document = await run_in_threadpool(_load, owner, submitted.job_id)
    response.headers["Location"] = document.links.self
    if submitted.outcome == "reused":
        response.status_code = 200
    else:
        response.headers.update(RETRY_AFTER)
    if submitted.outcome == "replayed":
        response.headers["Idempotency-Replayed"] = "?1"
    return document


def _room(owner: Owner, key: str | None) -> Room:
    """What the owner may send: known before anything is stored, and decided when the row is put in."""
    with owner.account() as account:
        limits, usage = account.limits(), account.usage()
    if key is not None and owner.has_used(key):  # what is sent will not be kept: the job is there
        return Room(limits, None)
    check_queued(limits, usage)
    return Room(limits, usage)


async def _read_json(job_id: str, request: Request, owner: Owner, key: str | None, limit: int) -> Submission:
    """A body that names files uploaded before."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise UploadTooLargeError(
                f"The JSON body is larger than the {limit} bytes this service takes.", "Send files as uploads."
            )
    try:
        asked = JobRequest.model_validate_json(body)
    except ValidationError as error:
        raise FormError(
            f"The body is no job: {faults_of(error)}.", "See JobRequest in /docs; files are named as sha256:DIGEST."
        ) from error
    named = {"model": asked.model, "calibration": asked.calibration, "evaluation": asked.evaluation}
    references = {name: _read_reference(name, named[name] or "") for name in UPLOADS if named[name] is not None}
    return Submission(job_id, owner.name, asked.config, asked.device, {}, references, asked.reuse, asked.webhook, key)


async def _receive(
    job_id: str, form: FormStream, owner: Owner, key: str | None, parts: Parts, room: Room
) -> Submission:
    """Stream the form's files to the store; the config is checked as soon as it is there."""
    config: QuantizationConfig | None = None
    device: Device | None = None
    files: dict[UploadName, Stored] = {}
    references: dict[UploadName, str] = {}
    reuse, webhook = False, None
    seen: set[str] = set()
    async for part in form.parts():
        if part.name in seen:
            raise FormError(f"The form has `{part.name}` twice.", REMEDY)
        seen.add(part.name)
        name = next((name for name in UPLOADS if name == part.name), None)
        if name is not None and part.is_file:
            chunks = room.admit(part.chunks(room.limits.upload_bytes))
            files[name] = await parts.artifacts.put_stream(job_prefix(job_id) + name, chunks)
        elif name is not None:
            references[name] = _read_reference(name, await _text(part))
        elif part.name == "config":
            config = read_config(await part.content(parts.settings.max_config_bytes))
        elif part.name == "device":
            device = read_device(await part.content(MAX_FIELD_BYTES))
        elif part.name == "reuse":
            reuse = _read_flag(await _text(part))
        elif part.name == "webhook":
            webhook = _read_webhook(await _text(part))
        else:
            raise FormError(f"The form has a part {part.name!r}, which means nothing here.", REMEDY)
    return Submission(job_id, owner.name, config, device, files, references, reuse, webhook, key)


async def _text(part: Part) -> str:
    return (await part.content(MAX_FIELD_BYTES)).decode("utf-8", "replace").strip()


def _read_reference(name: str, text: str) -> str:
    match = _REFERENCE.fullmatch(text)
    if match is None:
        raise FormError(
            f"`{name}` is neither a file nor an upload's name: {text[:80]!r}.",
            "Send it as a part with a file name, or name an upload as sha256: and its digest in hex.",
        )
    return match.group(1)


def _read_flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise FormError(f"`reuse` is {text[:80]!r}.", "Say true or false, or leave it out.")
    return text == "true"


def _read_webhook(text: str) -> WebhookRequest:
    try:
        return WebhookRequest.model_validate_json(text)
    except ValidationError as error:
        raise FormError(
            f"The field `webhook` is not valid: {faults_of(error)}.",
            'Send {"url": "https://...", "secret": "whsec_..."}.',
        ) from error


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
            document = await run_in_threadpool(_load, owner, job_id)
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


def _load(owner: Owner, job_id: str) -> JobDocument:
    with owner.jobs() as jobs:
        job = jobs.get(job_id)
        return describe(job, jobs.queue_position(job), jobs.devices())

"""The endpoints of jobs: submit, list, follow, cancel, delete."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from aquant_core.config import QuantizationConfig
from service.api.auth import Owner, OwnerDep
from service.api.deps import Parts, PartsDep
from service.api.documents import describe
from service.api.problems import RESPONSE
from service.api.uploads import REMEDY, FormStream
from service.artifacts import ArtifactsDownError, Stored, blocks_prefix, job_prefix
from service.jobs.errors import FormError, ServiceError
from service.jobs.owners import Room, check_queued
from service.jobs.schemas import JobDocument, JobPage
from service.jobs.states import Device, JobState
from service.jobs.submission import UPLOADS, Submission, UploadName, new_job_id, read_config, read_device
from service.logs import about

router = APIRouter(tags=["jobs"], responses={"4XX": RESPONSE, 422: RESPONSE, 503: RESPONSE})

POLL_SECONDS = 0.25
MAX_WAIT_SECONDS = 20.0
MAX_DEVICE_BYTES = 100
DRAIN_BYTES = 32 * 1024 * 1024
RETRY_AFTER = {"Retry-After": "1"}

_FILE = {"type": "string", "contentMediaType": "application/octet-stream"}
_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["model", "calibration", "config"],
                    "properties": {
                        "model": {
                            **_FILE,
                            "description": "ONNX, or a safetensors or .pth state dict.",
                        },
                        "calibration": {
                            **_FILE,
                            "description": "Images: .npz (`images`, `labels`), .npy, safetensors; or a zip or tar of "
                            "image files, with `preprocess`.",
                        },
                        "evaluation": {**_FILE, "description": "Labelled images to measure accuracy on."},
                        "device": {
                            "type": "string",
                            "enum": list(get_args(Device)),
                            "description": "What it is to run on; without it whichever is free first.",
                        },
                        "config": {"$ref": "#/components/schemas/QuantizationConfig"},
                    },
                },
                "encoding": {"config": {"contentType": "application/json"}},
            }
        },
    }
}


@router.post("/jobs", status_code=202, openapi_extra=_FORM)
async def submit(request: Request, response: Response, parts: PartsDep, owner: OwnerDep) -> JobDocument:
    """Send a model and calibration images to be quantized."""
    job_id = new_job_id()
    form = FormStream(request.stream(), request.headers.get("content-type"))
    try:
        room = await run_in_threadpool(_room, owner)
        submission = await _receive(job_id, form, parts, owner, room)
        with about(job_id=job_id):
            await run_in_threadpool(parts.submitter.submit, submission)
    except BaseException as error:
        # Whatever went wrong, a lost connection included: nothing of it stays in the store.
        await asyncio.shield(run_in_threadpool(parts.artifacts.discard, job_prefix(job_id)))
        if isinstance(error, ServiceError | ArtifactsDownError):
            await form.drain(DRAIN_BYTES)
        raise
    document = await run_in_threadpool(_load, owner, job_id)
    response.headers.update({"Location": document.links.self, **RETRY_AFTER})
    return document


def _room(owner: Owner) -> Room:
    """What the owner may send: known before anything is stored, and decided when the row is put in."""
    with owner.account() as account:
        limits, usage = account.limits(), account.usage()
    check_queued(limits, usage)
    return Room(limits, usage)


async def _receive(job_id: str, form: FormStream, parts: Parts, owner: Owner, room: Room) -> Submission:
    """Stream the form's files to the store; the config is checked as soon as it is there."""
    config: QuantizationConfig | None = None
    device: Device | None = None
    uploads: dict[UploadName, Stored] = {}
    seen: set[str] = set()
    async for part in form.parts():
        if part.name in seen:
            raise FormError(f"The form has `{part.name}` twice.", REMEDY)
        seen.add(part.name)
        name = next((name for name in UPLOADS if name == part.name), None)
        if name is not None:
            chunks = room.admit(part.chunks(room.limits.upload_bytes))
            uploads[name] = await parts.artifacts.put_stream(job_prefix(job_id) + name, chunks)
        elif part.name == "config":
            limit = parts.settings.max_config_bytes
            config = read_config(b"".join([chunk async for chunk in part.chunks(limit)]))
        elif part.name == "device":
            device = read_device(b"".join([chunk async for chunk in part.chunks(MAX_DEVICE_BYTES)]))
        else:
            raise FormError(f"The form has a part {part.name!r}, which means nothing here.", REMEDY)
    return Submission(job_id, owner.name, config, device, uploads)


@router.get("/jobs")
def list_jobs(
    request: Request,
    owner: OwnerDep,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
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
    return JobPage(jobs=jobs, next=following)


@router.get("/jobs/{job_id}", response_model=JobDocument, responses={304: {"description": "Unchanged"}})
async def show(
    owner: OwnerDep,
    job_id: str,
    if_none_match: Annotated[str | None, Header()] = None,
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
    while True:
        document = await run_in_threadpool(_load, owner, job_id)
        body = document.model_dump_json().encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        unchanged = if_none_match is not None and tag in if_none_match
        settled = document.finished or (if_none_match is not None and not unchanged)
        if settled or time.monotonic() >= deadline:
            break
        await asyncio.sleep(POLL_SECONDS)
    headers = {"ETag": tag, "Cache-Control": "no-cache", **({} if document.finished else RETRY_AFTER)}
    if unchanged:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


@router.post("/jobs/{job_id}/cancel", status_code=202)
def cancel(parts: PartsDep, owner: OwnerDep, job_id: str) -> JobDocument:
    """Stop a job: a queued one at once, a running one at its next step."""
    with owner.jobs() as jobs:
        document = describe(jobs.cancel(job_id))
    if document.finished:  # it was between two attempts: no worker will clear up
        parts.artifacts.discard(blocks_prefix(job_id))
    return document


@router.delete("/jobs/{job_id}", status_code=204)
def delete(parts: PartsDep, owner: OwnerDep, job_id: str) -> None:
    """Remove a job and its files; one that is running must be cancelled first (409)."""
    with owner.jobs() as jobs:
        jobs.delete(job_id)
    parts.artifacts.discard(job_prefix(job_id))  # what stays is the reaper's


def _load(owner: Owner, job_id: str) -> JobDocument:
    with owner.jobs() as jobs:
        job = jobs.get(job_id)
        return describe(job, jobs.queue_position(job), jobs.devices())

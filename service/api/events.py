"""The event stream of a job: everything that happened to it, in order, and its progress as it goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event

from service.api.auth import Owner, OwnerDep
from service.api.deps import PartsDep
from service.api.documents import progress_of
from service.api.openapi import EVENT
from service.api.problems import REFUSALS, responses
from service.api.watching import JobWatch
from service.jobs.database import DATABASE_DOWN
from service.jobs.errors import JobNotFoundError
from service.jobs.events import is_last
from service.jobs.records import EventRecord
from service.jobs.schemas import JobEvent, JobProgress
from service.jobs.states import FINISHED

router = APIRouter(tags=["jobs"])

HEARTBEAT_SECONDS = 15.0
RETRY_MILLISECONDS = 1000
AT_A_TIME = 500

_EXAMPLE = """retry: 1000

event: state
data: {"at":"2026-01-31T12:00:00Z","attempt":0,"state":"queued","stage":null,"error":null}
id: 1

event: state
data: {"at":"2026-01-31T12:00:05Z","attempt":1,"state":"running","stage":"intake","error":null}
id: 2

event: progress
data: {"method":"aquant","block":1,"blocks":5,"iteration":40,"iterations":300,"loss":0.021,"eta_seconds":61.0}

event: block
data: {"at":"2026-01-31T12:00:20Z","attempt":1,"method":"aquant","block":1,"blocks":5,"loss":0.008}
id: 3
"""


@dataclass(frozen=True)
class _News:
    events: Sequence[EventRecord]
    progress: JobProgress
    ended: bool


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,  # FastAPI takes its own for that of a generator
    responses={
        200: {
            "description": "Events with an `id`: `state`, `stage` (data: `stage`) and `block` (a block that is "
            "finished, with its last `loss`), each with `at` and `attempt`. Without one: `progress` (JobProgress), "
            "and `deleted` when the job is. The stream ends with the `state` that a job never leaves.",
            "content": {"text/event-stream": {"schema": EVENT, "example": _EXAMPLE}},
        },
        204: {"description": "The job has ended and the client knows: nothing will come, do not connect again"},
        **responses(*REFUSALS, "job_not_found", "request_invalid", "database_unavailable"),
    },
)
async def events(
    parts: PartsDep,
    owner: OwnerDep,
    job_id: str,
    last_event_id: Annotated[
        int | None,
        Header(
            alias="Last-Event-ID",
            ge=0,
            le=2**31 - 1,
            description="The last `id` that was received; what came after it is sent first.",
        ),
    ] = None,
) -> Response:
    """Follow a job by server-sent events."""
    number = last_event_id or 0
    news = await run_in_threadpool(_read, owner, job_id, number)
    if news.ended and not news.events:
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return EventSourceResponse(_stream(parts.watch, owner, job_id, number), headers=headers)


async def _stream(watch: JobWatch, owner: Owner, job_id: str, number: int) -> AsyncIterator[bytes]:
    yield format_sse_event(retry=RETRY_MILLISECONDS)
    shown = JobProgress()
    with watch.on(job_id) as changed:
        while True:
            changed.clear()
            try:
                news = await run_in_threadpool(_read, owner, job_id, number)
            except JobNotFoundError:
                yield format_sse_event(event="deleted", data_str="{}")
                return
            except DATABASE_DOWN:
                return  # the client connects again, and is told then
            for event in news.events:
                number = event.number
                yield format_sse_event(event=event.kind, data_str=_data(event), id=str(number))
                if is_last(event):
                    return
            if len(news.events) == AT_A_TIME:
                continue
            if news.progress != shown:
                shown = news.progress
                yield format_sse_event(event="progress", data_str=shown.model_dump_json())
            while not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
                except TimeoutError:
                    yield KEEPALIVE_COMMENT


def _read(owner: Owner, job_id: str, number: int) -> _News:
    with owner.jobs() as jobs:
        job, events = jobs.events_after(job_id, number, AT_A_TIME)
        return _News(events, progress_of(job), job.state in FINISHED)


def _data(event: EventRecord) -> str:
    data: dict[str, Any] = {"at": event.at, **event.data}
    return JobEvent.model_validate(data).model_dump_json(exclude_unset=True)

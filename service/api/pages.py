"""The page: submit, the queue, a job as it goes, its results, and two of them compared.

Every route is the owner's whom the page's cookie names (``VisitorDep``). What the API does as well is done by its
functions; only who asks is found out otherwise, and the answer is a page.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Literal, TypeVar, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, RedirectResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from aquant_core.config import FLOAT_BITS, PresetName
from aquant_core.report.advice import advice_of
from aquant_core.report.formats import method
from aquant_core.report.plan import Plan
from aquant_core.report.plots import Bar, accuracy_bars
from aquant_core.report.schema import Report
from service.api import events, jobs, results
from service.api.auth import Owner, VisitorDep
from service.api.conditions import IfNoneMatch
from service.api.deps import Parts, PartsDep
from service.api.documents import describe
from service.api.page_fields import PageFields
from service.api.page_route import CONTENT_POLICY, SUBMIT, PageRoute
from service.api.submitting import take_in
from service.artifacts import Artifacts
from service.jobs.errors import ArtifactNotReadyError, FormError
from service.jobs.records import JobRecord
from service.jobs.schemas import JobDocument
from service.jobs.states import Device, JobState
from service.pages import form, progress
from service.pages.candidates import Candidate
from service.pages.comparison import compare
from service.pages.form import Draft
from service.pages.render import STATIC, render, static_file, static_url, title_of

router = APIRouter(include_in_schema=False, route_class=PageRoute)

ON_A_PAGE = 25
MOST_EVENTS = 5000
MOST_HURTING = 3
"""Layers that a job's page offers to raise; the report has them all."""

Document = TypeVar("Document", Report, Plan)


@router.get("/page/static/{digest}/{name}")
def static(digest: str, name: str) -> Response:
    """A file that pages load; its address has its digest, so it can be kept for good."""
    if name not in STATIC or static_url(name) != f"/page/static/{digest}/{name}":
        raise HTTPException(404)
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(static_file(name), headers=headers, media_type=STATIC[name][1])


@router.get("/docs")
def docs() -> Response:
    """Swagger UI on /openapi.json, for everybody like that; its style has icons in it."""
    policy = CONTENT_POLICY.replace("img-src 'self'", "img-src 'self' data:")
    return HTMLResponse(render("docs.html"), headers={"Content-Security-Policy": policy})


@router.get("/")
def index(
    parts: PartsDep,
    visitor: VisitorDep,
    cursor: Annotated[str | None, Query(max_length=200)] = None,
    state: Annotated[JobState | None, Query()] = None,
    again: Annotated[str | None, Query(max_length=50)] = None,
    layer: Annotated[str | None, Query(max_length=1000)] = None,
) -> Response:
    """The form and the queue; the form with the files and settings of a job ``again``, and a ``layer`` of it raised."""
    draft = Draft() if again is None else _draft(parts, visitor, again, layer)
    with visitor.jobs() as repository:
        page = repository.page(ON_A_PAGE, cursor, state)
        workers = repository.devices()
        listed = [describe(job, repository.queue_position(job), workers) for job in page.jobs]
    following = None
    if page.cursor is not None:
        asked = {"cursor": page.cursor, **({} if state is None else {"state": str(state)})}
        following = f"/?{urlencode(asked)}"
    return _page(
        "index.html",
        visitor,
        draft=draft,
        jobs=listed,
        following=following,
        first=cursor is None,
        state=state,
        widths=[*range(2, 9), FLOAT_BITS],
        presets=get_args(PresetName),
        devices=get_args(Device),
        workers=workers,
        progress=progress,
        once=_once(),
        unfinished=any(not job.finished for job in listed),
    )


@router.post(SUBMIT)
async def submit(
    request: Request,
    parts: PartsDep,
    visitor: VisitorDep,
    once: Annotated[str | None, Query(min_length=1, max_length=64)] = None,
) -> Response:
    """Queue what the form says, and go to where it can be followed.

    ``once`` names the form as it was shown: sent twice, by a browser that got no answer or by somebody who saw none,
    it makes one job. It stands in the form's address because it is needed before the fields are read.
    """
    submitted = await take_in(request, parts, visitor, PageFields(parts.settings), once)
    return RedirectResponse(_address(submitted.job_id), 303)


@router.get("/page/jobs/{job_id}")
async def show(parts: PartsDep, visitor: VisitorDep, job_id: str) -> Response:
    """Where a job stands, and what came of it."""
    job, finished, others = await run_in_threadpool(_load, parts, visitor, job_id)
    blocks, report, plan = progress.blocks_of(job, finished), None, None
    if job.state == JobState.SUCCEEDED and job.config.dry_run:
        plan = await run_in_threadpool(_read, Plan, parts, visitor, job_id)
    elif job.state == JobState.SUCCEEDED:
        report = await run_in_threadpool(_read, Report, parts, visitor, job_id)
    return _page(
        "job.html",
        visitor,
        job=job,
        progress=progress,
        blocks=blocks,
        under_way=next((row.name for row in blocks if row.state == "under way"), None),
        curve=progress.curve_of(job),
        report=report,
        plan=plan,
        plot=None if report is None else _accuracy_plot(report),
        advice=None if report is None else advice_of(report),
        most_hurting=MOST_HURTING,
        draft=form.again(job),
        planned=form.planned(job.config),
        once=_once(),
        others=others,
    )


@router.post("/page/jobs/{job_id}/cancel")
def cancel(
    parts: PartsDep,
    visitor: VisitorDep,
    job_id: str,
    listed: Annotated[JobState | Literal["all"] | None, Query()] = None,
) -> Response:
    """Stop a job, and go back to its page, or to the list that it was stopped from."""
    jobs.cancel(parts, visitor, job_id)
    if listed is None:
        return RedirectResponse(_address(job_id), 303)
    return RedirectResponse(f"/{'' if listed == 'all' else f'?state={listed}'}#jobs", 303)


@router.post("/page/jobs/{job_id}/delete")
def delete(parts: PartsDep, visitor: VisitorDep, job_id: str) -> Response:
    """Remove a job and its files."""
    jobs.delete(parts, visitor, job_id)
    return RedirectResponse("/", 303)


@router.get("/page/jobs/{job_id}/events")
async def follow(
    parts: PartsDep,
    visitor: VisitorDep,
    job_id: str,
    last_event_id: Annotated[int | None, Header(alias="Last-Event-ID", ge=0, le=2**31 - 1)] = None,
) -> Response:
    """The API's event stream, for the page's script, which cannot send a key."""
    return await events.events(parts, visitor, job_id, last_event_id)


@router.get("/page/jobs/{job_id}/report")
async def report(parts: PartsDep, visitor: VisitorDep, job_id: str, if_none_match: IfNoneMatch = None) -> Response:
    """The whole report."""
    return await results.report(parts, visitor, job_id, "text/html", if_none_match)


@router.get("/page/jobs/{job_id}/report.json")
async def report_json(parts: PartsDep, visitor: VisitorDep, job_id: str) -> Response:
    """The same to be kept."""
    response = await results.report(parts, visitor, job_id, "application/json", None)
    response.headers["Content-Disposition"] = f'attachment; filename="aquant-{job_id}.json"'
    return response


@router.get("/page/jobs/{job_id}/checkpoint")
async def checkpoint(
    request: Request,
    parts: PartsDep,
    visitor: VisitorDep,
    job_id: str,
    range: results.RangeHeader = None,
    if_range: results.IfRangeHeader = None,
) -> Response:
    """The quantized checkpoint."""
    return await results.checkpoint(request, parts, visitor, job_id, range, if_range, None)


@router.get("/page/jobs/{job_id}/onnx")
async def onnx(
    request: Request,
    parts: PartsDep,
    visitor: VisitorDep,
    job_id: str,
    range: results.RangeHeader = None,
    if_range: results.IfRangeHeader = None,
) -> Response:
    """The quantized network as ONNX, or why there is none."""
    return await results.onnx(request, parts, visitor, job_id, range, if_range, None)


@router.get("/page/compare")
def comparison(
    parts: PartsDep, visitor: VisitorDep, job: Annotated[list[str] | None, Query(max_length=50)] = None
) -> Response:
    """Two jobs that succeeded, side by side."""
    chosen = list(dict.fromkeys(job or []))
    if len(chosen) != 2:
        return _page("choose.html", visitor, 422, chosen=len(chosen))
    reports = []
    found_jobs = [jobs.load(visitor, job_id) for job_id in chosen]
    documents = sorted(found_jobs, key=lambda document: (document.created_at, document.id))  # B is what came of A
    for job_id in (document.id for document in documents):
        report = _read(Report, parts, visitor, job_id)
        if report is None:
            raise ArtifactNotReadyError(
                f"Job {job_id} has no report that can be compared.",
                "Choose a job that ran to its end with this version.",
            )
        reports.append(report)
    names = (f"A: {title_of(reports[0].config)}", f"B: {title_of(reports[1].config)}")
    found = compare(reports[0], reports[1], names)
    return _page("compare.html", visitor, jobs=documents, reports=reports, found=found)


def _page(template: str, visitor: Owner, status_code: int = 200, **values: object) -> Response:
    return HTMLResponse(render(template, owner=visitor.name, **values), status_code)


def _draft(parts: Parts, visitor: Owner, job_id: str, layer: str | None) -> Draft:
    """The form with an earlier job's files and settings, and what its report says of a layer."""
    job = jobs.load(visitor, job_id)
    if layer is None:
        return form.again(job)
    report = _read(Report, parts, visitor, job_id)
    layers = [] if report is None or report.sensitivity is None else report.sensitivity.layers
    raised = next((each for each in layers if each.layer == layer), None)
    if raised is None:
        raise FormError(
            f"The report of job {job_id} does not say what raising a layer {layer!r} would gain.",
            "Open the job and choose one of its layers, or name it under layers in the further settings.",
        )
    return form.again(job, raised, None if report is None else report.target)


def _once() -> str:
    """What a form is called, this time that it is shown."""
    return secrets.token_urlsafe(16)


def _address(job_id: str) -> str:
    return f"/page/jobs/{job_id}"


def _load(
    parts: Parts, visitor: Owner, job_id: str
) -> tuple[JobDocument, Sequence[progress.Happened], Sequence[Candidate]]:
    """A job, its finished blocks, and what it may be compared with."""
    with visitor.jobs() as repository:
        record, happened = repository.events_after(job_id, 0, MOST_EVENTS)
        job = describe(record, repository.queue_position(record), repository.devices())
        finished = [
            progress.Happened(event.data.get("method"), event.data["block"], event.data.get("loss"))
            for event in happened
            if event.kind == "block"
        ]
        others: list[JobRecord] = []
        origin = None
        if record.state == JobState.SUCCEEDED and not job.config.dry_run:
            origin = repository.run_before(record)
            succeeded = repository.page(ON_A_PAGE, None, JobState.SUCCEEDED).jobs
            others = [other for other in succeeded if other.id != job_id and not other.config.get("dry_run")]
            if origin is not None and origin.id not in {other.id for other in others}:
                others.append(origin)
    origin_id = None if origin is None else origin.id
    return (
        job,
        finished,
        [Candidate(describe(other), _top1(parts, other), other.id == origin_id) for other in others],
    )


def _top1(parts: Parts, job: JobRecord) -> float | None:
    artifact = job.artifact("report")
    return None if artifact is None else _top1_in(parts.artifacts, artifact.key, artifact.sha256)


@lru_cache(maxsize=1000)
def _top1_in(artifacts: Artifacts, key: str, _sha256: str) -> float | None:
    """The accuracy in a report, which is read once; None where it has none."""
    try:
        return float(json.loads(artifacts.get_bytes(key))["accuracy"]["quantized"]["top1"])
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return None


def _read(kind: type[Document], parts: Parts, visitor: Owner, job_id: str) -> Document | None:
    """A job's report, or a dry run's plan; None where this version cannot read it as such."""
    with visitor.jobs() as repository:
        artifact = repository.get(job_id).artifact("report")
    if artifact is None:
        raise ArtifactNotReadyError(f"Job {job_id} has no report.", "Compare jobs that have succeeded.")
    try:
        return kind.model_validate_json(parts.artifacts.get_bytes(artifact.key))
    except ValidationError:
        return None


def _accuracy_plot(report: Report) -> object:
    """Float, to nearest and the method asked for."""
    if report.accuracy is None:
        return None
    table = report.accuracy
    rows = (("float", table.float), ("nearest", table.nearest), (report.method, table.quantized))
    bars = [Bar(method(name), row.top1, row.interval, "chosen" if row is table.quantized else "") for name, row in rows]
    return accuracy_bars(bars, "Top-1 accuracy", "accuracy")

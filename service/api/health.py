"""Probes: is the process alive, and can it do its work."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from service.api.auth import TrustedDep
from service.api.deps import Parts, PartsDep
from service.api.problems import problem, responses
from service.artifacts import ArtifactsDownError
from service.jobs.queue import QueueDownError
from service.jobs.repository import JobRepository, now
from service.jobs.schemas import Health, WorkerInfo

_NO_KEY_NEEDED: dict[str, Any] = {"security": [{}]}
"""OpenAPI: besides with a key, also without."""

log = logging.getLogger(__name__)

router = APIRouter(prefix="/health", tags=["health"])


@router.get("/live", responses=responses())
def live() -> Health:
    """The process answers."""
    return Health(status="ok")


@router.get("/ready", response_model=Health, responses=responses("not_ready"), openapi_extra=_NO_KEY_NEEDED)
def ready(parts: PartsDep, trusted: TrustedDep) -> Response:
    """Database, files and broker answer; whether workers are alive is told, but jobs can be taken in without.

    Probes need no key; who would be refused elsewhere is not told the workers' names.
    """
    checks: dict[str, str] = {}
    workers: list[WorkerInfo] = []
    try:
        workers = _workers(parts)
        checks["database"] = "ok"
    except SQLAlchemyError as error:
        checks["database"] = f"unavailable: {type(error).__name__}"
    try:
        parts.artifacts.check()
        checks["artifacts"] = "ok"
    except ArtifactsDownError as error:
        log.warning("%s", error)
        checks["artifacts"] = "unavailable"
    try:
        parts.queue.depth("cpu")
        checks["broker"] = "ok"
    except QueueDownError:
        checks["broker"] = "unavailable"
    alive = sum(worker.alive for worker in workers)
    checks["workers"] = f"{alive} alive"
    faulty = [name for name in ("database", "artifacts", "broker") if checks[name] != "ok"]
    if faulty:
        return problem(
            "not_ready",
            f"Not available: {', '.join(faulty)}.",
            "Start it, or see the server's log; this probe turns green by itself.",
            checks=checks,
            workers=[worker.model_dump() for worker in workers if trusted],
        )
    document = Health(status="ok", checks=checks, workers=workers if trusted else [])
    return Response(document.model_dump_json(), media_type="application/json")


def _workers(parts: Parts) -> list[WorkerInfo]:
    at = now()
    with parts.sessions() as session:
        return [
            WorkerInfo(
                name=worker.name,
                seconds_since_seen=round((at - worker.seen_at).total_seconds(), 1),
                alive=worker.alive(at),
                device=worker.device,
                detail=worker.detail,
            )
            for worker in JobRepository(session).workers()
        ]

"""What the endpoints are given: one container of long-lived parts, made by the application's lifespan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from prometheus_client import CollectorRegistry
from sqlalchemy.orm import Session, sessionmaker

from service.api.rates import Rates
from service.api.watching import JobWatch
from service.artifacts import Artifacts
from service.jobs.queue import JobQueue
from service.jobs.submission import Submitter
from service.settings import Settings


@dataclass(frozen=True)
class Parts:
    """The parts that live as long as the application."""

    settings: Settings
    sessions: sessionmaker[Session]
    artifacts: Artifacts
    queue: JobQueue
    submitter: Submitter
    registry: CollectorRegistry
    rates: Rates
    watch: JobWatch


def _parts(request: Request) -> Parts:
    parts = request.app.state.parts
    assert isinstance(parts, Parts)
    return parts


PartsDep = Annotated[Parts, Depends(_parts)]

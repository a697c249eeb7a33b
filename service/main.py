"""The web application: `uvicorn --factory service.main:create_app`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import sessionmaker

from service.api import health, jobs, problems, results
from service.api.deps import Parts
from service.artifacts import open_artifacts
from service.jobs.database import migrate, open_database
from service.jobs.queue import JobQueue
from service.jobs.reaper import Reaper
from service.jobs.submission import Submitter
from service.settings import Settings


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application, with its own thread that looks after lost jobs."""
    settings = settings or Settings()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        artifacts = open_artifacts(settings.artifacts)
        await run_in_threadpool(artifacts.check)
        await run_in_threadpool(migrate, settings)
        engine = open_database(settings)
        sessions = sessionmaker(engine, expire_on_commit=False)
        queue = JobQueue(settings)
        submitter = Submitter(settings, sessions, queue, artifacts)
        app.state.parts = Parts(settings, sessions, artifacts, queue, submitter)
        reaper = Reaper(settings, sessions, queue, artifacts)
        reaper.start()
        try:
            yield
        finally:
            await run_in_threadpool(reaper.stop)
            queue.close()
            engine.dispose()

    app = FastAPI(
        title="AQuant service",
        version=version("aquant-service"),
        description="Post-training quantization of CNNs to 2-8 bits with an adaptive rounding border.",
        lifespan=lifespan,
    )
    problems.install(app)
    for router in (jobs.router, results.router, health.router):
        app.include_router(router)
    return app

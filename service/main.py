"""The web application: `uvicorn --factory service.main:application`."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.orm import sessionmaker

from service.api import error_page, events, health, jobs, metrics, openapi, pages, problems, results, sign_in, uploads
from service.api.deliveries import Deliveries
from service.api.deps import Parts
from service.api.rates import Rates
from service.api.requests import EveryRequest
from service.api.watching import JobWatch
from service.artifacts import open_artifacts
from service.jobs.database import migrate, open_database
from service.jobs.queue import JobQueue
from service.jobs.reaper import Reaper
from service.jobs.submission import Submitter
from service.logs import set_up_logging
from service.settings import Settings
from service.tracing import shut_down, tracer_provider


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application, with its own thread that looks after lost jobs."""
    settings = settings or Settings()
    set_up_logging(settings)
    tracing = tracer_provider(settings, "aquant-api")
    registry, request_seconds = metrics.new_registry()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        artifacts = open_artifacts(settings.artifacts)
        await run_in_threadpool(artifacts.check)
        await run_in_threadpool(migrate, settings)
        engine = open_database(settings)
        sessions = sessionmaker(engine, expire_on_commit=False)
        queue = JobQueue(settings)
        rates = Rates(settings)
        submitter = Submitter(settings, sessions, queue, artifacts)
        watch = JobWatch(sessions)
        app.state.parts = Parts(settings, sessions, artifacts, queue, submitter, registry, rates, watch)
        collector = metrics.ServiceCollector(sessions, queue)
        registry.register(collector)
        reaper = Reaper(settings, sessions, queue, artifacts)
        reaper.start()
        tasks = [
            asyncio.create_task(watch.run(), name="watch"),
            asyncio.create_task(Deliveries(sessions, settings.webhook_networks).run(), name="deliveries"),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await run_in_threadpool(reaper.stop)
            registry.unregister(collector)
            rates.close()
            queue.close()
            engine.dispose()
            await run_in_threadpool(shut_down, tracing)

    app = FastAPI(
        title="AQuant service",
        version=version("aquant-service"),
        description="Post-training quantization of CNNs to 2-8 bits with an adaptive rounding border.",
        lifespan=lifespan,
        # FastAPI's own load their scripts from elsewhere; /docs is one of our pages.
        docs_url=None,
        redoc_url=None,
        # FastAPI's own; of its metrics and logs /metrics and the log lines have more.
        telemetry={
            "tracer_provider": tracing,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
            "exclude": lambda scope: scope["path"].startswith(("/health/", "/metrics")),
        },
    )
    problems.install(app)
    app.add_middleware(EveryRequest, seconds=request_seconds)
    for module in (jobs, events, results, uploads, health, metrics, error_page, pages, sign_in):
        app.include_router(module.router)
    openapi.install(app)
    return app


def application() -> FastAPI:
    """The app of a process of its own.

    What is there from the start stays: the collector of garbage need not go through all of it time and again, while
    nobody is answered.
    """
    app = create_app()
    gc.collect()
    gc.freeze()
    return app

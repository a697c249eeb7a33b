"""A database or a store that goes away is a 503 with a reason, and all is well when it is back."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
from fastapi import FastAPI
from httpx import Client, Response
from servers import S3, Gate, PostgreSQL

from service.artifacts import ArtifactsDownError, open_artifacts
from service.jobs.database import DatabaseUnusableError
from service.jobs.queue import JobQueue
from service.main import create_app
from service.settings import Settings

pytestmark = pytest.mark.parametrize("storage", ["postgresql-s3"], indirect=True)

FORM = {"config": (None, json.dumps({"weight_bits": 2, "activation_bits": 2}))}


@dataclass
class Outages:
    """The service behind two gates."""

    settings: Settings
    database: Gate
    store: Gate


@pytest.fixture
def outages(settings: Settings, postgresql: PostgreSQL, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outages]:
    with Gate(postgresql.port) as database, Gate(s3.port) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment(store.port)["AWS_ENDPOINT_URL"])
        assert settings.database_url is not None
        url = settings.database_url.replace(f":{postgresql.port}/", f":{database.port}/")
        yield Outages(settings.model_copy(update={"database_url": url, "reaper_seconds": 0.05}), database, store)


@pytest.fixture
def web(outages: Outages, serve: Callable[[FastAPI], AbstractContextManager[Client]]) -> Iterator[Client]:
    with serve(create_app(outages.settings)) as client:
        yield client


def unavailable(answer: Response, code: str) -> bool:
    problem = answer.json()
    assert answer.headers["retry-after"] == "5"
    assert "127.0.0.1" not in answer.text  # the inside is for the log
    return (answer.status_code, problem["code"], bool(problem["remedy"])) == (503, code, True)


def test_database_goes_and_comes_back(
    web: Client,
    outages: Outages,
    onnx_model: bytes,
    images: bytes,
    caplog: pytest.LogCaptureFixture,
    queue: JobQueue,
) -> None:
    files = {**FORM, "model": onnx_model, "calibration": images}
    job = web.post("/jobs", files=files).headers["location"]
    outages.database.shut()
    for answer in (
        web.get("/jobs"),
        web.get(job),
        web.post(f"{job}/cancel"),
        web.delete(job),
        web.get(f"{job}/report"),
        web.post("/jobs", files=files),
    ):
        assert unavailable(answer, "database_unavailable")
    health = web.get("/health/ready")
    assert health.status_code == 503
    assert health.json()["checks"] | {"database": ""} == {
        "database": "",
        "artifacts": "ok",
        "broker": "ok",
        "workers": "unknown",
    }
    assert health.json()["workers_alive"] is None
    assert web.get("/health/live").status_code == 200
    while not (said := [record for record in caplog.records if record.name == "service.jobs.reaper"]):
        time.sleep(0.05)
    outages.database.open()
    assert web.get(job).json()["state"] == "queued"
    assert web.get("/health/ready").status_code == 200
    assert len(open_artifacts(outages.settings.artifacts).keys("")) == 2  # nothing of what was not taken in
    assert queue.depth("cpu") == 1
    assert {record.levelno for record in said} == {logging.WARNING}
    assert "the reaper waits for the database" in said[0].getMessage()


def test_store_goes_and_comes_back(web: Client, outages: Outages, onnx_model: bytes, images: bytes) -> None:
    files = {**FORM, "model": onnx_model, "calibration": images}
    job = web.post("/jobs", files=files).headers["location"]
    outages.store.shut()
    assert unavailable(web.post("/jobs", files=files), "artifacts_unavailable")
    assert web.get(job).json()["state"] == "queued"
    health = web.get("/health/ready")
    assert (health.status_code, health.json()["checks"]["artifacts"]) == (503, "unavailable")
    assert web.delete(job).status_code == 204  # its files are left to the reaper
    outages.store.open()
    assert web.post("/jobs", files=files).status_code == 202
    assert web.get("/health/ready").status_code == 200
    assert len(web.get("/jobs").json()["jobs"]) == 1


@pytest.mark.parametrize(("part", "error"), [("database", DatabaseUnusableError), ("store", ArtifactsDownError)])
def test_what_is_away_at_the_start_is_named(outages: Outages, part: str, error: type[Exception]) -> None:
    getattr(outages, part).shut()
    variable = {"database": "AQUANT_DATABASE_URL", "store": "AQUANT_ARTIFACTS_URL"}[part]

    async def start() -> None:
        app = create_app(outages.settings)
        async with app.router.lifespan_context(app):
            pass

    with pytest.raises(error, match=f"Check {variable}"):
        asyncio.run(start())

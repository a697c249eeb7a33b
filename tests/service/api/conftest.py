"""The application, served over a real socket on real parts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from httpx import Client, Response
from page_jobs import PageJobs
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.jobs.keys import KeyRepository, Scope
from service.jobs.repository import now
from service.main import create_app
from service.settings import Settings

MakeKey = Callable[..., dict[str, str]]
Submit = Callable[..., Response]
CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke"}


@contextmanager
def serve(app: FastAPI) -> Iterator[Client]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(name="serve")
def serve_fixture() -> Callable[[FastAPI], AbstractContextManager[Client]]:
    return serve


@pytest.fixture
def application(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def web(application: FastAPI) -> Iterator[Client]:
    with serve(application) as client:
        yield client


@pytest.fixture
def submit(web: Client, onnx_model: bytes, images: bytes) -> Submit:
    """Posts a job; a part given as None is left out."""

    def post(**changes: object) -> Response:
        parts = {"config": CONFIG, "model": onnx_model, "calibration": images, **changes}
        files = {}
        for name, content in parts.items():
            if isinstance(content, dict):
                content = json.dumps(content)
            if content is not None:
                files[name] = (None if name == "config" else name, content)
        return web.post("/jobs", files=files)

    return post


@pytest.fixture
def make_key(sessions: sessionmaker[Session]) -> MakeKey:
    """Makes a key; what a request with it has for headers."""

    def make(owner: str = "ada", scope: Scope = "jobs", seconds: float | None = None) -> dict[str, str]:
        expires_at = None if seconds is None else now() + timedelta(seconds=seconds)
        with sessions.begin() as session:
            _, token = KeyRepository(session).create("a-key", owner, scope, expires_at)
        return {"Authorization": f"Bearer {token}"}

    return make


@pytest.fixture
def page_jobs(sessions: sessionmaker[Session], artifacts: Artifacts, tmp_path: Path) -> PageJobs:
    """Puts jobs in as a worker would have left them."""
    return PageJobs(sessions, artifacts, tmp_path)

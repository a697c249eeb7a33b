"""What is sent to the application, and by whom."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta

import pytest
from httpx import Client, Response
from old_reports import old_report
from page_jobs import PageJobs
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.jobs.keys import KeyRepository, Scope
from service.jobs.repository import now

MakeKey = Callable[..., dict[str, str]]
Submit = Callable[..., Response]
CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke"}


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
def page_jobs(sessions: sessionmaker[Session], artifacts: Artifacts) -> PageJobs:
    """Puts jobs in as a worker would have left them."""
    return PageJobs(sessions, artifacts)


@pytest.fixture
def ada(make_key: MakeKey) -> dict[str, str]:
    """Headers of a user with a key."""
    return make_key("ada")


@pytest.fixture
def hers(page_jobs: PageJobs, ada: dict[str, str]) -> dict[str, str]:
    """Ada's jobs, two of them with results."""
    assert ada
    page_jobs.owner = "ada"
    return {
        "queued": page_jobs.queued(filename="of-ada.onnx"),
        "running": page_jobs.running(filename="of-ada.onnx"),
        "succeeded": page_jobs.succeeded(old_report(), filename="of-ada.onnx"),
        "other": page_jobs.succeeded(old_report(), filename="of-ada.onnx"),
        "failed": page_jobs.failed("of-ada", filename="of-ada.onnx"),
    }

"""What an owner may send and keep, over HTTP: each limit has its code, and says limit and use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
import servers
from answers import refused
from fastapi import FastAPI
from httpx import Client, Response
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.jobs.owners import OwnerRepository
from service.main import create_app
from service.settings import Settings

Headers = dict[str, str]
CONFIG = {"weight_bits": 2, "activation_bits": 2}

pytestmark = pytest.mark.parametrize("storage", servers.PAIRS[::3], indirect=True)


@pytest.fixture
def send(
    settings: Settings,
    serve: Callable[[FastAPI], AbstractContextManager[Client]],
    onnx_model: bytes,
    images: bytes,
) -> Iterator[Callable[..., Response]]:
    """Posts a job to a service that takes two of these jobs' files from an owner, and two jobs."""
    room = 2 * (len(onnx_model) + len(images)) + 100
    with serve(create_app(settings.model_copy(update={"max_stored_bytes": room, "max_jobs_queued": 2}))) as web:

        def post(headers: Headers, model: bytes = onnx_model) -> Response:
            files = {"config": (None, json.dumps(CONFIG)), "model": ("m", model), "calibration": ("c", images)}
            return web.post("/jobs", files=files, headers=headers)

        yield post


def limit(sessions: sessionmaker[Session], owner: str, **limits: int) -> None:
    with sessions.begin() as session:
        OwnerRepository(session).set_limits(owner, **limits)


def test_jobs_wait_up_to_a_number(
    send: Callable[..., Response], make_key: Callable[..., Headers], artifacts: Artifacts
) -> None:
    ada, bob = make_key("ada"), make_key("bob")
    assert [send(ada).status_code for _ in range(2)] == [202, 202]
    answer = send(ada)
    document = refused(answer, 429, "job_quota_exceeded")
    assert (document["limit"], document["used"]) == (2, 2)
    assert int(answer.headers["retry-after"]) > 0
    assert send(bob).status_code == 202
    assert len(artifacts.keys("jobs")) == 6  # nothing is left of the refused one


def test_files_take_up_to_so_many_bytes(
    send: Callable[..., Response],
    make_key: Callable[..., Headers],
    sessions: sessionmaker[Session],
    artifacts: Artifacts,
    onnx_model: bytes,
) -> None:
    ada = make_key("ada")
    limit(sessions, "ada", max_jobs_queued=10)
    first = send(ada)
    assert [first.status_code, send(ada).status_code] == [202, 202]
    document = refused(send(ada), 403, "storage_quota_exceeded")
    used = document["used"]
    assert document["limit"] == used + 100
    assert str(used) in document["detail"]
    assert len(artifacts.keys("jobs")) == 4
    # The second file is what does not fit.
    limit(sessions, "ada", max_stored_bytes=used + len(onnx_model))
    assert refused(send(ada), 403, "storage_quota_exceeded")["used"] == used
    limit(sessions, "ada", max_stored_bytes=2 * used)
    assert send(ada).status_code == 202


def test_an_upload_has_up_to_so_many_bytes(
    send: Callable[..., Response], make_key: Callable[..., Headers], sessions: sessionmaker[Session], onnx_model: bytes
) -> None:
    ada, bob = make_key("ada"), make_key("bob")
    limit(sessions, "ada", max_upload_bytes=len(onnx_model) - 1)
    assert str(len(onnx_model) - 1) in refused(send(ada), 413, "upload_too_large")["detail"]
    assert send(bob).status_code == 202


def test_without_keys_the_limits_are_those_of_everybody_together(send: Callable[..., Response]) -> None:
    assert [send({}).status_code for _ in range(3)] == [202, 202, 429]

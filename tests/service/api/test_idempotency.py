"""A submission that is sent twice is carried out once; identical work need not be done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
from fastapi import FastAPI
from httpx import Client, Response
from job_rows import finish
from servers import DATABASES, PAIRS
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.jobs.queue import JobQueue
from service.jobs.records import IdempotencyRecord
from service.jobs.repository import now
from service.main import create_app
from service.settings import Settings

every_database = pytest.mark.parametrize("storage", DATABASES, indirect=True)
in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

CONFIG = {"weight_bits": 2, "activation_bits": 2}
Send = Callable[..., Response]


@pytest.fixture
def send(onnx_model: bytes, images: bytes) -> Send:
    def post(web: Client, key: str | None = None, headers: dict[str, str] | None = None, **changes: str) -> Response:
        fields = {"config": json.dumps(CONFIG), **changes}
        files = {name: (None, value) for name, value in fields.items()}
        headers = {**(headers or {}), **({} if key is None else {"Idempotency-Key": key})}
        return web.post("/jobs", files={**files, "model": onnx_model, "calibration": images}, headers=headers)

    return post


def jobs(web: Client, headers: dict[str, str] | None = None) -> list[str]:
    return [job["id"] for job in web.get("/jobs", headers=headers).json()["jobs"]]


@every_database
def test_the_same_request_twice_is_one_job(
    web: Client,
    send: Send,
    artifacts: Artifacts,
    queue: JobQueue,
    serve: Callable[[FastAPI], AbstractContextManager[Client]],
    settings: Settings,
) -> None:
    first, other = send(web, "a-key"), send(web, "another")
    assert (first.status_code, "idempotency-replayed" in first.headers) == (202, False)
    with serve(create_app(settings)) as restarted:
        # What is as by default may be said or not, and a form has another boundary each time.
        again = send(restarted, "a-key", config=json.dumps({**CONFIG, "method": "aquant"}))
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "?1")
    assert again.headers["location"] == first.headers["location"]
    assert again.json()["id"] == first.json()["id"]
    assert set(jobs(web)) == {first.json()["id"], other.json()["id"]}
    assert len(artifacts.keys("")) == 4  # nothing of the repetition
    assert queue.depth("cpu") == 2


@every_database
def test_the_same_request_at_once_is_one_job(web: Client, send: Send, artifacts: Artifacts) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: send(web, "a-key"), range(6)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert len(jobs(web)) == 1
    assert len(artifacts.keys("")) == 2


@in_a_folder
@pytest.mark.parametrize(
    "changes",
    [
        {"config": json.dumps({**CONFIG, "seed": 1})},
        {"reuse": "true"},
        {"device": "cpu"},
        {"webhook": '{"url": "https://example.com", "secret": "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3"}'},
    ],
)
def test_another_request_with_the_same_key_is_refused(web: Client, send: Send, changes: dict[str, str]) -> None:
    first = send(web, "a-key").json()["id"]
    answer = send(web, "a-key", **changes)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    assert jobs(web) == [first]


@in_a_folder
def test_a_refused_request_leaves_its_key_free(web: Client, send: Send) -> None:
    assert send(web, "a-key", config="{}").status_code == 422
    assert send(web, "a-key").status_code == 202


@in_a_folder
def test_a_key_of_a_deleted_job_brings_no_second_one(web: Client, send: Send) -> None:
    url = send(web, "a-key").headers["location"]
    assert web.delete(url).status_code == 204
    answer = send(web, "a-key")
    assert (answer.status_code, answer.json()["code"]) == (409, "idempotent_job_deleted")
    assert jobs(web) == []


@every_database
def test_a_key_is_kept_for_its_time(
    web: Client, send: Send, sessions: sessionmaker[Session], settings: Settings
) -> None:
    first = send(web, "a-key").json()["id"]
    with sessions.begin() as session:
        session.execute(
            update(IdempotencyRecord).values(created_at=now() - timedelta(seconds=settings.idempotency_seconds + 1))
        )
    second = send(web, "a-key", config=json.dumps({**CONFIG, "seed": 1})).json()["id"]
    assert set(jobs(web)) == {first, second}
    assert send(web, "a-key", config=json.dumps({**CONFIG, "seed": 1})).json()["id"] == second


@in_a_folder
def test_keys_are_their_owners(web: Client, send: Send, make_key: Callable[..., dict[str, str]]) -> None:
    ada, bob = make_key("ada"), make_key("bob")
    hers = send(web, "a-key", headers=ada).json()["id"]
    his = send(web, "a-key", headers=bob, config=json.dumps({**CONFIG, "seed": 1}))
    assert (his.status_code, "idempotency-replayed" in his.headers) == (202, False)
    assert (jobs(web, ada), jobs(web, bob)) == ([hers], [his.json()["id"]])


@in_a_folder
def test_a_repetition_is_answered_though_the_quota_is_used_up(
    serve: Callable[[FastAPI], AbstractContextManager[Client]], settings: Settings, send: Send
) -> None:
    with serve(create_app(settings.model_copy(update={"max_jobs_queued": 1}))) as web:
        first = send(web, "a-key").json()["id"]
        assert send(web).json()["code"] == "job_quota_exceeded"
        assert send(web, "a-key").json()["id"] == first


@in_a_folder
@pytest.mark.parametrize("key", ["", "two words", "x" * 256])
def test_what_is_no_key_is_refused(web: Client, send: Send, key: str) -> None:
    answer = send(web, key)
    assert (answer.status_code, answer.json()["code"]) == (422, "request_invalid")


@every_database
def test_finished_work_is_reused_when_asked_for(
    web: Client, send: Send, sessions: sessionmaker[Session], artifacts: Artifacts
) -> None:
    first = send(web).json()["id"]
    assert send(web, reuse="true").status_code == 202  # it has not finished
    finish(sessions, first)
    stored = artifacts.keys("")
    answer = send(web, "a-key", reuse="true", config=json.dumps({**CONFIG, "preset": "fast"}))
    assert (answer.status_code, answer.json()["id"]) == (200, first)
    assert answer.headers["location"] == f"/jobs/{first}"
    assert answer.json()["state"] == "succeeded"
    assert artifacts.keys("") == stored
    assert send(web, reuse="true", config=json.dumps({**CONFIG, "seed": 1})).status_code == 202
    assert send(web, reuse="false").status_code == 202
    assert send(web).status_code == 202
    assert send(web, reuse="perhaps").json()["code"] == "form_invalid"


@in_a_folder
def test_the_work_of_others_is_not_reused(
    web: Client, send: Send, sessions: sessionmaker[Session], make_key: Callable[..., dict[str, str]]
) -> None:
    ada, bob = make_key("ada"), make_key("bob")
    finish(sessions, send(web, headers=ada).json()["id"])
    assert send(web, headers=bob, reuse="true").status_code == 202
    assert send(web, headers=ada, reuse="true").status_code == 200

"""Two owners cannot see, cancel, download or deduce each other's jobs: all that the OpenAPI document has is tried.

An operation with a job's id in its path is tried as it stands. Any other needs an entry in ``CASES``, or in
``PUBLIC`` where a person decided that it concerns nobody in particular; one that has neither fails the test.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from httpx import Client, Response
from job_rows import claim, finish, stored
from sqlalchemy.orm import Session, sessionmaker

import service.api
from service.api import pages, sign_in
from service.artifacts import Artifacts
from service.jobs.records import JobRecord
from service.jobs.states import JobState
from service.main import create_app
from service.settings import Settings

Operation = tuple[str, str]
Headers = dict[str, str]

CONFIG = {"weight_bits": 2, "activation_bits": 2}
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
NO_JOB = "0123456789abcdef01234567"

PUBLIC: dict[Operation, str] = {
    ("get", "/health/live"): "a probe",
    ("get", "/health/ready"): "a probe; test_auth.py has what it keeps from strangers",
    ("get", "/metrics"): "of the whole service, to keys made for it alone; test_auth.py",
    ("get", "/errors"): "documentation",
}


@dataclass(frozen=True)
class World:
    """Ada has jobs in every state worth a look; Bob has one of his own."""

    web: Client
    ada: Headers
    bob: Headers
    jobs: dict[str, str]
    submit: Callable[[Headers], Response]

    def see(self) -> dict[str, Any]:
        """All that Ada can see."""
        found: dict[str, Any] = {"list": self.web.get("/jobs", headers=self.ada).json()}
        for name, job_id in self.jobs.items():
            found[name] = self.web.get(f"/jobs/{job_id}", headers=self.ada).json()
        for name in ("report", "checkpoint"):
            found[name] = self.web.get(f"/jobs/{self.jobs['succeeded']}/{name}", headers=self.ada).content
        return found


def listing(world: World) -> None:
    """Bob's pages have his jobs alone, whatever he asks for, with Ada's cursor too."""
    mine = world.submit(world.bob).json()["id"]
    page = world.web.get("/jobs", params={"limit": 1}, headers=world.ada).json()
    asked: list[dict[str, Any]] = [{}, {"limit": 1}, {"limit": 100}, *({"state": state} for state in JobState)]
    for params in asked:
        answer = world.web.get("/jobs", params=params, headers=world.bob).json()
        expected = [mine] if params.get("state", "queued") == "queued" else []
        assert ([job["id"] for job in answer["jobs"]], answer["next"]) == (expected, None)
    assert page["next"] is not None
    with_hers = world.web.get(page["next"], headers=world.bob).json()
    assert {job["id"] for job in with_hers["jobs"]} <= {mine}


def submission(world: World) -> None:
    """Bob sends the very files that Ada sent, and is told what he would be told if she had not."""

    def told(answer: Response) -> dict[str, Any]:
        assert answer.status_code == 202
        document: dict[str, Any] = json.loads(answer.text.replace(answer.json()["id"], "ID"))
        return document | {"created_at": None}

    hers, his = world.submit(world.ada), world.submit(world.bob)
    assert told(his)["queue_position"] == 0
    assert told(hers)["queue_position"] == 1
    assert told(his) == told(hers) | {"queue_position": 0}
    world.web.delete(f"/jobs/{hers.json()['id']}", headers=world.ada).raise_for_status()


def upload(method: str) -> Callable[[World], None]:
    """Of a file that Ada has uploaded, Bob is told what he is told of one that nobody has, byte for byte."""

    def tell(world: World) -> None:
        hers, nobodys = (data * 100 for data in (b"hers", b"none"))
        kept, open_, none = (hashlib.sha256(data).hexdigest() for data in (hers, hers + b".", nobodys))
        world.web.put(f"/uploads/{kept}", content=hers, headers=world.ada).raise_for_status()
        beginning = {"Content-Range": f"bytes 0-399/{len(hers) + 1}"}
        world.web.put(f"/uploads/{open_}", content=hers, headers=world.ada | beginning).raise_for_status()
        before = [world.web.get(f"/uploads/{digest}", headers=world.ada).json() for digest in (kept, open_)]
        for body in ({"content": b"xxxx", "headers": world.bob | {"Content-Range": "bytes 0-3/400"}}, {}):
            asked: dict[str, Any] = {"headers": world.bob} | (body if method == "put" else {})
            answers = {
                digest: told(world.web.request(method, f"/uploads/{digest}", **asked), digest)
                for digest in (none, kept, open_)
            }
            assert len({re.sub(r"\d{4}-\d\d-\d\dT[^\"]*", "TIME", str(answer)) for answer in answers.values()}) == 1
            assert answers[none][0] == (404 if method != "put" else 202 if body else 422)
        after = [world.web.get(f"/uploads/{digest}", headers=world.ada).json() for digest in (kept, open_)]
        assert after == before
        for digest in (kept, open_):
            world.web.delete(f"/uploads/{digest}", headers=world.ada).raise_for_status()

    return tell


CASES: dict[Operation, Callable[[World], None]] = {
    ("get", "/jobs"): listing,
    ("post", "/jobs"): submission,
    **{(method, "/uploads/{sha256}"): upload(method) for method in ("put", "get", "head", "delete")},
}


def operations() -> list[Operation]:
    document = create_app(Settings(broker_url="redis://127.0.0.1:1/0")).openapi()
    return [(method, path) for path, item in document["paths"].items() for method in item if method in METHODS]


@pytest.fixture
def world(
    web: Client,
    make_key: Callable[..., Headers],
    add_job: Callable[[], str],
    sessions: sessionmaker[Session],
    artifacts: Artifacts,
    onnx_model: bytes,
    images: bytes,
) -> World:
    def submit(headers: Headers) -> Response:
        files = {"config": (None, json.dumps(CONFIG)), "model": ("m", onnx_model), "calibration": ("c", images)}
        return web.post("/jobs", files=files, headers=headers)

    jobs = {name: add_job() for name in ("queued", "running", "failed", "succeeded")}
    with sessions.begin() as session:
        for job_id in jobs.values():
            session.get_one(JobRecord, job_id).owner = "ada"
    claim(sessions, jobs["running"])
    finish(sessions, jobs["failed"], JobState.FAILED)
    files = dict.fromkeys(("checkpoint", "report"), b'{"of": "ada"}')
    finish(sessions, jobs["succeeded"], results=stored(artifacts, jobs["succeeded"], files))
    return World(web, make_key("ada"), make_key("bob"), jobs, submit)


def told(answer: Response, job_id: str) -> tuple[int, str, dict[str, str]]:
    """All that an answer tells, but for the id that was asked for and what differs from request to request."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "date")}
    return answer.status_code, answer.text.replace(job_id, "ID"), headers


@pytest.mark.parametrize("operation", operations(), ids=" ".join)
def test_of_a_foreign_job_there_is_nothing(world: World, operation: Operation) -> None:
    method, path = operation
    if operation in PUBLIC:
        return
    before = world.see()
    case = CASES.get(operation)
    if case is not None:
        case(world)
    else:
        assert "{job_id}" in path, (
            f"{method} {path} is new: give it a case in CASES, or say in PUBLIC why it needs none"
        )
        tag = world.web.get(f"/jobs/{world.jobs['succeeded']}/checkpoint", headers=world.ada).headers["etag"]
        for more in ({}, {"If-None-Match": tag}, {"Range": "bytes=0-3"}, {"If-None-Match": "*"}):
            for foreign in world.jobs.values():
                answers = [
                    world.web.request(method, path.replace("{job_id}", job_id), headers=world.bob | more)
                    for job_id in (foreign, NO_JOB)
                ]
                assert answers[0].status_code == 404
                if method != "head":
                    assert answers[0].json()["code"] == "job_not_found"
                assert told(answers[0], foreign) == told(answers[1], NO_JOB)
    assert world.see() == before


@pytest.mark.parametrize("operation", operations(), ids=" ".join)
def test_without_a_key_there_is_nothing(world: World, operation: Operation) -> None:
    method, path = operation
    if operation in PUBLIC and path != "/metrics":
        return
    before = world.see()
    for headers, code in (({}, "key_missing"), ({"Authorization": "Bearer aquant_x"}, "key_invalid")):
        answers = [
            world.web.request(method, path.replace("{job_id}", job_id), headers=headers)
            for job_id in (*world.jobs.values(), NO_JOB)
        ]
        assert {answer.status_code for answer in answers} == {401}
        if method != "head":
            assert {answer.json()["code"] for answer in answers} == {code}
    assert world.see() == before


def test_owners_of_keys_have_nothing_of_before(world: World, add_job: Callable[[], str]) -> None:
    """Jobs made while there were no keys are nobody's until somebody is given them."""
    nobodys = add_job()
    for headers in (world.ada, world.bob):
        assert world.web.get(f"/jobs/{nobodys}", headers=headers).status_code == 404


def test_the_document_leaves_no_route_out() -> None:
    """What is not in it would not be tried above; but for HEAD, which is tried as GET."""
    documented = set(operations())
    modules = [import_module(f"service.api.{module.name}") for module in iter_modules(service.api.__path__)]
    routers = [module.router for module in modules if isinstance(getattr(module, "router", None), APIRouter)]
    routers = [router for router in routers if router not in (pages.router, sign_in.router)]  # test_pages.py has them
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    found = {(method.lower(), route.path) for route in routes for method in route.methods}
    assert documented <= found
    assert {("get" if method == "head" else method, path) for method, path in found} <= documented

"""Reports, checkpoints and ONNX over HTTP, whole and in ranges."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from httpx import Client
from job_rows import finish, stored
from servers import STORES
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.jobs.records import ONNX_PROBLEM
from service.jobs.repository import JobRepository
from service.jobs.schemas import Problem

in_a_folder = pytest.mark.parametrize("storage", STORES[:1], indirect=True)  # decided before a store is asked

BODY = bytes(range(256)) * 10
ETAG = f'"{hashlib.sha256(BODY).hexdigest()}"'


@pytest.fixture
def finished(sessions: sessionmaker[Session], artifacts: Artifacts, add_job: Callable[[], str]) -> str:
    """The address of a job that succeeded."""
    job_id = add_job()
    files = {"checkpoint": BODY, "onnx": BODY[1:], "report": b'{"seed": 0}'}
    finish(sessions, job_id, results=stored(artifacts, job_id, files))
    return f"/jobs/{job_id}"


def test_links_lead_to_the_files(web: Client, finished: str) -> None:
    links = web.get(finished).json()["links"]
    assert web.get(links["report"]).json() == {"seed": 0}
    assert web.get(links["page"]).headers["content-type"].startswith("text/html")
    whole = web.get(links["checkpoint"])
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, BODY, ETAG)
    assert whole.headers["content-disposition"].endswith('.safetensors"')
    assert whole.headers["content-length"] == str(len(BODY))
    head = web.head(links["checkpoint"])
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(BODY)))


def test_onnx_is_delivered_as_the_checkpoint_is(web: Client, finished: str) -> None:
    url = web.get(finished).json()["links"]["onnx"]
    whole = web.get(url)
    assert (whole.status_code, whole.content) == (200, BODY[1:])
    assert whole.headers["etag"] == f'"{hashlib.sha256(BODY[1:]).hexdigest()}"'
    assert whole.headers["content-disposition"].endswith('.onnx"')
    part = web.get(url, headers={"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, BODY[6:11])
    assert web.head(url).headers["content-length"] == str(len(BODY) - 1)


def test_onnx_that_cannot_be_says_why(
    web: Client, sessions: sessionmaker[Session], artifacts: Artifacts, add_job: Callable[[], str]
) -> None:
    job_id = add_job()
    why = Problem.of_job("onnx_export_unsupported", "Layer 'fc' is of paper.", "Use glue.").model_dump_json()
    finish(sessions, job_id, results=stored(artifacts, job_id, {ONNX_PROBLEM: why.encode()}))
    assert web.get(f"/jobs/{job_id}").json()["links"]["onnx"] is None
    answer = web.get(f"/jobs/{job_id}/onnx")
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (409, "onnx_export_unsupported")
    assert (problem["detail"], problem["remedy"]) == ("Layer 'fc' is of paper.", "Use glue.")


@in_a_folder
def test_a_dry_run_has_no_checkpoint(web: Client, sessions: sessionmaker[Session], add_job: Callable[..., str]) -> None:
    job_id = add_job()
    with sessions.begin() as session:
        job = JobRepository(session).get(job_id)
        job.config = {**job.config, "dry_run": True}
    checkpoint, report = (web.get(f"/jobs/{job_id}/{name}") for name in ("checkpoint", "report"))
    assert (checkpoint.status_code, checkpoint.json()["code"]) == (404, "dry_run_has_no_checkpoint")
    assert (report.status_code, report.json()["code"]) == (409, "artifact_not_ready")  # not yet


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("0-0", 0, 1), ("10-19", 10, 20), ("2550-", 2550, 2560), ("-7", 2553, 2560), ("0-99999", 0, 2560)],
)
def test_range(web: Client, finished: str, asked: str, start: int, stop: int) -> None:
    part = web.get(f"{finished}/checkpoint", headers={"Range": f"bytes={asked}"})
    assert (part.status_code, part.content) == (206, BODY[start:stop])
    assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/2560"


@in_a_folder
@pytest.mark.parametrize("asked", ["2560-", "5-4", "-0"])
def test_range_outside_the_file(web: Client, finished: str, asked: str) -> None:
    answer = web.get(f"{finished}/checkpoint", headers={"Range": f"bytes={asked}"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */2560")
    assert answer.json()["code"] == "range_not_satisfiable"


@in_a_folder
@pytest.mark.parametrize("asked", ["bytes=-", "bytes=0-1,5-6", "lines=1-2", "x"])
def test_range_not_understood_gets_the_whole(web: Client, finished: str, asked: str) -> None:
    answer = web.get(f"{finished}/checkpoint", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, BODY)


@in_a_folder
def test_conditions(web: Client, finished: str) -> None:
    url = f"{finished}/checkpoint"
    assert web.get(url, headers={"Range": "bytes=0-4", "If-Range": ETAG}).status_code == 206
    assert web.get(url, headers={"Range": "bytes=0-4", "If-Range": '"other"'}).content == BODY
    assert web.get(url, headers={"If-None-Match": ETAG}).status_code == 304
    report = web.get(f"{finished}/report")
    again = web.get(f"{finished}/report", headers={"If-None-Match": report.headers["etag"]})
    assert again.status_code == 304


def test_deleted_job_takes_its_files_along(web: Client, finished: str, artifacts: Artifacts) -> None:
    assert web.delete(finished).status_code == 204
    assert artifacts.keys("") == []


@in_a_folder
@pytest.mark.parametrize("name", ["report", "checkpoint", "onnx"])
def test_unfinished_job_has_no_files(web: Client, add_job: Callable[[], str], name: str) -> None:
    answer = web.get(f"/jobs/{add_job()}/{name}")
    assert (answer.status_code, answer.json()["code"]) == (409, "artifact_not_ready")
    assert web.get(f"/jobs/nobody/{name}").status_code == 404

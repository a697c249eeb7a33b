"""Files named in place of being sent: those of an owner's earlier jobs, over HTTP, as a user names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import Client
from servers import PAIRS
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.jobs.errors import FormError, JobFileMissingError
from service.jobs.records import JobRecord
from service.jobs.references import References, earlier_files, read_reference
from service.main import create_app
from service.settings import Settings

in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)
CONFIG = {"weight_bits": 2, "activation_bits": 2}
NO_JOB = "0" * 24


def submit(web: Client, **parts: Any) -> dict[str, Any]:
    """A job by form: a file is its name and bytes, a field its text."""
    form = {name: part if isinstance(part, tuple) else (None, part) for name, part in parts.items()}
    answer = web.post("/jobs", files={"config": (None, json.dumps(CONFIG)), **form})
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def test_a_reference_says_what_it_names() -> None:
    upload, job = f"sha256:{'a' * 64}", f"job:{'b' * 24}"
    references = References.of({"model": upload, "calibration": job})
    assert (references.uploads, references.jobs) == ({"model": "a" * 64}, {"calibration": "b" * 24})
    for text in (upload, job):
        assert read_reference("model", text) == text
    for text in ("", "job:", f"job:{'b' * 23}", f"job:{'B' * 24}", "sha256:" + "b" * 24, f" {job}", f"{job}\n"):
        with pytest.raises(FormError, match="`model` is neither a file nor the name of one"):
            read_reference("model", text)


def test_a_job_takes_the_files_of_another_and_keeps_them(
    web: Client, onnx_model: bytes, images: bytes, artifacts: Artifacts
) -> None:
    first = submit(web, model=("net.onnx", onnx_model), calibration=("images.npz", images))
    named = f"job:{first['id']}"
    by_form = submit(web, model=named, calibration=named, evaluation=("others.npz", images))
    by_json = web.post("/jobs", json={"model": named, "calibration": named, "config": CONFIG}).json()
    assert by_json["files"] == first["files"]  # names included
    assert {name: file["filename"] for name, file in by_form["files"].items()} == {
        "model": "net.onnx",
        "calibration": "images.npz",
        "evaluation": "others.npz",
    }
    web.delete(f"/jobs/{first['id']}").raise_for_status()
    for job in (by_form, by_json):
        assert artifacts.get_bytes(f"jobs/{job['id']}/model") == onnx_model
        assert artifacts.get_bytes(f"jobs/{job['id']}/calibration") == images
    assert len(artifacts.keys("jobs")) == 5


def test_an_upload_of_an_earlier_job_is_still_kept_once(
    web: Client, onnx_model: bytes, images: bytes, artifacts: Artifacts
) -> None:
    digest = hashlib.sha256(onnx_model).hexdigest()
    web.put(f"/uploads/{digest}", content=onnx_model).raise_for_status()
    first = submit(web, model=f"sha256:{digest}", calibration=("images.npz", images))
    second = submit(web, model=f"job:{first['id']}", calibration=f"job:{first['id']}")
    assert len(artifacts.keys("uploads")) == 1
    web.delete(f"/jobs/{first['id']}").raise_for_status()
    assert web.delete(f"/uploads/{digest}").json()["code"] == "upload_in_use"
    web.delete(f"/jobs/{second['id']}").raise_for_status()
    assert web.delete(f"/uploads/{digest}").status_code == 204


@in_a_folder
def test_what_an_earlier_job_does_not_have(
    web: Client, onnx_model: bytes, images: bytes, subtests: pytest.Subtests, artifacts: Artifacts
) -> None:
    first = submit(web, model=("net.onnx", onnx_model), calibration=("images.npz", images))
    named = f"job:{first['id']}"
    sound = {"model": named, "calibration": named, "config": CONFIG}
    before = artifacts.keys("jobs")
    for changes in ({"evaluation": named}, {"model": f"job:{NO_JOB}"}):
        with subtests.test(changes=changes):
            answer = web.post("/jobs", json=sound | changes)
            assert (answer.status_code, answer.json()["code"]) == (422, "job_file_missing")
            (name,) = changes
            assert f"`{name}` is said to be that of job" in answer.json()["detail"]
    answer = web.post("/jobs", json=sound | {"model": f"job:{NO_JOB[1:]}"})
    assert (answer.status_code, answer.json()["code"]) == (400, "form_invalid")
    assert artifacts.keys("jobs") == before  # nothing of the refused is left


@in_a_folder
def test_files_are_their_owners(
    web: Client, onnx_model: bytes, images: bytes, make_key: Callable[..., dict[str, str]]
) -> None:
    ada, bob = make_key("ada"), make_key("bob")
    form = {"model": ("net.onnx", onnx_model), "calibration": images, "config": (None, json.dumps(CONFIG))}
    hers = web.post("/jobs", files=form, headers=ada).json()["id"]
    told = []
    for job_id in (hers, NO_JOB):
        named = {"model": f"job:{job_id}", "calibration": f"job:{job_id}", "config": CONFIG}
        answer = web.post("/jobs", json=named, headers=bob)
        told.append((answer.status_code, answer.json()["code"], answer.json()["detail"].replace(job_id, "ID")))
        if job_id == hers:
            assert web.post("/jobs", json=named, headers=ada).status_code == 202
    assert told[0] == told[1] == (422, "job_file_missing", told[0][2])


@in_a_folder
def test_copies_take_of_the_quota(
    serve: Callable[[FastAPI], Any], settings: Settings, onnx_model: bytes, images: bytes, artifacts: Artifacts
) -> None:
    room = 2 * (len(onnx_model) + len(images))
    with serve(create_app(settings.model_copy(update={"max_stored_bytes": room}))) as web:
        first = submit(web, model=("net.onnx", onnx_model), calibration=("images.npz", images))
        named = {"model": f"job:{first['id']}", "calibration": f"job:{first['id']}", "config": CONFIG}
        assert web.post("/jobs", json=named).status_code == 202
        kept = artifacts.keys("jobs")
        refused = web.post("/jobs", json=named)
        assert (refused.status_code, refused.json()["code"]) == (403, "storage_quota_exceeded")
        assert artifacts.keys("jobs") == kept


@in_a_folder
def test_a_file_that_goes_while_it_is_taken(
    web: Client, onnx_model: bytes, images: bytes, sessions: sessionmaker[Session], artifacts: Artifacts
) -> None:
    first = submit(web, model=("net.onnx", onnx_model), calibration=("images.npz", images))
    with sessions.begin() as session:
        (file,) = earlier_files(session, None, {"model": first["id"]})
    web.delete(f"/jobs/{first['id']}").raise_for_status()
    with pytest.raises(JobFileMissingError, match=first["id"]):
        file.copy(artifacts, NO_JOB)
    with sessions.begin() as session:
        assert session.get(JobRecord, first["id"]) is None
        with pytest.raises(JobFileMissingError):
            earlier_files(session, None, {"model": first["id"]})

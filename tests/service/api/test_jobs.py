"""Submitting, following, cancelling and deleting jobs over HTTP."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx import Client, Response
from servers import STORES
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts, blocks_prefix
from service.jobs.queue import JobQueue
from service.jobs.repository import JobRepository
from service.jobs.states import JobState
from service.main import create_app
from service.settings import Settings

in_a_folder = pytest.mark.parametrize("storage", STORES[:1], indirect=True)  # decided before a store is asked

Submit = Callable[..., Response]
BITS = {"weight_bits": 2, "activation_bits": 2}


def stored(artifacts: Artifacts) -> list[str]:
    return [key.rpartition("/")[2] for key in artifacts.keys("jobs")]


def test_submitted_job_is_stored_queued_and_announced(
    submit: Submit, web: Client, artifacts: Artifacts, queue: JobQueue, onnx_model: bytes, images: bytes
) -> None:
    answer = submit(evaluation=images)
    assert answer.status_code == 202
    job = answer.json()
    assert answer.headers["location"] == f"/jobs/{job['id']}"
    assert int(answer.headers["retry-after"]) >= 1
    assert (job["state"], job["queue_position"]) == ("queued", 0)
    assert job["config"]["preset"] == "smoke"
    assert job["files"]["model"] == {
        "size": len(onnx_model),
        "sha256": hashlib.sha256(onnx_model).hexdigest(),
        "format": "onnx",
        "filename": "model",
    }
    assert sorted(stored(artifacts)) == ["calibration", "evaluation", "model"]
    assert queue.depth("cpu") == 1
    assert web.get(answer.headers["location"]).json() == job


def test_a_job_may_ask_for_a_device(submit: Submit, queue: JobQueue, sessions: sessionmaker[Session]) -> None:
    with sessions.begin() as session:
        JobRepository(session).note_worker("a", "cpu", "", timedelta(minutes=1))
    either, on_gpu = submit().json(), submit(device="gpu").json()
    assert (either["device"], either["workers"]) == (None, 1)
    assert (on_gpu["device"], on_gpu["workers"]) == ("gpu", 0)
    assert (queue.depth("cpu"), queue.depth("gpu")) == (1, 1)
    refused = submit(device="tpu")
    assert (refused.status_code, refused.json()["code"]) == (400, "form_invalid")
    assert "tpu" in refused.json()["detail"]


MODEL = b', "model": "sha256:%s"' % (b"0" * 64)
NAMED_TWICE = (
    b'{"calibration": "sha256:%s", "config": {"weight_bits": 2, "activation_bits": 2%%s}' % (b"0" * 64) + MODEL + b"%s}"
)
"""A job as JSON, with room for more keys in its config and in itself."""


@pytest.mark.parametrize(
    ("changes", "status", "code", "words"),
    [
        (
            {"config": {**BITS, "weigth_bits": 3}},
            422,
            "config_invalid",
            "weigth_bits: unknown key (did you mean weight_b",
        ),
        (
            {"config": {**BITS, "border": {"colour": 1}}},
            422,
            "config_invalid",
            "border.colour: unknown key (there are ",
        ),
        ({"config": {"weight_bits": 9, "activation_bits": 2}}, 422, "config_invalid", "2 to 8"),
        ({"config": {"weight_bits": 2}}, 422, "config_invalid", "activation_bits: missing"),
        ({"config": {**BITS, "protocol": "mqbench"}}, 422, "config_invalid", "protocol: Input should be 'paper', 'q"),
        (
            {"config": {**BITS, "protocol_switches": {"images": "float", "shortcut": "high"}}},
            422,
            "config_invalid",
            "protocol_switches.shortcut: Input should be 'float' or 'low', not \"high\"; protocol_switches.images: ",
        ),
        ({"config": {**BITS, "compare": ["nearest", "gptq"]}}, 422, "config_invalid", "compare.1: Input should be"),
        ({"config": {**BITS, "compare": ["aquant"]}}, 422, "config_invalid", '"aquant" would run twice'),
        ({"config": {"target": {"max_accuracy_drop": -1}}}, 422, "config_invalid", "target.max_accuracy_drop: Input"),
        ({"config": {"target": {"max_accuracy_drop": 1}, "compare": ["qdrop"]}}, 422, "config_invalid", "compare: met"),
        ({"config": "{"}, 422, "config_invalid", "Invalid JSON"),
        (
            {"config": '{"seed": 1, "weight_bits": 2, "seed": 2, "activation_bits": 2}'},
            422,
            "config_invalid",
            '"seed" tw',
        ),
        (
            {"config": '{"weight_bits": 2, "activation_bits": 2, "layers": {"fc": {}, "fc": {"weight_bits": 4}}}'},
            422,
            "config_invalid",
            'names "layers.fc" twice',
        ),
        ({"config": " " * 10_001}, 413, "upload_too_large", "`config` is larger than the 10000"),
        ({"config": None}, 422, "config_invalid", "no field `config`"),
        ({"model": None}, 400, "form_invalid", "no file `model`"),
        ({"calibration": None}, 400, "form_invalid", "no file `calibration`"),
        ({"modell": b"x"}, 400, "form_invalid", "'modell'"),
        ({"model": b""}, 422, "upload_empty", "`model` is empty"),
        ({"evaluation": b""}, 422, "upload_empty", "`evaluation` is empty"),
        ({"model": b"no model"}, 422, "model_invalid", "neither ONNX nor safetensors"),
        ({"model": bytes(2_000_001)}, 413, "upload_too_large", "`model` is larger than the 2000000"),
        ({"model": b"\x80\x04K\x01."}, 415, "model_format_unsupported", "pickle"),
        ({"calibration": b"no images"}, 422, "images_invalid", "calibration file is neither"),
    ],
)
def test_bad_submission_is_answered_and_leaves_nothing(
    submit: Submit,
    web: Client,
    settings: Settings,
    artifacts: Artifacts,
    queue: JobQueue,
    changes: dict[str, object],
    status: int,
    code: str,
    words: str,
) -> None:
    answer = submit(**changes)
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in problem["detail"]
    assert problem["remedy"]
    assert stored(artifacts) == []
    assert list((settings.data_dir / "artifacts/jobs").glob("*")) == []
    assert web.get("/jobs").json() == {"jobs": [], "next": None}
    assert queue.depth("cpu") == 0


def test_a_target_does_without_widths(submit: Submit, web: Client) -> None:
    answer = submit(config={"target": {"max_accuracy_drop": 0.5}})
    assert answer.status_code == 202
    config = web.get(answer.headers["location"]).json()["config"]
    assert config["target"] == {"max_accuracy_drop": 0.5}
    assert (config["weight_bits"], config["activation_bits"]) == (2, 2)


def test_methods_to_compare_and_a_protocol_are_kept(submit: Submit, web: Client) -> None:
    asked = {
        "method": "aquant",
        "compare": ["qdrop", "nearest"],
        "protocol": "qdrop",
        "protocol_switches": {"model_input": "high"},
        "preset": "paper",
    }
    answer = submit(config={**BITS, **asked})
    assert answer.status_code == 202
    config = web.get(answer.headers["location"]).json()["config"]
    unsaid = dict.fromkeys(("first_last_weights", "last_layer_input", "second_layer_input", "shortcut"))
    expected = asked | {"protocol_switches": {"model_input": "high", **unsaid}}
    assert {key: config[key] for key in asked} == expected
    assert config["border"]["fusion"] == "channel_mean"  # the paper's preset has it, and says so from here on


def test_state_dict_without_architecture(submit: Submit, state_dict: bytes) -> None:
    assert submit(model=state_dict).json()["code"] == "architecture_missing"
    assert submit(model=state_dict, config={**BITS, "architecture": "resnet18"}).status_code == 202


def test_onnx_with_an_architecture(submit: Submit) -> None:
    """Refused where it is sent, as arrays with ``preprocess`` are, and not when its turn comes."""
    answer = submit(config={**BITS, "architecture": "resnet18"})
    assert (answer.status_code, answer.json()["code"]) == (422, "model_invalid")
    assert "config.architecture" in answer.json()["detail"]


@in_a_folder
@pytest.mark.parametrize(
    ("content_type", "body", "status", "words"),
    [
        ("text/plain", b"{}", 415, "The content type is 'text/plain', not multipart/form-data"),
        (None, b"{}", 415, "The content type is missing, not multipart/form-data"),
        ("application/json", b"{}", 400, "model: missing; calibration: missing; config: missing"),
        ("application/json", NAMED_TWICE % (b"", b', "model": null'), 400, "model: Input should be a valid string"),
        ("application/json", NAMED_TWICE % (b"", MODEL), 400, 'names "model" twice'),
        ("application/json", NAMED_TWICE % (b', "seed": 1, "seed": 2', b""), 422, 'names "config.seed" twice'),
        ("application/json", b'{"x": ' + b"1" * 10_001, 413, "larger than the 10000 bytes"),
        ("multipart/form-data", b"x", 400, "no boundary"),
        ("multipart/form-data; boundary=b", b"nonsense", 400, "cannot be read"),
        ("multipart/form-data; boundary=b", b"", 400, "cut short"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="model"; filename="m"\r\n\r\n' + bytes(1000),
            400,
            "cut short",
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\n'
            b'{"weight_bits":2,"activation_bits":2}\r\n'
            b'--b\r\nContent-Disposition: form-data; name="config"\r\n\r\n{}\r\n--b--\r\n',
            400,
            "`config` twice",
        ),
    ],
)
def test_bad_form(
    web: Client, artifacts: Artifacts, content_type: str | None, body: bytes, status: int, words: str
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = web.post("/jobs", content=body, headers=headers)
    assert answer.status_code == status
    assert words in answer.json()["detail"]
    assert stored(artifacts) == []


def test_job_is_taken_in_while_the_broker_is_away(
    serve: Callable[[FastAPI], AbstractContextManager[Client]],
    settings: Settings,
    onnx_model: bytes,
    images: bytes,
) -> None:
    away = settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    files = {"config": (None, json.dumps(BITS)), "model": onnx_model, "calibration": images}
    with serve(create_app(away)) as web:
        assert web.post("/jobs", files=files).status_code == 202
        assert web.get("/jobs").json()["jobs"][0]["state"] == "queued"
        health = web.get("/health/ready")
    assert health.status_code == 503
    assert health.json()["code"] == "not_ready"
    assert health.json()["checks"] == {
        "database": "ok",
        "artifacts": "ok",
        "broker": "unavailable",
        "workers": "0 alive",
    }


def test_etag_and_long_poll(submit: Submit, web: Client, sessions: sessionmaker[Session]) -> None:
    url = submit().headers["location"]
    first = web.get(url)
    tag = {"If-None-Match": first.headers["etag"]}
    unchanged = web.get(url, headers=tag, params={"wait": 0.3})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    with sessions.begin() as session:
        job_id = first.json()["id"]
        assert JobRepository(session).claim(job_id, "me", timedelta(minutes=1)) is not None
    changed = web.get(url, headers=tag, params={"wait": 20})
    assert (changed.status_code, changed.json()["state"]) == (200, "running")
    assert changed.headers["etag"] != first.headers["etag"]
    assert web.get(url, params={"wait": 0.3}).json()["state"] == "running"


def test_list_pages_by_following_next(submit: Submit, web: Client) -> None:
    ids = [submit().json()["id"] for _ in range(5)]
    seen, url = [], "/jobs?limit=2&state=queued"
    while url:
        page = web.get(url).json()
        seen += [job["id"] for job in page["jobs"]]
        url = page["next"]
    assert seen == ids[::-1]
    assert web.get("/jobs?state=running").json()["jobs"] == []
    assert web.get("/jobs?cursor=zzz").json()["code"] == "cursor_invalid"
    assert web.get("/jobs?state=asleep").json()["code"] == "request_invalid"


def test_an_ended_job_has_no_seconds_left(submit: Submit, web: Client, sessions: sessionmaker[Session]) -> None:
    location = submit().headers["location"]
    with sessions.begin() as session:
        repository = JobRepository(session)
        claim = repository.claim(location.rpartition("/")[2], "me", timedelta(minutes=1))
        assert claim is not None
        forecast = {"seconds": 9.0, "peak_bytes": 2, "blocks": []}
        document = {"method": "qdrop", "eta_seconds": 7.5, "forecast": forecast}
        repository.renew(claim, timedelta(minutes=1), "reconstruct", document)
    progress = web.get(location).json()["progress"]
    assert (progress["method"], progress["eta_seconds"]) == ("qdrop", 7.5)
    with sessions.begin() as session:
        JobRepository(session).finish(
            claim, JobState.FAILED, "reconstruct", {"title": "", "code": "", "detail": "", "remedy": ""}
        )
    progress = web.get(location).json()["progress"]
    assert progress["eta_seconds"] is None
    assert progress["forecast"] == forecast


def test_cancel_and_delete(
    submit: Submit, web: Client, artifacts: Artifacts, sessions: sessionmaker[Session], tmp_path: Path
) -> None:
    queued, running = submit().headers["location"], submit().headers["location"]
    with sessions.begin() as session:
        JobRepository(session).claim(running.rpartition("/")[2], "me", timedelta(minutes=1))
    for job in (queued, running):  # as an earlier attempt leaves them
        block = tmp_path / "block"
        block.write_bytes(b"learned")
        artifacts.put_file(blocks_prefix(job.rpartition("/")[2]) + "0", block)
    assert web.post(f"{queued}/cancel").json()["state"] == "cancelled"
    assert artifacts.keys(blocks_prefix(queued.rpartition("/")[2])) == []
    assert "Ask again" not in web.get(f"{queued}/report").json()["remedy"]
    assert "error" not in web.get(f"{queued}/report").json()["remedy"]  # a cancelled job has none
    remedy = web.delete(running).json()
    assert remedy["code"] == "job_state_conflict"
    assert "Cancel it first" in remedy["remedy"]
    answer = web.post(f"{running}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (202, JobState.CANCELLING)
    assert artifacts.keys(blocks_prefix(running.rpartition("/")[2])) != []  # its worker still holds it
    answer = web.delete(running)
    assert (answer.status_code, answer.json()["remedy"]) == (409, "Delete it once it has stopped.")
    assert web.delete(queued).status_code == 204
    assert web.get(queued).status_code == 404
    assert web.delete(queued).json()["code"] == "job_not_found"
    assert {key.split("/")[1] for key in artifacts.keys("")} == {running.rpartition("/")[2]}

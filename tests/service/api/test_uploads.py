"""Large files are sent once, in pieces, and named by their digest."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx import Client, Response
from servers import PAIRS
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

import service.api.uploads
from service.artifacts import Artifacts
from service.jobs.queue import JobQueue
from service.jobs.reaper import Reaper
from service.jobs.records import UploadRecord
from service.jobs.repository import now
from service.main import create_app
from service.settings import Settings

in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

Serve = Callable[[FastAPI], AbstractContextManager[Client]]
CONFIG = {"weight_bits": 2, "activation_bits": 2}
DATA = random.Random(0).randbytes(1_000_000)


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


URL = f"/uploads/{digest_of(DATA)}"


def put(web: Client, start: int, stop: int, data: bytes = DATA, **headers: str) -> Response:
    return web.put(
        f"/uploads/{digest_of(data)}",
        content=data[start:stop],
        headers={"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}", **headers},
    )


def test_pieces_make_the_file_also_after_a_restart(
    web: Client, settings: Settings, serve: Serve, artifacts: Artifacts
) -> None:
    first = put(web, 0, 400_000)
    assert (first.status_code, first.json()["offset"], first.json()["complete"]) == (202, 400_000, False)
    assert first.headers["upload-offset"] == "400000"
    with serve(create_app(settings)) as restarted:
        head = restarted.head(URL)
        told = {name: head.headers[f"upload-{name}"] for name in ("offset", "length", "complete")}
        assert told == {"offset": "400000", "length": "1000000", "complete": "?0"}
        # The client did not see the answer to its first piece, and sends more than is missing.
        assert put(restarted, 100_000, 700_000).json()["offset"] == 700_000
        assert put(restarted, 100_000, 700_000).json()["offset"] == 700_000
        last = put(restarted, 700_000, 1_000_000)
    assert (last.status_code, last.json()["complete"]) == (201, True)
    assert web.get(URL).json() == last.json()
    (key,) = artifacts.keys("uploads")  # the pieces are gone
    assert artifacts.get_bytes(key) == DATA
    again = web.put(URL, content=DATA)
    assert (again.status_code, again.json()["complete"]) == (200, True)
    assert again.json()["expires_at"] > last.json()["expires_at"]
    assert artifacts.keys("uploads") == [key]


def test_a_whole_file_at_once(web: Client, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.api.uploads, "PIECE_BYTES", 300_000)  # so that it is written in four objects
    answer = web.put(URL, content=DATA)
    assert (answer.status_code, answer.json()["offset"]) == (201, 1_000_000)
    (key,) = artifacts.keys("uploads")
    assert artifacts.get_bytes(key) == DATA


@in_a_folder
def test_what_arrived_before_the_connection_broke_is_kept(web: Client) -> None:
    head = f"PUT {URL} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(DATA)}\r\n\r\n"
    with socket.create_connection((web.base_url.host, web.base_url.port or 80)) as line:
        line.sendall(head.encode() + DATA[:345_678])
    offset = 0
    while offset == 0:
        answer = web.head(URL)
        assert answer.status_code in (200, 404)
        offset = int(answer.headers.get("upload-offset", "0"))
        time.sleep(0.02)
    assert offset == 345_678
    assert web.put(URL, content=DATA).status_code == 201  # the whole again: what is there is passed over


MISFITS = [
    ("bytes 400001-500000/1000000", DATA[400_001:500_001], 409, "upload_offset_conflict"),
    ("bytes 400000-499999/1000001", DATA[400_000:500_000], 400, "content_range_invalid"),
    ("bytes 400000-499999/1000000", DATA[:10], 400, "content_range_invalid"),
    ("bytes 999999-1000000/1000000", DATA[:2], 400, "content_range_invalid"),
    ("bytes 5-4/1000000", b"", 400, "content_range_invalid"),
    ("bytes 400000-499999/*", DATA[400_000:500_000], 400, "content_range_invalid"),
    ("bytes=0-5", DATA[:6], 400, "content_range_invalid"),
    (f"bytes 0-5/{'9' * 5000}", DATA[:6], 400, "content_range_invalid"),
    ("bytes */1000000", DATA[:6], 400, "content_range_invalid"),
    ("bytes 0-0/2000001", DATA[:1], 400, "content_range_invalid"),
    ("bytes */0", b"", 422, "upload_empty"),
]


@in_a_folder
def test_a_piece_that_does_not_fit(web: Client, subtests: pytest.Subtests) -> None:
    put(web, 0, 400_000)
    for content_range, body, status, code in MISFITS:
        with subtests.test(content_range=content_range[:40]):
            answer = web.put(URL, content=body, headers={"Content-Range": content_range})
            assert (answer.status_code, answer.json()["code"]) == (status, code)
            assert web.get(URL).json()["offset"] == 400_000
            assert answer.json().get("offset", 400_000) == 400_000


@in_a_folder
def test_a_body_of_unknown_length(web: Client) -> None:
    chunks = [DATA[:300_000], DATA[300_000:]]
    assert web.put(URL, content=iter(chunks)).json()["code"] == "content_range_invalid"
    headers = {"Content-Range": "bytes 0-999999/1000000"}
    too_much = web.put(URL, content=iter([*chunks, b"more"]), headers=headers)
    assert too_much.json()["code"] == "content_range_invalid"
    too_little = put(web, 0, 5, b"1234567890")
    assert too_little.json()["offset"] == 5
    finish = web.put(URL, headers={"Content-Range": "bytes */1000000"})
    assert (finish.status_code, finish.json()["complete"]) == (201, True)


@in_a_folder
def test_too_large_a_file_is_refused_before_it_is_stored(web: Client, artifacts: Artifacts) -> None:
    answer = web.put(URL, content=bytes(2_000_001))
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
    answer = web.put(URL, content=b"x", headers={"Content-Range": "bytes 0-0/2000001"})
    assert (answer.status_code, answer.json()["code"]) == (413, "upload_too_large")
    assert web.get(URL).status_code == 404
    assert artifacts.keys("") == []


def test_another_file_than_was_announced_is_deleted(web: Client, artifacts: Artifacts) -> None:
    wrong = DATA[:400_000] + bytes(600_000)
    put(web, 0, 400_000)
    answer = web.put(URL, content=wrong)
    assert (answer.status_code, answer.json()["code"]) == (422, "digest_mismatch")
    assert digest_of(wrong) in answer.json()["detail"]
    assert web.get(URL).json()["code"] == "upload_not_found"
    assert artifacts.keys("") == []
    assert web.put(URL, content=DATA).status_code == 201


@in_a_folder
@pytest.mark.parametrize("name", ["x", "g" * 64, "A" * 64, digest_of(b"") + "0", "..%2f..%2fjobs"])
def test_a_name_that_is_no_digest(web: Client, name: str) -> None:
    assert web.put(f"/uploads/{name}", content=b"x").status_code in (404, 422)


def test_pieces_at_once_end_in_one_whole_file(web: Client, artifacts: Artifacts) -> None:
    """Several clients, or one that does not wait: each piece goes in once, and all get a true answer."""

    def send(_: int) -> set[int]:
        statuses, offset = set(), 0
        while offset < len(DATA):
            answer = put(web, offset, min(len(DATA), offset + 250_000))
            statuses.add(answer.status_code)
            document = answer.json()
            assert "offset" in document, document
            offset = document["offset"]
        return statuses

    with ThreadPoolExecutor(4) as pool:
        seen = set().union(*pool.map(send, range(4)))
    assert seen <= {200, 201, 202, 409}
    assert web.put(URL, headers={"Content-Range": "bytes */1000000"}).json()["complete"]
    (key,) = artifacts.keys("uploads")
    assert artifacts.get_bytes(key) == DATA


def upload(web: Client, data: bytes, headers: dict[str, str] | None = None) -> str:
    web.put(f"/uploads/{digest_of(data)}", content=data, headers=headers).raise_for_status()
    return f"sha256:{digest_of(data)}"


def test_jobs_name_uploads(
    web: Client, onnx_model: bytes, images: bytes, artifacts: Artifacts, queue: JobQueue
) -> None:
    model, calibration = upload(web, onnx_model), upload(web, images)
    names = {"model": "C:\\nets\\net.onnx", "evaluation": "of nothing"}
    body = {"model": model, "calibration": calibration, "filenames": names, "config": CONFIG}
    by_json = web.post("/jobs", json=body)
    form = {
        "model": (None, model),
        "calibration": images,
        "evaluation": (None, calibration),
        "config": (None, json.dumps(CONFIG)),
    }
    by_form = web.post("/jobs", files=form)
    assert (by_json.status_code, by_form.status_code) == (202, 202)
    assert by_json.json()["files"]["model"] == {
        "size": len(onnx_model),
        "sha256": digest_of(onnx_model),
        "format": "onnx",
        "filename": "net.onnx",
    }
    assert by_json.json()["name"] == "net.onnx"
    assert by_form.json()["name"] == model[:19]
    assert by_form.json()["files"].keys() == {"model", "calibration", "evaluation"}
    assert queue.depth("cpu") == 2
    assert len(artifacts.keys("uploads")) == 2
    assert len(artifacts.keys("jobs")) == 1
    model_url = model.replace("sha256:", "/uploads/")
    web.delete(by_json.headers["location"]).raise_for_status()
    assert web.get(model_url).json()["complete"]  # the other job uses it
    refused = web.delete(model_url)
    assert (refused.status_code, refused.json()["code"]) == (409, "upload_in_use")
    web.delete(by_form.headers["location"]).raise_for_status()
    assert web.delete(model_url).status_code == 204
    assert web.delete(model_url).status_code == 404
    assert len(artifacts.keys("uploads")) == 1


@in_a_folder
def test_a_form_says_what_its_files_are_called(web: Client, onnx_model: bytes, images: bytes) -> None:
    names = {"model": "C:\\nets\\net.onnx", "calibration": "images.npz", "evaluation": "of nothing"}
    said = (None, json.dumps(names))
    form = {
        "model": (None, upload(web, onnx_model)),
        "calibration": ("tmp123", images),
        "config": (None, json.dumps(CONFIG)),
    }
    for fields in ({"filenames": said, **form}, {**form, "filenames": said}):
        job = web.post("/jobs", files=fields).json()
        assert job["name"] == "net.onnx"
        assert {name: file["filename"] for name, file in job["files"].items()} == {
            "model": "net.onnx",
            "calibration": "images.npz",
        }
    for text, why in [
        ("net.onnx", "not valid"),
        ('["net.onnx"]', "not valid"),
        ('{"modell": "net.onnx"}', "modell"),
        ('{"model": 7}', "model"),
        ('{"model": "a", "model": "b"}', 'names "model" twice'),
    ]:
        refused = web.post("/jobs", files={**form, "filenames": (None, text)})
        assert (refused.status_code, refused.json()["code"]) == (400, "form_invalid")
        assert "`filenames`" in refused.json()["detail"]
        assert why in refused.json()["detail"]


REFUSED: list[tuple[dict[str, object], int, str]] = [
    ({"model": f"sha256:{'0' * 64}"}, 422, "upload_missing"),
    ({"model": f"sha256:{digest_of(DATA)}"}, 422, "upload_missing"),  # begun, not complete
    ({"model": "0" * 64}, 400, "form_invalid"),
    ({"model": None}, 400, "form_invalid"),
    ({"modell": "x"}, 400, "form_invalid"),
    ({"config": {**CONFIG, "weight_bits": 9}}, 422, "config_invalid"),
    ({"config": None}, 422, "config_invalid"),
    ({"device": "tpu"}, 400, "form_invalid"),
    ({"filenames": {"modell": "x"}}, 400, "form_invalid"),
    ({"webhook": {"url": "https://example.com"}}, 400, "form_invalid"),
    ({"webhook": {"url": "http://example.com", "secret": "x"}}, 422, "webhook_refused"),
]


@in_a_folder
def test_a_submission_that_names_what_is_not_there(
    web: Client, onnx_model: bytes, images: bytes, subtests: pytest.Subtests
) -> None:
    put(web, 0, 400_000)
    sound = {"model": upload(web, onnx_model), "calibration": upload(web, images), "config": CONFIG}
    for changes, status, code in REFUSED:
        with subtests.test(changes=changes):
            answer = web.post("/jobs", json={**sound, **changes})
            assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert web.get("/jobs").json()["jobs"] == []


@in_a_folder
def test_the_same_job_by_form_and_by_reference_is_the_same(web: Client, onnx_model: bytes, images: bytes) -> None:
    key = {"Idempotency-Key": "a-key"}
    form = {"model": onnx_model, "calibration": images, "config": (None, json.dumps(CONFIG))}
    first = web.post("/jobs", files=form, headers=key).json()["id"]
    body = {"model": upload(web, onnx_model), "calibration": upload(web, images), "config": CONFIG}
    assert web.post("/jobs", json=body, headers=key).json()["id"] == first


@in_a_folder
def test_uploads_are_their_owners(
    web: Client, onnx_model: bytes, images: bytes, make_key: Callable[..., dict[str, str]], artifacts: Artifacts
) -> None:
    ada, bob = make_key("ada"), make_key("bob")
    hers = {"model": upload(web, onnx_model, ada), "calibration": upload(web, images, ada), "config": CONFIG}
    refused = web.post("/jobs", json=hers, headers=bob)
    assert (refused.status_code, refused.json()["code"]) == (422, "upload_missing")
    assert web.put(f"/uploads/{digest_of(onnx_model)}", content=onnx_model, headers=bob).status_code == 201
    assert len(artifacts.keys("uploads")) == 3
    assert web.post("/jobs", json=hers, headers=ada).status_code == 202


@in_a_folder
def test_uploads_take_of_the_quota_once(serve: Serve, settings: Settings, onnx_model: bytes, images: bytes) -> None:
    room = len(onnx_model) + len(images)
    with serve(create_app(settings.model_copy(update={"max_stored_bytes": room}))) as web:
        body = {"model": upload(web, onnx_model), "calibration": upload(web, images), "config": CONFIG}
        for _ in range(2):
            assert web.post("/jobs", json=body).status_code == 202
        answer = web.put(URL, content=DATA[:1], headers={"Content-Range": "bytes 0-0/1000000"})
        assert (answer.status_code, answer.json()["code"]) == (403, "storage_quota_exceeded")


def test_abandoned_and_unused_uploads_expire(
    web: Client,
    settings: Settings,
    sessions: sessionmaker[Session],
    artifacts: Artifacts,
    queue: JobQueue,
    onnx_model: bytes,
    images: bytes,
) -> None:
    model, calibration, unused = upload(web, onnx_model), upload(web, images), upload(web, b"unused")
    put(web, 0, 400_000)
    job = web.post("/jobs", json={"model": model, "calibration": calibration, "config": CONFIG}).headers["location"]
    reaper = Reaper(settings, sessions, queue, artifacts)

    def grow_old() -> None:
        with sessions.begin() as session:
            session.execute(
                update(UploadRecord).values(touched_at=now() - timedelta(seconds=settings.upload_keep_seconds + 1))
            )

    def there() -> set[str]:
        names = {model, calibration, unused, f"sha256:{digest_of(DATA)}"}
        return {name for name in names if web.get(name.replace("sha256:", "/uploads/")).status_code == 200}

    reaper.round()
    assert len(there()) == 4
    grow_old()
    reaper.round()
    assert there() == {model, calibration}
    assert len(artifacts.keys("uploads")) == 2
    web.delete(job).raise_for_status()
    reaper.round()
    assert there() == set()
    assert artifacts.keys("") == []


@in_a_folder
def test_files_without_an_upload_are_swept(
    settings: Settings, sessions: sessionmaker[Session], artifacts: Artifacts, queue: JobQueue, web: Client,
    tmp_path: Path,
) -> None:  # fmt: skip
    upload(web, b"kept")
    (tmp_path / "lost").write_bytes(b"lost")
    artifacts.put_file("uploads/nobodys/0-1", tmp_path / "lost")
    for path in (settings.data_dir / "artifacts/uploads").rglob("*"):
        os.utime(path, (0, 0))
    Reaper(settings, sessions, queue, artifacts).sweep_orphans()
    (key,) = artifacts.keys("uploads")
    assert artifacts.get_bytes(key) == b"kept"

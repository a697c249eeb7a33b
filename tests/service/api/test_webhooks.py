"""Webhooks are told of the end of their jobs: signed, at least once, and nowhere that was not meant."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, hmac
from fastapi import FastAPI
from httpx import Client
from job_rows import finish
from servers import DATABASES, PAIRS
from sqlalchemy.orm import Session, sessionmaker
from webhook_receiver import Receiver, receiver

import service.api.deliveries
from service.api.deliveries import Deliveries
from service.jobs.records import JobRecord, WebhookRecord
from service.jobs.repository import JobRepository, now
from service.jobs.schemas import WebhookRequest
from service.jobs.states import JobState
from service.jobs.webhooks import new_webhook, sign
from service.main import create_app
from service.settings import Settings

every_database = pytest.mark.parametrize("storage", DATABASES, indirect=True)
in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

LOOPBACK = [ip_network("127.0.0.0/8"), ip_network("::1/128")]
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
AT_ONCE = (timedelta(0),) * 2


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    with receiver(tmp_path) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.authority))
        yield server


@pytest.fixture
def add_hooked(add_job: Callable[[], str], sessions: sessionmaker[Session]) -> Callable[[str], str]:
    """Puts in a job that a webhook is to be told of."""

    def add(url: str) -> str:
        job_id = add_job()
        with sessions.begin() as session:
            hook = WebhookRecord(job_id=job_id, message_id="msg_1", url=url, secret=SECRET, due_at=now(), tries=0)
            session.add(hook)
        return job_id

    return add


def deliver(sessions: sessionmaker[Session], allow: list[Any] = LOOPBACK, rounds: int = 1) -> None:
    async def run() -> None:
        deliveries = Deliveries(sessions, allow, AT_ONCE)
        for _ in range(rounds):
            await deliveries.round()
        await deliveries.close()

    asyncio.run(run())


def hook_of(sessions: sessionmaker[Session], job_id: str) -> WebhookRecord:
    with sessions() as session:
        return session.get_one(WebhookRecord, job_id)


@every_database
def test_a_submitted_job_tells_its_end(
    serve: Callable[[FastAPI], AbstractContextManager[Client]],
    settings: Settings,
    told: Receiver,
    onnx_model: bytes,
    images: bytes,
) -> None:
    webhook = {"url": told.url(), "secret": SECRET}
    form = {
        "config": (None, '{"weight_bits": 2, "activation_bits": 2}'),
        "webhook": (None, json.dumps(webhook)),
        "model": onnx_model,
        "calibration": images,
    }
    with serve(create_app(settings.model_copy(update={"webhook_allow": "127.0.0.0/8, ::1/128"}))) as web:
        answer = web.post("/jobs", files=form)
        assert answer.json()["webhook"] == {"url": told.url(), "tries": 0, "delivered_at": None, "error": None}
        assert SECRET not in answer.text
        job = answer.headers["location"]
        web.post(f"{job}/cancel").raise_for_status()
        while web.get(job).json()["webhook"]["delivered_at"] is None:
            time.sleep(0.05)
        document = web.get(job).json()
    (message,) = told.received
    body = json.loads(message.body)
    assert (message.path, body["type"]) == ("/told?of=jobs", "job.cancelled")
    assert body["data"] == {name: value for name, value in document.items() if name != "webhook"}
    assert message.headers["host"] == f"localhost:{told.port}"
    assert abs(int(message.headers["webhook-timestamp"]) - time.time()) < 60
    # As a receiver checks it, by another implementation.
    signed = f"{message.headers['webhook-id']}.{message.headers['webhook-timestamp']}.".encode() + message.body
    version, _, signature = message.headers["webhook-signature"].partition(",")
    checker = hmac.HMAC(base64.b64decode(SECRET.removeprefix("whsec_")), hashes.SHA256())
    checker.update(signed)
    checker.verify(base64.b64decode(signature))
    assert version == "v1"


def test_the_signature_is_that_of_the_standard() -> None:
    """The example of the Standard Webhooks libraries."""
    signature = sign(SECRET, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@every_database
def test_what_is_not_taken_is_sent_again_with_the_same_id(
    add_hooked: Callable[[str], str], sessions: sessionmaker[Session], told: Receiver
) -> None:
    job_id = add_hooked(told.url())
    deliver(sessions)
    assert told.received == []  # it has not ended
    finish(sessions, job_id, JobState.FAILED)
    told.answers += [500, 302]
    deliver(sessions, rounds=3)
    assert [message.headers["webhook-id"] for message in told.received] == ["msg_1"] * 3
    assert len({message.body for message in told.received}) == 1
    hook = hook_of(sessions, job_id)
    assert (hook.tries, hook.error, hook.due_at) == (3, None, None)
    assert hook.delivered_at is not None
    deliver(sessions)
    assert len(told.received) == 3


@in_a_folder
@pytest.mark.parametrize(
    ("answers", "tries", "error"), [([500] * 9, 3, "it answered 500"), ([410], 1, "it answered 410")]
)
def test_it_is_given_up_in_the_end(
    add_hooked: Callable[[str], str],
    sessions: sessionmaker[Session],
    told: Receiver,
    answers: list[int],
    tries: int,
    error: str,
) -> None:
    job_id = add_hooked(told.url())
    finish(sessions, job_id)
    told.answers += answers
    deliver(sessions, rounds=5)
    hook = hook_of(sessions, job_id)
    assert (len(told.received), hook.tries, hook.error, hook.due_at, hook.delivered_at) == (
        tries,
        tries,
        error,
        None,
        None,
    )


@in_a_folder
def test_a_slow_receiver_is_not_waited_for(
    add_hooked: Callable[[str], str],
    sessions: sessionmaker[Session],
    told: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service.api.deliveries, "DELIVERY_SECONDS", 0.3)
    told.hold = threading.Event()
    job_id = add_hooked(told.url())
    finish(sessions, job_id)
    deliver(sessions)
    assert "no answer" in (hook_of(sessions, job_id).error or "")


@every_database
def test_a_process_that_died_midway_costs_a_wait_not_the_message(
    add_hooked: Callable[[str], str], sessions: sessionmaker[Session], told: Receiver
) -> None:
    job_id = add_hooked(told.url())
    finish(sessions, job_id)
    with sessions.begin() as session:
        (job,) = service.api.deliveries.claim_due(session, 8, timedelta(seconds=30))
    assert job.id == job_id
    deliver(sessions)
    assert told.received == []  # it is held by the one that claimed it
    with sessions.begin() as session:
        session.get_one(WebhookRecord, job_id).due_at = now()
    deliver(sessions)
    assert len(told.received) == 1


@in_a_folder
def test_a_certificate_must_be_the_names(
    add_hooked: Callable[[str], str], sessions: sessionmaker[Session], told: Receiver
) -> None:
    job_id = add_hooked(told.url("127.0.0.1"))
    finish(sessions, job_id)
    deliver(sessions)
    assert told.received == []
    assert "certificate" in (hook_of(sessions, job_id).error or "").lower()


@in_a_folder
def test_private_addresses_are_refused_after_resolution(
    add_hooked: Callable[[str], str], sessions: sessionmaker[Session], told: Receiver
) -> None:
    job_id = add_hooked(told.url())
    finish(sessions, job_id)
    deliver(sessions, allow=[], rounds=3)
    assert told.received == []
    hook = hook_of(sessions, job_id)
    assert "not a public address" in (hook.error or "")
    assert (hook.tries, hook.due_at) == (1, None)


@in_a_folder
def test_the_address_that_was_checked_is_the_one_called(
    add_hooked: Callable[[str], str],
    sessions: sessionmaker[Session],
    told: Receiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name server that answers otherwise the second time gets nothing out of it; nor does one with two answers."""
    real, asked = socket.getaddrinfo, []

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("localhost", b"localhost"):
            asked.append(host)
            if len(asked) > 1:
                return real("127.0.0.2", *arguments, **options)
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    job_id = add_hooked(told.url())
    finish(sessions, job_id)
    deliver(sessions)
    assert (len(told.received), len(asked)) == (1, 1)

    def both(*arguments: Any, **options: Any) -> Any:
        return real("127.0.0.1", *arguments[1:], **options) + real("10.0.0.1", *arguments[1:], **options)

    monkeypatch.setattr(socket, "getaddrinfo", both)
    other = add_hooked(told.url())
    finish(sessions, other)
    deliver(sessions)
    assert len(told.received) == 1
    assert "10.0.0.1" in (hook_of(sessions, other).error or "")


@in_a_folder
def test_an_absent_receiver(
    add_hooked: Callable[[str], str], sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolve(host: Any, *arguments: Any, **options: Any) -> Any:
        if host in ("nobody.invalid", b"nobody.invalid"):  # without asking a name server
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    nowhere = add_hooked(f"https://localhost:{port}/")
    unknown = add_hooked("https://nobody.invalid/")
    for job_id in (nowhere, unknown):
        finish(sessions, job_id)
    deliver(sessions)
    assert "ConnectError" in (hook_of(sessions, nowhere).error or "")
    assert "cannot be resolved" in (hook_of(sessions, unknown).error or "")
    assert hook_of(sessions, unknown).due_at is not None


@in_a_folder
def test_a_deleted_job_tells_nobody(
    add_hooked: Callable[[str], str], sessions: sessionmaker[Session], told: Receiver
) -> None:
    job_id = add_hooked(told.url())
    finish(sessions, job_id)
    with sessions.begin() as session:
        JobRepository(session).delete(job_id)
    deliver(sessions)
    assert told.received == []
    with sessions() as session:
        assert session.get(JobRecord, job_id) is None


def test_webhooks_of_networks_that_the_operator_admits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUANT_WEBHOOK_ALLOW", "10.0.0.0/8,fd00::/8")
    allow = Settings().webhook_networks
    assert allow == [ip_network("10.0.0.0/8"), ip_network("fd00::/8")]
    assert new_webhook(WebhookRequest(url="https://10.1.2.3/", secret=SECRET), allow).url == "https://10.1.2.3/"
    monkeypatch.setenv("AQUANT_WEBHOOK_ALLOW", "10.0.0.1/8")
    with pytest.raises(ValueError, match="has host bits set"):
        Settings()

"""Who is let in: holders of a good key where there are keys, the machine itself where there are none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import pytest
import servers
from answers import refused
from fastapi import FastAPI
from httpx import Client
from sqlalchemy.orm import Session, sessionmaker
from starlette.requests import Request

from service.api.locality import check_keyless
from service.client import Client as ServiceClient
from service.client import ServiceProblemError
from service.jobs.errors import HostRefusedError, KeysRequiredError, OriginRefusedError
from service.jobs.keys import KeyRepository
from service.jobs.repository import JobRepository
from service.main import create_app
from service.settings import Settings

Sessions = sessionmaker[Session]
MakeKey = Callable[..., dict[str, str]]
Serve = Callable[[FastAPI], AbstractContextManager[Client]]

STRANGER = ("203.0.113.7", 40000)
HERE = ("127.0.0.1", 40000)


def ask(settings: Settings, method: str = "GET", **changes: Any) -> None:
    headers = {"host": "127.0.0.1:8000", **changes.pop("headers", {})}
    scope = {"type": "http", "method": method, "client": HERE, "server": ("127.0.0.1", 8000), **changes}
    scope["headers"] = [(name.encode(), value.encode()) for name, value in headers.items()]
    check_keyless(Request(scope), settings)


CLOSED, OPEN = Settings(), Settings(open=True, hosts="quant.example.org, other")


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "x-real-ip", "via", "x-forwarded-proto"])
def test_what_a_proxy_on_the_same_machine_passes_on_is_a_strangers(header: str) -> None:
    with pytest.raises(KeysRequiredError):
        ask(CLOSED, headers={header: "127.0.0.1"})
    ask(OPEN, headers={header: "127.0.0.1"})


@pytest.mark.parametrize(
    "ends",
    [
        {"client": STRANGER},
        {"client": ("172.17.0.1", 40000)},  # how a container sees its host
        {"server": ("192.168.0.7", 8000)},
        {"client": None},
        {"server": ("/run/aquant.sock", None)},
    ],
)
def test_strangers_are_refused_unless_the_service_is_open(ends: dict[str, Any]) -> None:
    for method in ("GET", "POST"):
        ask(CLOSED, method)
        with pytest.raises(KeysRequiredError, match="aquant keys create"):
            ask(CLOSED, method, **ends)
        ask(OPEN, method, **ends)


def test_in_a_container_the_published_address_decides() -> None:
    ends = {"client": ("172.17.0.1", 40000), "server": ("172.17.0.2", 8000)}
    ask(Settings(published_on="127.0.0.1"), "POST", **ends)
    for elsewhere in ("0.0.0.0", "192.168.0.7", "::"):
        with pytest.raises(KeysRequiredError):
            ask(Settings(published_on=elsewhere), **ends)
    with pytest.raises(KeysRequiredError):
        ask(Settings(published_on="127.0.0.1"), **ends, headers={"x-forwarded-for": "203.0.113.7"})


@pytest.mark.parametrize("settings", [CLOSED, OPEN])
def test_a_name_that_may_be_anybodys_is_refused(settings: Settings) -> None:
    """DNS rebinding: the page of evil.example.org finds its own name to be 127.0.0.1."""
    for host in (
        "evil.example.org",
        "evil.example.org:8000",
        "localhost.evil.example.org",
        "a@evil.example.org",
        "[::1",
    ):
        with pytest.raises(HostRefusedError, match="AQUANT_HOSTS"):
            ask(settings, headers={"host": host})
    for host in ("localhost:8000", "LOCALHOST", "[::1]:8000", "192.168.0.7", ""):
        ask(settings, headers={"host": host})


def test_names_of_the_service_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(OPEN, headers={"host": "Quant.Example.org:8000"})
    monkeypatch.setenv("AQUANT_HOSTS", "a.example,b.example")
    ask(Settings(), headers={"host": "b.example"})


FOREIGN = [
    {"origin": "https://evil.example.org"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:3000"},  # another server of the same machine
    {"origin": "http://127.0.0.1:8000", "sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://[::1"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize("settings", [CLOSED, OPEN])
def test_pages_of_other_sites_change_nothing(headers: dict[str, str], settings: Settings) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        with pytest.raises(OriginRefusedError):
            ask(settings, method, headers=headers)
    ask(settings, "GET", headers=headers)  # a browser keeps the answer from them


@pytest.mark.parametrize(
    "headers",
    [{}, {"origin": "http://127.0.0.1:8000"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}],
)
def test_programs_and_its_own_pages_may(headers: dict[str, str]) -> None:
    ask(CLOSED, "POST", headers=headers)


def test_refusals_are_problems(web: Client) -> None:
    refused(web.get("/jobs", headers={"X-Forwarded-For": "203.0.113.7"}), 403, "keys_required")
    refused(web.get("/jobs", headers={"Host": "evil.example.org"}), 403, "host_refused")
    refused(web.post("/jobs", headers={"Origin": "https://evil.example.org"}), 403, "origin_refused")
    assert web.get("/jobs").status_code == 200


def test_with_the_first_key_the_door_is_shut(web: Client, make_key: MakeKey, sessions: Sessions) -> None:
    assert web.get("/jobs").status_code == 200
    assert web.get("/jobs", headers={"Authorization": "Bearer of another service"}).status_code == 200
    headers = make_key()
    missing = web.get("/jobs")
    refused(missing, 401, "key_missing")
    assert missing.headers["www-authenticate"] == 'Bearer realm="aquant"'
    assert web.get("/jobs", headers=headers).status_code == 200
    # From anywhere, by any name: who has a key needs no other credentials.
    elsewhere = {"Host": "quant.example.org", "X-Forwarded-For": "203.0.113.7", "Origin": "https://other.example.org"}
    assert web.get("/jobs", headers=headers | elsewhere).status_code == 200
    with sessions.begin() as session:
        KeyRepository(session).revoke("a-key")
    gone = web.get("/jobs", headers=headers)
    assert "was revoked" in refused(gone, 401, "key_invalid")["detail"]
    assert 'error="invalid_token"' in gone.headers["www-authenticate"]
    refused(web.get("/jobs"), 401, "key_missing")  # and it stays shut


@pytest.mark.parametrize("storage", servers.DATABASES, indirect=True)
def test_what_is_no_good_key_is_refused(web: Client, make_key: MakeKey) -> None:
    good = make_key()["Authorization"]
    for value in ("Bearer", "Bearer x", good[:-1], good + "x", "Bearer \xe4\xf6\xfc"):
        answer = web.get("/jobs", headers=[(b"Authorization", value.encode("latin-1"))])
        assert refused(answer, 401, answer.json()["code"])["code"] in ("key_missing", "key_invalid")
    refused(web.get("/jobs", headers={"Authorization": good.replace("Bearer", "Basic")}), 401, "key_missing")
    refused(web.get("/jobs", headers=make_key(seconds=-1)), 401, "key_invalid")
    assert web.get("/jobs", headers={"Authorization": good.replace("Bearer", "bearer")}).status_code == 200


def test_a_key_is_in_no_log_and_no_answer(
    web: Client, make_key: MakeKey, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = []
    for headers in (make_key(), make_key(seconds=-1), {"Authorization": "Bearer aquant_0123456789ab_" + "S" * 43}):
        secret = headers["Authorization"][-20:]
        for method, path in (("GET", "/jobs"), ("GET", "/jobs?limit=x"), ("POST", "/jobs"), ("GET", "/nowhere")):
            answers.append(web.request(method, path, headers=headers))
        out = capfd.readouterr()
        assert secret not in caplog.text + out.out + out.err + "".join(answer.text for answer in answers)
    assert {answer.status_code for answer in answers} == {200, 400, 401, 404, 415, 422} - {400}


def test_metrics_take_a_key_made_for_them(web: Client, make_key: MakeKey) -> None:
    assert web.get("/metrics").status_code == 200
    jobs, metrics = make_key(), make_key(scope="metrics")
    refused(web.get("/metrics"), 401, "key_missing")
    assert web.get("/metrics", headers=metrics).status_code == 200
    assert "for jobs" in refused(web.get("/metrics", headers=jobs), 403, "key_scope_insufficient")["detail"]
    assert "for metrics" in refused(web.get("/jobs", headers=metrics), 403, "key_scope_insufficient")["detail"]


def test_probes_need_no_key_and_tell_strangers_no_names(web: Client, make_key: MakeKey, sessions: Sessions) -> None:
    with sessions.begin() as session:
        JobRepository(session).note_worker("secret-host:1", "cpu", "a device", timedelta(minutes=1))
    proxied = {"X-Forwarded-For": "203.0.113.7"}
    for trusted, others in (({}, proxied), (None, {})):
        trusted = make_key() if trusted is None else trusted
        assert web.get("/health/live", headers=others).status_code == 200
        full, short = (web.get("/health/ready", headers=each).json() for each in (trusted, others))
        assert [worker["name"] for worker in full["workers"]] == ["secret-host:1"]
        assert short == full | {"workers": []}
        assert short["checks"]["workers"] == "1 alive"


@pytest.mark.parametrize("storage", servers.DATABASES[:1], indirect=True)
def test_too_many_requests_of_an_owner_wait_and_others_do_not(
    settings: Settings, make_key: MakeKey, serve: Serve
) -> None:
    limited = settings.model_copy(update={"reads_per_minute": 5, "writes_per_minute": 2})
    ada, also_ada, bob = make_key(), make_key(), make_key(owner="bob")
    # Two processes, say: they count together.
    with serve(create_app(limited)) as one, serve(create_app(limited)) as two:
        for web in (one, two, one, two, one):
            assert web.get("/jobs", headers=ada).status_code == 200
        answer = two.get("/jobs", headers=also_ada)
        document = refused(answer, 429, "rate_limited")
        assert (document["limit"], document["used"]) == (5, 5)
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert one.get("/jobs", headers=bob).status_code == 200
        assert one.get("/health/ready", headers=ada).status_code == 200
        # Writes are counted for themselves; guesses by address.
        codes = [one.post("/jobs/x/cancel", headers=ada).status_code for _ in range(3)]
        assert codes == [404, 404, 429]
        codes = [one.get("/jobs", headers={"Authorization": "Bearer x"}).status_code for _ in range(6)]
        assert codes == [401] * 5 + [429]


@pytest.mark.parametrize("storage", servers.DATABASES[:1], indirect=True)
def test_without_the_broker_each_process_counts_its_own(settings: Settings, serve: Serve) -> None:
    limited = settings.model_copy(update={"reads_per_minute": 3, "broker_url": "redis://127.0.0.1:1/0"})
    with serve(create_app(limited)) as one, serve(create_app(limited)) as two:
        assert [one.get("/jobs").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert two.get("/jobs").status_code == 200


@pytest.mark.parametrize("storage", servers.DATABASES[:1], indirect=True)
def test_no_limit_can_be_set(settings: Settings, serve: Serve) -> None:
    with serve(create_app(settings.model_copy(update={"reads_per_minute": 0}))) as web:
        assert {web.get("/jobs").status_code for _ in range(20)} == {200}


def test_the_client_sends_its_key_and_tells_what_was_wrong(
    web: Client, make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = make_key()["Authorization"].removeprefix("Bearer ")
    url = str(web.base_url)
    with ServiceClient(url) as client, pytest.raises(ServiceProblemError, match="AQUANT_API_KEY or --key"):
        client.list()
    with ServiceClient(url, key=token) as client:
        assert client.list().jobs == []
    monkeypatch.setenv("AQUANT_API_KEY", token + "\n")  # as read from a file
    with ServiceClient(url) as client:
        assert client.list().jobs == []
    with ServiceClient(url, key=token[:-1]) as client, pytest.raises(ServiceProblemError) as caught:
        client.list()
    assert caught.value.problem.code == "key_invalid"


@pytest.mark.parametrize("storage", servers.DATABASES[:1], indirect=True)
def test_a_refused_upload_gets_its_answer(settings: Settings, make_key: MakeKey, serve: Serve, tmp_path: Any) -> None:
    """It is refused before it is read; a client that is still sending must not see a broken line instead."""
    make_key()
    big = tmp_path / "model.onnx"
    big.write_bytes(bytes(50_000_000))
    with (
        serve(create_app(settings)) as web,
        ServiceClient(str(web.base_url)) as client,
        pytest.raises(ServiceProblemError) as caught,
    ):
        client.submit(big, big, {"weight_bits": 2, "activation_bits": 2})
    assert caught.value.problem.code == "key_missing"


def test_by_default_a_crowd_may_follow_its_jobs() -> None:
    """200 clients behind one address, each asking every 2 seconds, and as much again for what else they do."""
    assert Settings().reads_per_minute >= 2 * 200 * 60 / 2

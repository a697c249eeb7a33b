"""What is sent again and when, what is not, and keys that are none."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import (
    AddressMalformedError,
    AsyncClient,
    Client,
    JobIdMalformedError,
    KeyMalformedError,
    ServiceProblemError,
    ServiceUnreachableError,
)
from service.client.exchanges import job_path
from service.jobs.submission import new_job_id

Connect = Callable[..., Any]
Outcome = httpx.Response | Exception

ID = "0123456789abcdef01234567"
JOB = {
    "id": ID,
    "state": "cancelled",
    "created_at": "2026-01-01T00:00:00Z",
    "config": {"weight_bits": 2, "activation_bits": 2},
    "links": {"self": f"/jobs/{ID}", "events": f"/jobs/{ID}/events"},
}
PAGE = {"jobs": [], "next": None}


def refusal(status: int, after: str | None, code: str = "rate_limited") -> httpx.Response:
    document = {"title": "No", "status": status, "code": code, "detail": "Too many.", "remedy": "Wait."}
    headers = {"Content-Type": "application/problem+json", **({} if after is None else {"Retry-After": after})}
    return httpx.Response(status, json=document, headers=headers)


class Service:
    """Has these answers in turn, and keeps the requests."""

    def __init__(self, *outcomes: Outcome) -> None:
        self.left = list(outcomes)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        outcome = self.left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def reached_by(self, connect: Connect) -> Any:
        return connect("http://service", transport=httpx.MockTransport(self))


@pytest.mark.parametrize("status", [429, 503])
def test_what_is_refused_for_now_is_asked_again_when_it_may_be(
    connect: Connect, slept: list[float], status: int
) -> None:
    in_ten = format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)
    past = "Wed, 21 Oct 2015 07:28:00 GMT"
    service = Service(*(refusal(status, after) for after in ("7", "0", in_ten, past)), httpx.Response(200, json=PAGE))
    assert service.reached_by(connect).list().jobs == []
    assert slept[:2] == [7, 1]
    assert 1 < slept[2] <= 10
    assert slept[3:] == [1]


def test_nobody_waits_for_ever(connect: Connect, slept: list[float]) -> None:
    with pytest.raises(ServiceProblemError, match=r"Too many\. Wait\."):
        Service(refusal(429, "40"), refusal(429, "40")).reached_by(connect).list()
    with pytest.raises(ServiceProblemError):
        Service(refusal(503, "3600")).reached_by(connect).list()
    with pytest.raises(ServiceProblemError):
        Service(refusal(429, "soon")).reached_by(connect).list()
    assert slept == [40]


def test_a_refusal_for_good_is_not_repeated(connect: Connect, slept: list[float]) -> None:
    for status in (409, 422, 500, 503):
        with pytest.raises(ServiceProblemError):
            Service(refusal(status, None)).reached_by(connect).cancel(ID)
    assert slept == []


def test_a_broken_connection_is_tried_again_less_and_less_often(connect: Connect, slept: list[float]) -> None:
    lost = [httpx.ReadError("gone"), httpx.Response(502, text="Bad Gateway"), httpx.ConnectError("refused")]
    service = Service(*lost, httpx.Response(202, json=JOB))
    assert service.reached_by(connect).cancel(ID).state == "cancelled"
    assert slept == [0.5, 1, 2]
    never_again = Service(*[httpx.ReadTimeout("silent")] * 99)
    with pytest.raises(ServiceUnreachableError, match="ReadTimeout"):
        never_again.reached_by(connect).get(ID)
    assert sum(slept[3:]) <= 60
    assert len(never_again.requests) == len(slept[3:]) + 1


def test_where_nobody_was_ever_there_nobody_is_waited_for(connect: Connect, slept: list[float]) -> None:
    with pytest.raises(ServiceUnreachableError, match="aquant up"):
        Service(httpx.ConnectError("refused")).reached_by(connect).get(ID)
    assert slept == []


def test_a_job_that_the_first_try_has_deleted_is_deleted(connect: Connect, slept: list[float]) -> None:
    missing = refusal(404, None, "job_not_found")
    for lost in (httpx.ReadError("gone"), httpx.Response(502, text="<html>"), httpx.Response(504)):
        Service(lost, missing).reached_by(connect).delete(ID)
    with pytest.raises(ServiceProblemError):
        Service(missing).reached_by(connect).delete(ID)
    assert slept == [0.5, 0.5, 0.5]


def test_health_is_what_it_is_now(connect: Connect, slept: list[float]) -> None:
    document = {"title": "x", "code": "not_ready", "detail": "x", "remedy": "x", "checks": {"broker": "unavailable"}}
    headers = {"Content-Type": "application/problem+json", "Retry-After": "5"}
    health = Service(httpx.Response(503, json=document, headers=headers)).reached_by(connect).health()
    assert (health.status, health.checks) == ("unavailable", {"broker": "unavailable"})
    assert slept == []


def test_other_servers_are_told_from_the_service(connect: Connect, tmp_path: Path) -> None:
    with pytest.raises(ServiceUnreachableError, match="answered 404 without a problem document"):
        Service(httpx.Response(404, text="<html>")).reached_by(connect).get(ID)
    with pytest.raises(
        ServiceUnreachableError, match=rf"sends on to https://service/jobs/{ID}\. Name the service's own"
    ):
        Service(httpx.Response(301, headers={"Location": f"https://service/jobs/{ID}"})).reached_by(connect).delete(ID)
    elsewhere = httpx.Response(302, headers={"Location": "https://service/login"})
    with pytest.raises(ServiceUnreachableError, match="sends on to https://service/login"):
        Service(elsewhere).reached_by(connect).download(ID, tmp_path / "x")
    with pytest.raises(ServiceUnreachableError, match="sends on to https://service/login"):
        list(Service(elsewhere).reached_by(connect).events(ID))
    with pytest.raises(ServiceUnreachableError, match="answered without the file's digest"):
        Service(httpx.Response(200, text="<html>")).reached_by(connect).download(ID, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    for call in ("get", "wait", "report", "cancel", "delete"):
        with pytest.raises(ServiceUnreachableError, match=r"answered with .*; is it an AQuant service"):
            getattr(Service(httpx.Response(200, text="<html>")).reached_by(connect), call)(ID)
    for call in ("list", "health"):
        with pytest.raises(ServiceUnreachableError, match=r"answered with .*; is it an AQuant service"):
            getattr(Service(httpx.Response(200, text="{}")).reached_by(connect), call)()
    with pytest.raises(ServiceUnreachableError, match="a job without its ETag"):
        Service(httpx.Response(200, json=JOB)).reached_by(connect).wait(ID)


@pytest.mark.parametrize(
    "said", ["", ".", "..", "x", "../health/ready", "x?y#z", ID.upper(), ID[1:], ID + "0", ID + "\n", f" {ID}"]
)
def test_an_id_that_is_none_is_not_asked_for(connect: Connect, tmp_path: Path, said: str) -> None:
    service = Service()
    for call in ("get", "wait", "report", "report_page", "cancel", "delete"):
        with pytest.raises(JobIdMalformedError, match=r"is no id of a job, which has 24 .* `aquant submit` prints it"):
            getattr(service.reached_by(connect), call)(said)
    for follow in ("watch", "events"):
        with pytest.raises(JobIdMalformedError):
            list(getattr(service.reached_by(connect), follow)(said))
    with pytest.raises(JobIdMalformedError):
        service.reached_by(connect).download(said, tmp_path / "x")
    assert service.requests == []


def test_ids_of_jobs_are_none_of_those() -> None:
    assert job_path(new_job_id(), "/cancel").endswith("/cancel")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://service", "http://", "http://[::1", "", "http://a:b"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_an_address_that_is_none_is_refused(kind: type[Client | AsyncClient], url: str) -> None:
    with pytest.raises(AddressMalformedError, match=r"is no address of a service .* Write it as http://127"):
        kind(url)


@pytest.mark.parametrize("key", ["aquant_a b", "aquant_\r\nX-Other: y", "aquant_\N{SNOWMAN}", "aquant_\x7f"])
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_a_key_that_is_none_is_refused_and_not_repeated(kind: type[Client | AsyncClient], key: str) -> None:
    with pytest.raises(KeyMalformedError, match="AQUANT_API_KEY") as caught:
        kind(key=key)
    assert key not in str(caught.value)

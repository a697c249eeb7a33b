"""The client against answers that a service gives when it is asked too often, and with keys that are none."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import pytest

from service import client as module
from service.client import Client, KeyMalformedError, ServiceProblemError

LIMITED = {
    "title": "Too Many Requests",
    "status": 429,
    "code": "rate_limited",
    "detail": "Too many.",
    "remedy": "Wait.",
}

Service = Callable[..., Client]


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(module.time, "sleep", pauses.append)
    return pauses


@pytest.fixture
def service() -> Iterator[Service]:
    """A client of a service that refuses with each of these Retry-After fields in turn, and then has a page."""
    clients: list[Client] = []

    def make(*refusals: str) -> Client:
        left = list(refusals)

        def answer(_: httpx.Request) -> httpx.Response:
            if not left:
                return httpx.Response(200, json={"jobs": [], "next": None})
            headers = {"Retry-After": left.pop(0), "Content-Type": "application/problem+json"}
            return httpx.Response(429, json=LIMITED, headers=headers)

        clients.append(Client("http://service", transport=httpx.MockTransport(answer)))
        return clients[-1]

    yield make
    for client in clients:
        client.__exit__(None, None, None)


def test_a_question_that_was_one_too_many_is_asked_again_when_it_may_be(service: Service, slept: list[float]) -> None:
    assert service("7", "0").list().jobs == []
    assert slept == [7, 1]


def test_nobody_waits_for_ever(service: Service, slept: list[float]) -> None:
    with pytest.raises(ServiceProblemError, match=r"Too many\. Wait\."):
        service("40", "40").list()
    with pytest.raises(ServiceProblemError):
        service("3600").list()
    with pytest.raises(ServiceProblemError):
        service("Wed, 21 Oct 2026 07:28:00 GMT").list()
    assert slept == [40]


def test_what_changes_something_is_not_sent_twice(service: Service, slept: list[float]) -> None:
    with pytest.raises(ServiceProblemError) as caught:
        service("1").cancel("x")
    assert caught.value.problem.code == "rate_limited"
    assert slept == []


@pytest.mark.parametrize("key", ["aquant_a b", "aquant_\r\nX-Other: y", "aquant_\N{SNOWMAN}", "aquant_\x7f"])
def test_a_key_that_is_none_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(KeyMalformedError, match="AQUANT_API_KEY") as caught:
        Client(key=key)
    assert key not in str(caught.value)

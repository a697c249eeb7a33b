"""Signing in to the page with a key and out again: what is kept of it, what is refused, and where it leads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from httpx import Client, Response
from outline import Outline
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.keys import KeyRepository

pytestmark = pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)

Headers = dict[str, str]
OWN = {"Sec-Fetch-Site": "same-origin"}


def signed_in(web: Client, **fields: str) -> Response:
    return web.post("/page/sign-in", data=fields, headers=OWN)


def test_signing_in_and_out(web: Client, hers: dict[str, str], ada: Headers) -> None:
    key = ada["Authorization"].removeprefix("Bearer ")
    assert "API key" in web.get("/", follow_redirects=True).text
    answer = signed_in(web, key=f" {key} ", next=f"/page/jobs/{hers['failed']}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/page/jobs/{hers['failed']}")
    attributes = answer.headers["set-cookie"].replace(f"aquant-key={key}; ", "").lower()
    assert sorted(attributes.split("; ")) == ["httponly", "path=/", "samesite=strict"]
    page = web.get("/").text  # the client keeps cookies, as a browser does
    assert page.count("of-ada.onnx</a>") == len(hers)
    assert "Sign out" in page
    assert key not in page
    out = web.post("/page/sign-out", headers=OWN)
    assert out.headers["location"] == "/"
    assert "aquant-key" not in web.cookies
    assert web.get("/").headers["location"] == "/page/sign-in?next=%2F"


def test_over_https_the_cookie_is_for_https_alone(web: Client, ada: Headers) -> None:
    """As behind a proxy that took the TLS off: the browser still says what it sees."""
    key = ada["Authorization"].removeprefix("Bearer ")
    origin = f"https://{web.base_url.host}:{web.base_url.port}"
    answer = web.post("/page/sign-in", data={"key": key}, headers={"Origin": origin})
    assert answer.headers["set-cookie"].startswith(f"__Host-aquant-key={key}; ")
    assert "; Secure" in answer.headers["set-cookie"]
    both = {"Cookie": f"aquant-key=aquant_of-another; __Host-aquant-key={key}"}
    assert web.get("/", headers=both).status_code == 200


def test_bad_keys_are_refused_in_words(
    web: Client, ada: Headers, make_key: Callable[..., Headers], sessions: sessionmaker[Session]
) -> None:
    def problem(answer: Response) -> str:
        assert "set-cookie" not in answer.headers
        return Outline(answer.text).words

    key = ada["Authorization"].removeprefix("Bearer ")
    refused = problem(signed_in(web, key=key[:-1] + "!"))
    assert "not one of this service" in refused
    assert "Authorization" not in refused
    assert "needs an API key" in problem(signed_in(web, key=""))
    metrics = make_key("ada", scope="metrics")["Authorization"].removeprefix("Bearer ")
    assert "is for metrics" in problem(signed_in(web, key=metrics))
    assert signed_in(web, key="x" * 5000).status_code == 413
    assert signed_in(web, key=key).status_code == 303
    with sessions.begin() as session:
        KeyRepository(session).revoke(key.split("_")[1])
    assert "was revoked" in web.get("/", follow_redirects=True).text
    assert "aquant-key" in web.cookies
    web.post("/page/sign-out", headers=OWN)
    assert "aquant-key" not in web.cookies


@pytest.mark.parametrize(
    "place", ["https://evil.example/", "//evil.example", "/\\evil.example", "\\\\evil.example", "javascript:1", "/a\nb"]
)
def test_signing_in_leads_nowhere_else(web: Client, ada: Headers, place: str) -> None:
    key = ada["Authorization"].removeprefix("Bearer ")
    assert signed_in(web, key=key, next=place).headers["location"] == "/"
    assert web.get("/page/sign-in", params={"next": place}).headers["location"] == "/"


def test_without_keys_nobody_signs_in(web: Client) -> None:
    assert web.get("/").status_code == 200
    assert web.get("/page/sign-in").headers["location"] == "/"
    answer = signed_in(web, key="anything")
    assert answer.headers["location"] == "/"
    assert "set-cookie" not in answer.headers

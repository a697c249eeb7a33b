"""The id that a request carries through answers and log lines."""

from __future__ import annotations

import re

import pytest
from fastapi import FastAPI
from httpx import Client

MADE = re.compile(r"[0-9a-f]{16}")


@pytest.mark.parametrize("sent", ["abc-123", "0.1_A", "x" * 64])
def test_a_sane_id_is_kept(web: Client, sent: str) -> None:
    assert web.get("/health/live", headers={"X-Request-ID": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", [None, "", "x" * 65, "a b", 'a"b', "ü".encode(), "{}"])
def test_any_other_is_replaced(web: Client, sent: str | bytes | None) -> None:
    headers = {} if sent is None else {"X-Request-ID": sent}
    first, second = (web.get("/health/live", headers=headers).headers["x-request-id"] for _ in range(2))
    assert MADE.fullmatch(first)
    assert MADE.fullmatch(second)
    assert first != second


def test_problems_have_it_too(web: Client, application: FastAPI) -> None:
    assert web.get("/jobs/none", headers={"X-Request-ID": "mine"}).headers["x-request-id"] == "mine"
    application.state.parts = "broken"
    answer = web.get("/jobs", headers={"X-Request-ID": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert "X-Request-ID" in answer.json()["remedy"]

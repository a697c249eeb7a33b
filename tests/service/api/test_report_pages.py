"""The report as JSON or as a page: who gets which, and what a page comes with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from httpx import Client
from job_rows import finish, stored
from old_reports import old_report
from servers import PAIRS
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.report.page import content_policy, render
from service.api.report_pages import prefers_page
from service.artifacts import Artifacts
from service.client import Client as ServiceClient

on_one_store = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)  # it has no say in this

CHROMIUM = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,image/apng,*/*;q=0.8"


@pytest.mark.parametrize(
    ("accept", "page"),
    [
        (None, False),
        ("*/*", False),
        ("application/json", False),
        ("text/html", True),
        (CHROMIUM, True),
        ("text/*", True),
        ("TEXT/HTML; charset=utf-8", True),
        ("text/html, application/json", False),
        ("text/html;q=0.5, application/json;q=0.4", True),
        ("text/html;q=0, */*", False),
        ("application/*;q=0.2, text/html;q=0.3", True),
        ("text/html;q=x", False),
        ("image/png", False),
    ],
)
def test_who_would_rather_have_a_page(accept: str | None, page: bool) -> None:
    assert prefers_page(accept) == page


@pytest.fixture
def publish(sessions: sessionmaker[Session], artifacts: Artifacts, add_job: Callable[[], str]) -> Callable[[Any], str]:
    """A job that succeeded with the report given; its id."""

    def add(report: Any) -> str:
        job_id = add_job()
        finish(sessions, job_id, results=stored(artifacts, job_id, {"report": json.dumps(report).encode()}))
        return job_id

    return add


@pytest.fixture
def job(publish: Callable[[Any], str]) -> str:
    return publish(old_report())


@on_one_store
def test_the_page_and_the_json_are_told_apart(web: Client, job: str) -> None:
    document = web.get(f"/jobs/{job}/report")
    page = web.get(f"/jobs/{job}/report", headers={"Accept": CHROMIUM})
    assert document.json() == old_report()
    assert document.headers["content-type"] == "application/json"
    finished = web.get(f"/jobs/{job}").json()["finished_at"]
    assert page.text == render(old_report(), f"Job {job}, finished {finished[:10]} {finished[11:16]} UTC.")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == document.headers["vary"] == "Accept"
    assert page.headers["etag"] == f'"{hashlib.sha256(page.content).hexdigest()}"' != document.headers["etag"]
    assert page.headers["content-security-policy"].startswith(content_policy())
    assert page.headers["x-content-type-options"] == "nosniff"


@on_one_store
def test_either_is_revalidated_by_its_own_tag(web: Client, job: str) -> None:
    for accept in ("text/html", "application/json"):
        headers = {"Accept": accept}
        tag = web.get(f"/jobs/{job}/report", headers=headers).headers["etag"]
        again = web.get(f"/jobs/{job}/report", headers=headers | {"If-None-Match": tag})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    page = web.get(f"/jobs/{job}/report", headers={"Accept": "text/html", "If-None-Match": tag})  # the JSON's
    assert page.status_code == 200


@on_one_store
def test_a_report_that_cannot_be_shown_is_given_as_it_is(web: Client, publish: Callable[[Any], str]) -> None:
    answer = web.get(f"/jobs/{publish({'seed': 0})}/report", headers={"Accept": "text/html"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"seed": 0}


@on_one_store
def test_the_client_fetches_the_page(web: Client, job: str) -> None:
    with ServiceClient(str(web.base_url)) as client:
        assert client.report_page(job) == web.get(f"/jobs/{job}/report", headers={"Accept": "text/html"}).text
        assert client.report(job) == old_report()


@on_one_store
def test_the_api_describes_the_report(web: Client) -> None:
    document = web.get("/openapi.json").json()
    answer = document["paths"]["/jobs/{job_id}/report"]["get"]["responses"]["200"]["content"]
    assert set(answer) == {"application/json", "text/html"}
    alternatives = [{"$ref": f"#/components/schemas/{name}"} for name in ("Report", "Plan")]
    assert answer["application/json"]["schema"]["anyOf"] == alternatives
    layers = document["components"]["schemas"]["Report"]["properties"]["layers"]
    assert layers["items"] == {"$ref": "#/components/schemas/Layer"}

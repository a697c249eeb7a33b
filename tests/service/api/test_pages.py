"""The page's routes over HTTP: whose they are, what they let in, what they show, and that uploads stay text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
import reports
from fastapi import FastAPI
from fastapi.routing import APIRoute
from httpx import Client
from old_reports import old_report
from outline import Outline
from page_jobs import CONFIG, PageJobs

from service.api import pages, sign_in
from service.jobs.records import JobRecord
from service.jobs.repository import JobRepository
from service.jobs.schemas import Problem
from service.jobs.states import JobState

pytestmark = pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)

Headers = dict[str, str]
OWN = {"Sec-Fetch-Site": "same-origin"}
NO_JOB = "0123456789abcdef01234567"
PUBLIC = {"/docs", "/page/static/{digest}/{name}", "/page/sign-in", "/page/sign-out"}
ROUTES = [
    (method, route.path)
    for router in (pages.router, sign_in.router)
    for route in router.routes
    if isinstance(route, APIRoute)
    for method in sorted(route.methods)
]


def cookie(bearer: Headers) -> Headers:
    """What a signed-in browser sends from a page of the service."""
    return {"Cookie": f"aquant-key={bearer['Authorization'].removeprefix('Bearer ')}", **OWN}


def all_of(web: Client, bearer: Headers) -> Any:
    return web.get("/jobs", headers=bearer).json()


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[1] not in PUBLIC])
def test_of_a_foreign_job_a_page_shows_nothing(
    web: Client, hers: dict[str, str], ada: Headers, make_key: Callable[..., Headers], method: str, path: str
) -> None:
    bob, before = cookie(make_key("bob")), all_of(web, ada)

    def told(job_id: str) -> tuple[int, str, list[tuple[str, str]]]:
        address = path.replace("{job_id}", job_id)
        params = {"job": [job_id, hers["other"]]} if path == "/page/compare" else {}
        answer = web.request(method, address, headers=bob, params=params)
        kept = [pair for pair in answer.headers.items() if pair[0] not in ("x-request-id", "date")]
        return answer.status_code, answer.text.replace(job_id, "ID"), kept

    if "{job_id}" in path or path == "/page/compare":
        for job_id in hers.values():
            if path == "/page/compare" and job_id == hers["other"]:
                continue
            found = told(job_id)
            assert found[0] == 404
            assert found == told(NO_JOB)
    elif (method, path) == ("GET", "/"):
        for query in ("", "?state=succeeded", "?state=queued"):
            assert "of-ada" not in web.get(f"/{query}", headers=bob).text
    else:
        assert (method, path) == ("POST", "/page/jobs"), f"{method} {path} is new: say here how a stranger tries it"
        assert web.post(path, headers=bob).status_code == 415
    assert all_of(web, ada) == before


@pytest.mark.parametrize(("method", "path"), [route for route in ROUTES if route[1] not in PUBLIC])
def test_without_a_key_one_is_asked_for(
    web: Client, hers: dict[str, str], ada: Headers, method: str, path: str
) -> None:
    before = all_of(web, ada)
    address = path.replace("{job_id}", hers["succeeded"])
    # A key in the API's header does not count here, nor does one that is none.
    for headers in (OWN, OWN | ada, OWN | {"Cookie": "aquant-key=aquant_x"}):
        answer = web.request(method, address, headers=headers)
        if method == "GET":
            assert (answer.status_code, answer.headers["location"].partition("?")[0]) == (303, "/page/sign-in")
        else:
            assert answer.status_code == 401
            outline = Outline(answer.text)
            assert "API key" in outline.words
            assert "/page/sign-in" in outline.addresses
            assert "Authorization" not in outline.words  # no browser can send it
    assert all_of(web, ada) == before


@pytest.mark.parametrize("path", ["", "/{}", "/{}/events", "/{}/report", "/{}/checkpoint"])
def test_the_cookie_opens_nothing_of_the_api(web: Client, hers: dict[str, str], ada: Headers, path: str) -> None:
    answer = web.get(f"/jobs{path.format(hers['succeeded'])}", headers=cookie(ada))
    assert (answer.status_code, answer.json()["code"]) == (401, "key_missing")


def test_the_cookie_cancels_and_deletes_nothing_by_the_api(web: Client, hers: dict[str, str], ada: Headers) -> None:
    assert web.post(f"/jobs/{hers['queued']}/cancel", headers=cookie(ada)).status_code == 401
    assert web.delete(f"/jobs/{hers['failed']}", headers=cookie(ada)).status_code == 401


@pytest.mark.parametrize("path", [path for method, path in ROUTES if method == "POST"])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:9"},
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
    ],
)
def test_pages_of_other_sites_change_nothing(
    web: Client, hers: dict[str, str], ada: Headers, path: str, said: Headers
) -> None:
    before = all_of(web, ada)
    headers = {name: value for name, value in cookie(ada).items() if name not in OWN}
    answer = web.post(path.replace("{job_id}", hers["queued"]), headers=headers | said)
    assert answer.status_code == 403
    assert "origin_refused" in answer.text
    assert "set-cookie" not in answer.headers
    assert all_of(web, ada) == before


def test_a_browser_that_names_its_origin_alone_is_served(web: Client, hers: dict[str, str], ada: Headers) -> None:
    headers = {"Cookie": cookie(ada)["Cookie"], "Origin": str(web.base_url).rstrip("/")}
    answer = web.post(f"/page/jobs/{hers['queued']}/cancel", headers=headers)
    assert (answer.status_code, answer.headers["location"]) == (303, f"/page/jobs/{hers['queued']}")
    assert web.get(f"/jobs/{hers['queued']}", headers=ada).json()["state"] == JobState.CANCELLED


def test_headers_keep_other_sites_out(web: Client, page_jobs: PageJobs) -> None:
    job_id = page_jobs.running()
    for path, status in (
        ("/", 200),
        ("/docs", 200),
        ("/errors", 200),
        (f"/page/jobs/{job_id}", 200),
        (f"/page/jobs/{NO_JOB}", 404),
    ):
        answer = web.get(path)
        assert answer.status_code == status
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"


def test_static_files_are_kept_for_good_and_renamed_with_their_content(web: Client) -> None:
    found = [address for address in Outline(web.get("/").text).addresses if address.startswith("/page/static/")]
    assert len(found) == 4
    for address in found:
        answer = web.get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        digest = address.split("/")[3]
        assert web.get(address.replace(digest, "0" * 16)).status_code == 404


def test_the_reference_is_served_from_here(web: Client, ada: Headers) -> None:
    """Also to those who have no key yet; FastAPI's own pages would fetch their scripts from elsewhere."""
    assert ada
    outline = Outline(web.get("/docs").text)
    assert outline.scripts
    for address in outline.addresses:
        assert web.get(address, follow_redirects=True).status_code == 200, address
    assert outline.handlers == []
    assert web.get("/redoc").status_code == 404
    assert web.get("/docs/oauth2-redirect").status_code == 404


EVIL = "\"><img src=x onerror=alert(1)><script>alert(2)</script>'{{ 7 * 7 }}"


def test_what_uploads_say_stays_text(web: Client, page_jobs: PageJobs) -> None:
    report = old_report()
    for layer in report["layers"]:
        layer["name"] = EVIL
    report["warnings"] = [EVIL]
    config = {"weight_bits": 2, "activation_bits": 2, "layers": {EVIL: {"weight_bits": 4}}, "architecture": EVIL[:64]}
    failed = page_jobs.failed(EVIL, filename=EVIL, config=config)
    done = [page_jobs.succeeded(report, filename=EVIL, config=config) for _ in range(2)]
    running = page_jobs.running(filename=EVIL, config=config)
    with page_jobs.sessions.begin() as session:
        job = session.get_one(JobRecord, running)
        forecast = job.progress["forecast"] | {"blocks": [{**job.progress["forecast"]["blocks"][0], "name": EVIL}] * 5}
        job.progress = job.progress | {"forecast": forecast, "method": EVIL}
    paths = [
        "/",
        *(f"/page/jobs/{job_id}" for job_id in (failed, running, *done)),
        f"/page/compare?job={done[0]}&job={done[1]}",
        f"/page/jobs/{quote(EVIL.replace('/', '|'))}",
        f"/page/sign-in?next={EVIL}",
        f"/?state={EVIL}",
    ]
    for path in paths:
        answer = web.get(path, follow_redirects=True)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        outline = Outline(answer.text)
        assert "img" not in outline.tags
        assert outline.handlers == []
        assert [script for script in outline.scripts if not (script or "").startswith("/page/static/")] == []
        assert "49" not in outline.words.split()
        assert all(address.startswith(("/", "#")) for address in outline.addresses), outline.addresses
    for job_id in (failed, done[0]):
        assert EVIL in Outline(web.get(f"/page/jobs/{job_id}").text).words


def test_an_error_of_ours_is_a_page_too(
    application: FastAPI, web: Client, monkeypatch: pytest.MonkeyPatch, page_jobs: PageJobs
) -> None:
    assert application
    job_id = page_jobs.queued()

    def broken(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(JobRepository, "events_after", broken)
    answer = web.get(f"/page/jobs/{job_id}")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "text/html; charset=utf-8")
    assert "X-Request-ID" in answer.text
    assert "a secret" not in answer.text


@pytest.mark.parametrize("block", [0, 1, 2, 3, 5])
def test_every_moment_of_a_job_can_be_shown(web: Client, page_jobs: PageJobs, block: int) -> None:
    """Between two blocks the one under way is already finished, and outside of reconstruction there is none."""
    job_id = page_jobs.running()
    page_jobs.go_on(job_id, 10 if block == 1 else 140, block=block)
    for curve in ("as it is", None):
        if curve is None:
            with page_jobs.sessions.begin() as session:
                job = session.get_one(JobRecord, job_id)
                job.progress = {"block": block, "blocks": 5, "curve": None}
        assert web.get(f"/page/jobs/{job_id}").status_code == 200


@pytest.mark.parametrize(("query", "back"), [("", "/#jobs"), ("?state=queued", "/?state=queued#jobs")])
def test_cancelling_from_the_list_leads_back_to_it(web: Client, page_jobs: PageJobs, query: str, back: str) -> None:
    job_id = page_jobs.queued()
    (cancel,) = (found for found in Outline(web.get(f"/{query}").text).addresses if f"{job_id}/cancel" in found)
    assert web.post(cancel, headers=OWN).headers["location"] == back
    assert web.get(f"/jobs/{job_id}").json()["state"] == "cancelled"


def test_deleting_leads_back_to_the_list(web: Client, page_jobs: PageJobs) -> None:
    running, failed = page_jobs.running(), page_jobs.failed("x")
    refused = web.post(f"/page/jobs/{running}/delete", headers=OWN)
    assert refused.status_code == 409
    assert "Cancel it first" in refused.text
    assert web.post(f"/page/jobs/{failed}/delete", headers=OWN).headers["location"] == "/"
    assert web.get(f"/page/jobs/{failed}").status_code == 404


def test_results_are_had_from_the_page(web: Client, page_jobs: PageJobs) -> None:
    job_id = page_jobs.succeeded(old_report())
    report = web.get(f"/page/jobs/{job_id}/report")
    assert report.headers["content-type"].startswith("text/html")
    assert "sha256-" in report.headers["content-security-policy"]  # its own
    kept = web.get(f"/page/jobs/{job_id}/report.json")
    assert kept.json() == old_report()
    assert kept.headers["content-disposition"] == f'attachment; filename="aquant-{job_id}.json"'
    part = web.get(f"/page/jobs/{job_id}/checkpoint", headers={"Range": "bytes=4-13"})
    assert (part.status_code, part.content) == (206, b"checkpoint")
    events = web.get(f"/page/jobs/{job_id}/events").text
    assert events.rstrip().endswith("id: 3")


def test_onnx_is_offered_or_its_absence_explained(web: Client, page_jobs: PageJobs) -> None:
    with_it = page_jobs.succeeded(old_report(), more={"onnx": b"a graph"})
    address = f"/page/jobs/{with_it}/onnx"
    assert address in Outline(web.get(f"/page/jobs/{with_it}").text).addresses
    assert web.get(address).content == b"a graph"
    problem = Problem.of_job("onnx_export_unsupported", "It has a border that no operator can say.", "Take another.")
    without = page_jobs.succeeded(old_report(), more={"onnx_problem": problem.model_dump_json().encode()})
    assert "Why there is no ONNX" in web.get(f"/page/jobs/{without}").text
    answer = web.get(f"/page/jobs/{without}/onnx")
    assert answer.status_code == 409
    assert problem.detail in Outline(answer.text).words


def test_a_report_that_cannot_be_read_is_no_dead_end(web: Client, page_jobs: PageJobs) -> None:
    job_id = page_jobs.succeeded({"of": "another time"})
    page = web.get(f"/page/jobs/{job_id}")
    assert page.status_code == 200
    assert f"/page/jobs/{job_id}/checkpoint" in page.text
    assert json.loads(web.get(f"/page/jobs/{job_id}/report").text) == {"of": "another time"}
    other = page_jobs.succeeded(old_report())
    assert web.get("/page/compare", params={"job": [job_id, other]}).status_code == 409


def test_a_dry_run_shows_its_plan(web: Client, page_jobs: PageJobs) -> None:
    """It has no checkpoint, and nothing to be compared."""
    plan = reports.planned()
    config = {**CONFIG, "dry_run": True}
    job_id = page_jobs.end(
        page_jobs.queued(config=config), JobState.SUCCEEDED, files={"report": json.dumps(plan).encode()}
    )
    page_jobs.succeeded(old_report())
    page = web.get(f"/page/jobs/{job_id}")
    words = re.sub(r"\s+", " ", Outline(page.text).words)
    assert page.status_code == 200
    assert "AQuant, W2A2, dry run" in words
    assert "Peak memory" in words
    assert "to learn; reading, evaluating and ranking layers come on top" in words
    assert "it may fill" in words
    assert plan["warnings"][0] in words
    addresses = Outline(page.text).addresses
    assert f"/page/jobs/{job_id}/report" in addresses
    assert f"/page/jobs/{job_id}/checkpoint" not in addresses
    assert "what it would take" in web.get(f"/page/jobs/{job_id}/report").text
    assert web.get(f"/page/jobs/{job_id}/report.json").json() == plan
    listed = web.get("/").text
    assert f"tick-{job_id}" not in listed
    assert "Compare the two ticked" not in listed


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"budget_bytes": 1}, "more than the"),
        ({"limit_bytes": 1}, "likely to be stopped: it is above"),
        ({"budget_bytes": None}, None),
    ],
)
def test_a_dry_run_tells_whether_memory_does(
    web: Client, page_jobs: PageJobs, changes: dict[str, Any], expected: str | None
) -> None:
    files = {"report": json.dumps(reports.planned() | changes).encode()}
    job_id = page_jobs.end(page_jobs.queued(config={**CONFIG, "dry_run": True}), JobState.SUCCEEDED, files=files)
    words = Outline(web.get(f"/page/jobs/{job_id}").text).words
    for each in ("more than the", "likely to be stopped: it is above", "may fill"):
        assert (each in words) == (each == expected)


def test_a_job_without_a_file_name_is_called_by_what_is_known(web: Client, page_jobs: PageJobs) -> None:
    known = page_jobs.queued("", {**CONFIG, "architecture": "resnet18"})
    for job_id, name in ((known, "resnet18"), (page_jobs.queued(""), f"sha256:{0:012}")):
        assert web.get(f"/jobs/{job_id}").json()["name"] == name
        assert f">{name}</a>" in web.get("/").text
        assert f"<h1>{name} " in web.get(f"/page/jobs/{job_id}").text


@pytest.mark.parametrize("count", [0, 1, 3])
def test_two_jobs_are_compared_and_no_other_number(web: Client, page_jobs: PageJobs, count: int) -> None:
    chosen = [page_jobs.succeeded(old_report()) for _ in range(count)]
    answer = web.get("/page/compare", params={"job": chosen + chosen[:1]})
    assert answer.status_code == 422
    assert "two can be" in answer.text


def test_pages_of_the_list_follow_each_other(web: Client, page_jobs: PageJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "ON_A_PAGE", 2)
    ids = [page_jobs.queued() for _ in range(3)]
    first = Outline(web.get("/?state=queued").text)
    (older,) = (address for address in first.addresses if "cursor" in address)
    assert f"/page/jobs/{ids[0]}" not in first.addresses
    second = Outline(web.get(older).text)
    assert f"/page/jobs/{ids[0]}" in second.addresses
    assert f"/page/jobs/{ids[2]}" not in second.addresses

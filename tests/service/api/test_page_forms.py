"""The page's form over HTTP: what it sends, what is sent twice, and what it begins with where a job is run again."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import reports
from fastapi import FastAPI
from httpx import Client, Response
from old_reports import old_report
from outline import Outline
from page_jobs import CONFIG, PageJobs

from aquant_core.report.formats import points
from service.api import pages
from service.jobs.records import JobRecord
from service.jobs.states import JobState
from service.main import create_app
from service.settings import Settings

pytestmark = pytest.mark.parametrize("storage", ["sqlite-folder"], indirect=True)

OWN = {"Sec-Fetch-Site": "same-origin"}


def submit(web: Client, onnx_model: bytes, images: bytes, to: str = "/page/jobs", **fields: Any) -> Response:
    """As a browser does: every field is there, and so is a file that was not chosen."""
    parts: dict[str, Any] = {
        "weight_bits": "2", "activation_bits": "4", "method": "qdrop", "preset": "smoke", "device": "",
        "architecture": "", "config": "",
        "model": ("C:\\models\\net.onnx", onnx_model), "calibration": ("dir/images.npz", images),
        "evaluation": ("", b""),
        **fields,
    }  # fmt: skip
    body = b""
    for name, part in parts.items():  # by hand: httpx sends no empty file names
        filename, content = (None, part.encode()) if isinstance(part, str) else part
        named = "" if filename is None else f'; filename="{filename}"'
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + content + b"\r\n"
    headers = OWN | {"Content-Type": "multipart/form-data; boundary=b"}
    return web.post(to, content=body + b"--b--\r\n", headers=headers)


def test_the_form_is_a_submission(web: Client, onnx_model: bytes, images: bytes) -> None:
    answer = submit(web, onnx_model, images, device="cpu", config='{"seed": 3, "preset": "fast"}')
    assert answer.status_code == 303
    job = web.get(answer.headers["location"].removeprefix("/page")).json()
    asked = {"weight_bits": 2, "activation_bits": 4, "method": "qdrop", "preset": "fast", "seed": 3}
    assert {name: job["config"][name] for name in asked} == asked
    assert job["device"] == "cpu"
    assert {name: file["filename"] for name, file in job["files"].items()} == {
        "model": "net.onnx",
        "calibration": "images.npz",
    }
    page = web.get(answer.headers["location"]).text
    assert "net.onnx" in page
    assert '<noscript><meta http-equiv="refresh"' in page


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"config": "{"}, 422, "not JSON"),
        ({"config": "[1]"}, 422, "not a JSON object"),
        ({"config": '{"seed": 1, "seed": 2}'}, 422, "twice"),
        ({"config": '{"colour": 1}'}, 422, "colour: unknown key"),
        ({"weight_bits": "9"}, 422, "weight_bits"),
        ({"device": "tpu"}, 400, "tpu"),
        ({"surprise": "1"}, 400, "surprise"),
        ({"model": ("", b"")}, 400, "no file `model`"),
        ({"model": ("empty.onnx", b"")}, 422, "empty"),
        ({"calibration": ("c.npz", b"nothing")}, 422, "calibration"),
    ],
)
def test_what_is_wrong_with_a_form_is_said_in_words(
    web: Client, onnx_model: bytes, images: bytes, fields: dict[str, Any], status: int, word: str
) -> None:
    answer = submit(web, onnx_model, images, **fields)
    assert answer.status_code == status
    outline = Outline(answer.text)
    assert word in outline.words
    assert "What to do." in outline.words
    assert any(address.startswith("/errors#") for address in outline.addresses)
    assert web.get("/jobs").json()["jobs"] == []


def form_of(page: str) -> str:
    """Where the form of a submission leads."""
    (address,) = (found for found in Outline(page).addresses if found.startswith("/page/jobs?"))
    return address


def test_the_same_form_twice_is_one_job_and_a_changed_one_another(
    web: Client, onnx_model: bytes, images: bytes
) -> None:
    """So a browser that got no answer may send it again, and who goes back to it may change it."""
    form = form_of(web.get("/").text)
    assert form != form_of(web.get("/").text)

    def sent(**fields: Any) -> str:
        answer = submit(web, onnx_model, images, form, **fields)
        assert answer.status_code == 303, answer.text
        return str(answer.headers["location"])

    first, changed, forecast = sent(), sent(weight_bits="3"), sent(dry_run="true")
    assert [sent(), sent(weight_bits="3"), sent(dry_run="true")] == [first, changed, forecast]
    assert len(web.get("/jobs").json()["jobs"]) == 3
    assert submit(web, onnx_model, images, form_of(web.get("/").text)).headers["location"] != first
    # Of one that was deleted the form makes a new one, and that once.
    for _ in range(2):
        gone = sent()
        web.post(f"{gone}/cancel", headers=OWN)
        web.post(f"{gone}/delete", headers=OWN)
        assert sent() == sent() != gone
    assert sent(weight_bits="3") == changed
    assert len(web.get("/jobs").json()["jobs"]) == 4


def test_a_form_that_was_refused_may_be_sent_mended(web: Client, onnx_model: bytes, images: bytes) -> None:
    form = form_of(web.get("/").text)
    assert submit(web, onnx_model, images, form, config="{").status_code == 422
    assert submit(web, onnx_model, images, form).status_code == 303


def test_a_form_sent_again_is_answered_where_there_is_no_room_for_another(
    settings: Settings, serve: Callable[[FastAPI], AbstractContextManager[Client]], onnx_model: bytes, images: bytes
) -> None:
    with serve(create_app(settings.model_copy(update={"max_jobs_queued": 1}))) as web:
        form = form_of(web.get("/").text)
        first = submit(web, onnx_model, images, form).headers["location"]
        assert submit(web, onnx_model, images, form).headers["location"] == first
        assert submit(web, onnx_model, images, form, weight_bits="3").status_code == 429
        assert submit(web, onnx_model, images, form_of(web.get("/").text)).status_code == 429


def hidden(page: str) -> dict[str, str]:
    """Fields that a page fills in by itself."""
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)">', page))


def chosen(page: str) -> dict[str, str]:
    """What the form's selections begin with."""
    found = {}
    for name, options in re.findall(r'<select id="(\w+)"[^>]*>(.*?)</select>', page, re.DOTALL):
        found[name] = "".join(re.findall(r'value="(\w*)" selected', options))
    return found


def test_a_job_again_begins_with_its_files_and_settings(web: Client, onnx_model: bytes, images: bytes) -> None:
    config = {"seed": 7, "layers": {"conv1": {"weight_bits": 3}}}
    address = submit(web, onnx_model, images, config=json.dumps(config)).headers["location"]
    job_id = address.rpartition("/")[2]
    assert f"/?again={job_id}" not in Outline(web.get(address).text).addresses  # it has not ended
    web.post(f"/jobs/{job_id}/cancel").raise_for_status()
    (link,) = [found for found in Outline(web.get(address).text).addresses if found.startswith("/?again=")]
    page = web.get(link).text
    assert hidden(page) == {"model": f"job:{job_id}", "calibration": f"job:{job_id}"}
    assert re.findall(r'type="file" id="(\w+)"', page) == ["evaluation"]  # what that job did not have
    assert chosen(page) == {
        "weight_bits": "2", "activation_bits": "4", "method": "qdrop", "preset": "smoke", "device": "",
    }  # fmt: skip
    for words in ("net.onnx again", "net.onnx", "images.npz"):
        assert words in Outline(page).words
    (further,) = re.findall(r"<textarea[^>]*>(.*?)</textarea>", page, re.DOTALL)
    further = html.unescape(further)
    assert json.loads(further) == config
    # Sent as it is, it is the same job.
    again = submit(web, onnx_model, images, **hidden(page), config=further).headers["location"]
    first, second = (web.get(found.removeprefix("/page")).json() for found in (address, again))
    assert second["config"] == first["config"]
    assert second["files"] == first["files"]
    assert second["name"] == "net.onnx"


def test_a_layer_is_raised_as_the_report_says(web: Client, page_jobs: PageJobs) -> None:
    report = reports.lossy()
    worst = report["sensitivity"]["layers"][0]
    config = {**CONFIG, "seed": 3, "layers": {"fc": {"weight_bits": 4}}}
    job_id = page_jobs.succeeded(report, config=config)
    links = [link for link in Outline(web.get(f"/page/jobs/{job_id}").text).addresses if "&layer=" in link]
    assert len(links) == min(3, len(report["sensitivity"]["layers"]))
    page = web.get(links[0]).text
    (further,) = re.findall(r"<textarea[^>]*>(.*?)</textarea>", page, re.DOTALL)
    weight_bits, activation_bits = worst["raised_bits"]
    raised = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    layers = json.loads(html.unescape(further))["layers"]
    assert layers == {"fc": {"weight_bits": 4}, worst["layer"]: raised}
    assert "<details open>" in page
    refused = web.get(f"/?again={job_id}&layer=none")
    assert refused.status_code == 400
    assert "'none'" in Outline(refused.text).words
    unranked = page_jobs.succeeded(reports.run(sensitivity=False), config=CONFIG)
    assert "&layer=" not in "".join(Outline(web.get(f"/page/jobs/{unranked}").text).addresses)
    assert web.get(f"/?again={unranked}&layer=fc").status_code == 400


@pytest.mark.parametrize(
    ("top1", "low", "offered", "stands_out"),
    [(0.5, 0.01, True, True), (0.5, 0.0, True, False), (0.6, 0.01, False, True), (0.65, -0.1, False, True)],
)
def test_a_layer_is_offered_where_something_was_lost_and_as_the_report_puts_it(
    web: Client, page_jobs: PageJobs, top1: float, low: float, offered: bool, stands_out: bool
) -> None:
    report = reports.run()
    report["accuracy"]["float"]["top1"], report["accuracy"]["quantized"]["top1"] = 0.6, top1
    report["sensitivity"]["layers"][0] |= {"interval": [low, 0.2], "error_share": 0.2}
    page = Outline(web.get(f"/page/jobs/{page_jobs.succeeded(report, config=CONFIG)}").text)
    assert ("&layer=" in "".join(page.addresses)) == offered
    assert ("No single layer stands out" in page.words) != stands_out


@pytest.mark.parametrize(("agreement", "offered"), [(0.9, True), (1.0, False)])
def test_without_labels_a_layer_is_offered_where_decisions_differ(
    web: Client, page_jobs: PageJobs, agreement: float, offered: bool
) -> None:
    report = reports.run(labels=False)
    report["fidelity"]["quantized"]["agreement"] = agreement
    page = Outline(web.get(f"/page/jobs/{page_jobs.succeeded(report, config=CONFIG)}").text)
    assert ("&layer=" in "".join(page.addresses)) == offered


def test_of_a_target_the_widths_found_are_given_with_a_layer_raised(web: Client, page_jobs: PageJobs) -> None:
    """What raising it would gain was said of these; with the target the whole search would run again."""
    wanted = {"target": {"max_accuracy_drop": 100.0}}
    report = reports.run(**wanted)
    worst = report["sensitivity"]["layers"][0]
    config = {"preset": "fast", "seed": 3, "layers": {"fc": {"weight_bits": 4}}, **wanted}
    job_id = page_jobs.succeeded(report, config=config)
    words = re.sub(r"\s+", " ", Outline(web.get(f"/page/jobs/{job_id}").text).words)
    drop = f"{report['target']['drop']:.2f}".replace("-", "\N{MINUS SIGN}")
    assert f"TargetHelda drop of {drop} points of top-1, at most 100 wanted" in words
    page = web.get(f"/?again={job_id}&layer={worst['layer']}").text
    (further,) = re.findall(r"<textarea[^>]*>(.*?)</textarea>", page, re.DOTALL)
    found = report["target"]["candidates"][report["target"]["chosen"]]["layers"]
    expected = {
        name: dict(zip(("weight_bits", "activation_bits"), widths, strict=True)) for name, widths in found.items()
    }
    expected[worst["layer"]] = dict(zip(("weight_bits", "activation_bits"), worst["raised_bits"], strict=True))
    assert json.loads(html.unescape(further)) == {"seed": 3, "layers": expected}
    again = web.get(f"/?again={job_id}").text
    assert "max_accuracy_drop" in again  # as it was asked for


def run_again(web: Client, page_jobs: PageJobs, job_id: str, layer: str, report: dict[str, Any]) -> str:
    """Raises a layer of a job by its page, and ends the new one with this report."""
    page = web.get(f"/?again={job_id}&layer={layer}").text
    (further,) = re.findall(r"<textarea[^>]*>(.*?)</textarea>", page, re.DOTALL)
    fields = {**hidden(page), **chosen(page), "config": html.unescape(further)}
    answer = web.post(form_of(page), files={name: (None, value) for name, value in fields.items()}, headers=OWN)
    assert answer.status_code == 303, answer.text
    raised = str(answer.headers["location"].rpartition("/")[2])
    return page_jobs.end(raised, JobState.SUCCEEDED, files={"report": json.dumps(report).encode()})


def options(page: str) -> list[tuple[str, bool, str]]:
    """What a job may be compared with: its id, whether it is chosen, and the words."""
    (select,) = re.findall(r'<select id="other"[^>]*>(.*?)</select>', page, re.DOTALL)
    found = re.findall(r'<option value="(\w+)"( selected)?>(.*?)</option>', select)
    return [(value, bool(selected), html.unescape(words)) for value, selected, words in found]


def test_what_was_raised_is_compared_with_what_it_came_of(
    web: Client, page_jobs: PageJobs, onnx_model: bytes, images: bytes
) -> None:
    """Named so that the two can be told apart, in their order, and what was said of the gain beside it."""
    report = reports.run()
    worst = report["sensitivity"]["layers"][0]
    raised_bits = dict(zip(("weight_bits", "activation_bits"), worst["raised_bits"], strict=True))
    after = reports.run(layers={worst["layer"]: raised_bits})
    first = submit(web, onnx_model, images, activation_bits="2", method="aquant", preset="fast")
    job_id = first.headers["location"].rpartition("/")[2]
    page_jobs.end(job_id, JobState.SUCCEEDED, files={"report": json.dumps(report).encode()})
    raised = run_again(web, page_jobs, job_id, worst["layer"], after)
    others = [page_jobs.succeeded(old_report()) for _ in range(2)]
    title = f"AQuant, W2A2, {worst['layer']} at {'/'.join(map(str, worst['raised_bits']))}"
    page = web.get(f"/page/jobs/{raised}").text
    assert title in Outline(page).words
    found = options(page)
    assert [job for job, selected, _ in found if selected] == [job_id]
    assert {job for job, _, _ in found} == {job_id, *others}
    top1 = f"{100 * report['accuracy']['quantized']['top1']:.2f}"
    created = web.get(f"/jobs/{job_id}").json()["created_at"][:16].replace("T", " ")
    (words,) = (words for job, _, words in found if job == job_id)
    assert words == f"net.onnx, AQuant, W2A2, fast, top-1 {top1}\N{NO-BREAK SPACE}%, {created} UTC, {job_id[:8]}"
    answer = web.get("/page/compare", params={"job": [raised, job_id]})
    compared = re.sub(r"\s+", " ", Outline(answer.text).words)
    assert f"net.onnx AQuant, W2A2 and {title}" in compared  # the older is A, however they were ticked
    gained = after["accuracy"]["quantized"]["top1"] - report["accuracy"]["quantized"]["top1"]
    low, high = worst["interval"]
    said = (
        f"The report of A said {points(worst['gain'])} ({points(low)} to {points(high)}); gained were {points(gained)}."
    )
    assert said in compared


def test_a_job_is_again_what_was_run_before_its_forecast(web: Client, page_jobs: PageJobs) -> None:
    """Also one that is not among the newest any more; of one that is gone nothing is chosen."""
    first = page_jobs.succeeded(old_report())
    planned = page_jobs.end(page_jobs.queued(config={**CONFIG, "dry_run": True}), JobState.SUCCEEDED)
    last = page_jobs.succeeded(old_report())
    with page_jobs.sessions.begin() as session:
        for job_id, earlier in ((planned, first), (last, planned)):
            job = session.get_one(JobRecord, job_id)
            job.origin = {**(job.origin or {}), "earlier_job": earlier}
    for _ in range(pages.ON_A_PAGE):
        page_jobs.succeeded(old_report())
    chosen_jobs = [job for job, selected, _ in options(web.get(f"/page/jobs/{last}").text) if selected]
    assert chosen_jobs == [first]
    web.delete(f"/jobs/{first}").raise_for_status()
    assert not any(selected for _, selected, _ in options(web.get(f"/page/jobs/{last}").text))


def test_what_was_forecast_is_started_from_its_page(
    web: Client, page_jobs: PageJobs, onnx_model: bytes, images: bytes
) -> None:
    more = json.dumps({"seed": 5, "layers": {"fc": {"weight_bits": 4}}})
    address = submit(web, onnx_model, images, dry_run="true", config=more).headers["location"]
    assert 'id="start"' not in web.get(address).text  # it has not been forecast yet
    plan = json.dumps(reports.planned(method="qdrop")).encode()
    page_jobs.end(address.rpartition("/")[2], JobState.SUCCEEDED, files={"report": plan})
    page = web.get(address).text
    assert 'id="start"' in page
    fields = {name: (None, html.unescape(value)) for name, value in hidden(page).items()}
    assert fields.keys() == {"model", "calibration", "config"}
    answer, again = (web.post(form_of(page), files=fields, headers=OWN) for _ in range(2))
    assert answer.status_code == 303
    assert again.headers["location"] == answer.headers["location"]
    planned, started = (web.get(at.removeprefix("/page")).json() for at in (address, answer.headers["location"]))
    assert planned["config"]["dry_run"]
    assert started["config"] == planned["config"] | {"dry_run": False}
    assert started["files"] == {name: planned["files"][name] for name in ("model", "calibration")}

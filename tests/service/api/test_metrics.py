"""What Prometheus reads at /metrics, against the rows and requests that it tells of."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx import Client, Response
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text
from sqlalchemy import text, update
from sqlalchemy.orm import Session, sessionmaker

from service.api.metrics import new_registry
from service.api.requests import EveryRequest
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository, now
from service.jobs.states import JobState
from service.jobs.tallies import Tallies
from service.main import create_app
from service.settings import Settings

Submit = Callable[..., Response]
Serve = Callable[[FastAPI], AbstractContextManager[Client]]
Sessions = sessionmaker[Session]
Key = tuple[str, frozenset[tuple[str, str]]]
MINUTE = timedelta(minutes=1)
REQUESTS = "aquant_http_request_duration_seconds_count"


def key(name: str, **labels: str) -> Key:
    return name, frozenset(labels.items())


def scrape(web: Client) -> dict[Key, float]:
    answer = web.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in read_text(answer.text) for sample in family.samples]
    found = {key(sample.name, **sample.labels): sample.value for sample in samples}
    assert len(found) == len(samples)  # none is told twice
    return found


def start(sessions: Sessions, job_id: str, lease: timedelta = MINUTE) -> Claim:
    with sessions.begin() as session:
        claim = JobRepository(session).claim(job_id, "host:7:abcd", lease)
    assert claim is not None
    return claim


def set_columns(sessions: Sessions, job_id: str, **values: object) -> None:
    with sessions.begin() as session:
        session.execute(update(JobRecord).where(JobRecord.id == job_id).values(**values))


def test_an_idle_service(web: Client) -> None:
    found = scrape(web)
    assert {state: found[key("aquant_jobs", state=state)] for state in JobState} == dict.fromkeys(JobState, 0)
    assert found[key("aquant_queue_oldest_job_age_seconds")] == 0
    assert found[key("aquant_workers_alive", device="cpu")] == 0
    assert found[key("aquant_job_retries_total")] == 0
    assert (found[key("aquant_database_up")], found[key("aquant_broker_up")]) == (1, 1)
    assert found[key("aquant_broker_messages", device="cpu")] == 0
    names = {name for name, _ in found}
    assert not {name for name in names if name.startswith(("aquant_lease", "aquant_gpu", "aquant_block"))}


def test_jobs_workers_and_leases_are_those_of_the_rows(web: Client, submit: Submit, sessions: Sessions) -> None:
    waiting, older, running, silent, ended = (submit().json()["id"] for _ in range(5))
    set_columns(sessions, older, created_at=now() - timedelta(seconds=500))
    start(sessions, running)
    start(sessions, silent, timedelta(seconds=-40))
    set_columns(sessions, silent, state=JobState.CANCELLING)
    done = start(sessions, ended)
    with sessions.begin() as session:
        JobRepository(session).finish(done, JobState.SUCCEEDED, "save")
        JobRepository(session).note_worker("host:1", "cpu", "2 CPU cores", MINUTE)
        JobRepository(session).note_worker("host:2", "cpu", "2 CPU cores", MINUTE)
        session.execute(text("UPDATE workers SET seen_at = '2026-01-01 00:00:00' WHERE name = 'host:2'"))
    found = scrape(web)
    counts = {state: found[key("aquant_jobs", state=state)] for state in JobState}
    assert counts == {"queued": 2, "running": 1, "cancelling": 1, "succeeded": 1, "failed": 0, "cancelled": 0}
    assert 500 <= found[key("aquant_queue_oldest_job_age_seconds")] < 530
    assert -70 < found[key("aquant_lease_remaining_seconds")] <= -40
    assert found[key("aquant_workers_alive", device="cpu")] == 1
    assert found[key("aquant_broker_messages", device="cpu")] == 5
    assert found[key("aquant_broker_messages", device="gpu")] == 0
    assert waiting


def test_ends_and_retries_are_counted_and_stay_when_jobs_are_deleted(
    web: Client, submit: Submit, sessions: Sessions
) -> None:
    jobs = {
        name: submit(config={"weight_bits": 2, "activation_bits": 2, "method": method}).json()["id"]
        for name, method in (("good", "qdrop"), ("bad", "aquant"), ("stopped", "aquant"), ("never", "aquant"))
    }
    claim = start(sessions, jobs["good"], timedelta(seconds=-1))
    with sessions.begin() as session:
        assert JobRepository(session).take_back(claim.job_id, 1, 3, {}) == JobState.QUEUED
    again = start(sessions, jobs["good"])
    bad, stopped = start(sessions, jobs["bad"]), start(sessions, jobs["stopped"])
    set_columns(sessions, jobs["good"], started_at=now() - timedelta(seconds=200))
    with sessions.begin() as session:
        repository = JobRepository(session)
        repository.finish(again, JobState.SUCCEEDED, "save")
        repository.finish(bad, JobState.FAILED, "intake", {})
        repository.cancel(jobs["stopped"])
        repository.finish(stopped, JobState.SUCCEEDED, "save")  # its cancellation wins
        repository.cancel(jobs["never"])
    for job_id in jobs.values():
        assert web.delete(f"/jobs/{job_id}").status_code == 204
    found = scrape(web)
    assert found[key("aquant_job_retries_total")] == 1
    name = "aquant_job_duration_seconds"
    counted = {
        tuple(sorted(dict(labels).values())): value for (sample, labels), value in found.items()
        if sample == f"{name}_count"
    }  # fmt: skip
    assert counted == {("qdrop", "succeeded"): 1, ("aquant", "failed"): 1, ("aquant", "cancelled"): 1}
    good = {"method": "qdrop", "state": "succeeded"}
    assert 200 <= found[key(f"{name}_sum", **good)] < 230
    buckets = [found[key(f"{name}_bucket", le=bound, **good)] for bound in ("120.0", "300.0", "86400.0", "+Inf")]
    assert buckets == [0, 1, 1, 1]


def test_blocks_and_gpu_memory_are_what_workers_wrote(web: Client, submit: Submit, sessions: Sessions) -> None:
    job_id = submit().json()["id"]
    start(sessions, job_id)
    gpu = {"used_bytes": 3 * 2**30, "total_bytes": 80 * 2**30, "peak_bytes": 2**30}
    set_columns(sessions, job_id, progress={"block": 2, "gpu": gpu})
    with sessions.begin() as session:
        for seconds in (0.5, 3, 4, 1e6):
            Tallies(session).add("block", seconds, "aquant")
    found = scrape(web)
    for part in ("used", "total", "peak"):
        assert found[key(f"aquant_gpu_memory_{part}_bytes", worker="host:7")] == gpu[f"{part}_bytes"]
    name, aquant = "aquant_block_duration_seconds", {"method": "aquant"}
    assert found[key(f"{name}_count", **aquant)] == 4
    assert found[key(f"{name}_sum", **aquant)] == pytest.approx(1_000_007.5)
    buckets = [found[key(f"{name}_bucket", le=bound, **aquant)] for bound in ("1.0", "2.5", "5.0", "86400.0", "+Inf")]
    assert buckets == [1, 1, 3, 3, 4]
    assert "gpu" not in web.get(f"/jobs/{job_id}").text


def test_requests_are_counted_by_route_and_never_by_path(web: Client, submit: Submit, application: FastAPI) -> None:
    submit()
    for path in ("/jobs/one", "/jobs/two", "/jobs/two/report", "/nowhere", "/wp-admin.php", "/health/live"):
        web.get(path)
    web.request("BREW", "/jobs")
    parts, application.state.parts = application.state.parts, "broken"
    web.get("/jobs")
    application.state.parts = parts
    found = scrape(web)
    counted = {
        (labels["method"], labels["route"], labels["status"]): value
        for (name, pairs), value in found.items()
        if name == REQUESTS and (labels := dict(pairs))
    }
    assert counted == {
        ("POST", "/jobs", "202"): 1,
        ("GET", "/jobs/{job_id}", "404"): 2,
        ("GET", "/jobs/{job_id}/report", "404"): 1,
        ("GET", "unmatched", "404"): 2,
        ("GET", "/health/live", "200"): 1,
        ("other", "/jobs", "405"): 1,
        ("GET", "/jobs", "500"): 1,
    }


def test_a_request_that_is_cut_off_is_counted() -> None:
    async def stopped(*_: object) -> None:
        raise asyncio.CancelledError

    registry, seconds = new_registry()
    scope = {"type": "http", "method": "GET", "path": "/jobs", "headers": []}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(EveryRequest(stopped, seconds)(scope, stopped, stopped))
    assert registry.get_sample_value(REQUESTS, {"method": "GET", "route": "unmatched", "status": "499"}) == 1


def test_two_applications_do_not_disturb_each_other(serve: Serve, settings: Settings, tmp_path: Path) -> None:
    other = settings.model_copy(update={"data_dir": tmp_path / "other", "queue_name": "other"})
    with serve(create_app(settings)) as one, serve(create_app(other)) as two:
        for _ in range(3):
            one.get("/jobs")
        asked = {"method": "GET", "route": "/jobs", "status": "200"}
        assert scrape(one)[key(REQUESTS, **asked)] == 3
        assert key(REQUESTS, **asked) not in scrape(two)
    again = create_app(settings)
    for _ in range(2):  # an application may be started twice
        with serve(again) as web:
            assert scrape(web)[key("aquant_database_up")] == 1


def test_what_does_not_answer_is_told_and_the_rest_stays(serve: Serve, settings: Settings, sessions: Sessions) -> None:
    away = settings.model_copy(update={"broker_url": "redis://127.0.0.1:1/0"})
    with serve(create_app(away)) as web:
        found = scrape(web)
        assert (found[key("aquant_broker_up")], found[key("aquant_database_up")]) == (0, 1)
        assert key("aquant_broker_messages", device="cpu") not in found
        with sessions.begin() as session:
            session.execute(text("ALTER TABLE jobs RENAME TO hidden"))
        found = scrape(web)
    assert found[key("aquant_database_up")] == 0
    assert key("aquant_workers_alive", device="cpu") not in found
    assert key(REQUESTS, method="GET", route="/metrics", status="200") in found


def test_names_follow_the_conventions_in_both_formats(web: Client, submit: Submit) -> None:
    submit()
    answer = web.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = list(read_openmetrics(answer.text))
    assert {family.name for family in families} >= {"aquant_jobs", "aquant_job_retries", "aquant_build"}
    for family in families:
        assert family.documentation
        assert re.match(r"aquant_[a-z]+|process_[a-z]+", family.name)
        if family.type == "histogram":
            assert family.name.endswith("_seconds")

"""Traces of requests: sent where the setting says, joined to the caller's, kept in the job's row."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from fastapi import FastAPI
from httpx import Client
from opentelemetry import trace
from otlp_receiver import otlp_receiver
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.repository import JobRepository
from service.main import create_app
from service.settings import Settings

Serve = Callable[[FastAPI], AbstractContextManager[Client]]
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
HEADERS = {"traceparent": f"00-{CALLER}-00f067aa0ba902b7-01", "X-Request-ID": "mine"}

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Absent(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from service.main import create_app
from service.settings import Settings
create_app(Settings.model_validate_json(sys.argv[1]))
"""


def files(onnx_model: bytes, images: bytes) -> dict[str, object]:
    config = (None, '{"weight_bits": 2, "activation_bits": 2}')
    return {"config": config, "model": onnx_model, "calibration": images}


def test_a_request_is_traced_and_its_job_remembers(
    serve: Serve, settings: Settings, sessions: sessionmaker[Session], onnx_model: bytes, images: bytes
) -> None:
    before = trace.get_tracer_provider()
    with otlp_receiver() as receiver:
        app = create_app(settings.model_copy(update={"otlp_endpoint": f"{receiver.url}/"}))
        with serve(app) as web:
            answer = web.post("/jobs", files=files(onnx_model, images), headers=HEADERS)
            web.get("/health/ready")
            web.get("/metrics")
            web.get("/jobs/none")
        spans = {span.name: span for span in receiver.spans}  # the end of the application has sent all
    assert spans.keys() == {"POST /jobs", "GET /jobs/{job_id}"}
    posted = spans["POST /jobs"]
    assert (posted.trace, posted.parent, posted.service) == (CALLER, "00f067aa0ba902b7", "aquant-api")
    assert posted.attributes["http.response.status_code"] == 202
    with sessions() as session:
        origin = JobRepository(session).get(answer.json()["id"]).origin
    assert origin is not None
    assert origin["request_id"] == "mine"
    assert origin["traceparent"] == f"00-{CALLER}-{posted.id}-01"
    assert trace.get_tracer_provider() is before


def test_nothing_is_traced_without_an_address(
    serve: Serve, settings: Settings, sessions: sessionmaker[Session], onnx_model: bytes, images: bytes
) -> None:
    with serve(create_app(settings)) as web:
        answer = web.post("/jobs", files=files(onnx_model, images), headers=HEADERS)
    with sessions() as session:
        origin = JobRepository(session).get(answer.json()["id"]).origin
    assert origin is not None
    assert origin["request_id"] == "mine"
    assert "traceparent" not in origin


def test_the_standard_variable_is_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert Settings().otlp_endpoint == "http://collector:4318"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "")
    assert Settings().otlp_endpoint is None


@pytest.mark.parametrize(("endpoint", "status"), [("http://collector:4318", 1), (None, 0)])
def test_missing_packages_are_named_once_they_are_asked_for(
    settings: Settings, endpoint: str | None, status: int
) -> None:
    asked = settings.model_copy(update={"otlp_endpoint": endpoint})
    argv = [sys.executable, "-c", WITHOUT, asked.model_dump_json()]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    if status:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("service.tracing.TelemetryMissingError: OTEL_EXPORTER_OTLP_ENDPOINT is set")
        assert "pip install 'aquant-service[telemetry]'" in last

"""Results appear whole and only under a claim that still holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from servers import PAIRS
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.errors import OnnxExportError
from aquant_core.pipeline import QuantizationResult
from service.artifacts import Artifacts
from service.jobs.records import ONNX_PROBLEM, JobRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.states import JobState
from worker.reporting import publish, publish_plan

pytestmark = pytest.mark.parametrize("storage", PAIRS, indirect=True)

Sessions = sessionmaker[Session]


@dataclass
class Result:
    """As much of a result as publishing needs."""

    report: dict[str, Any] = field(default_factory=lambda: {"loss": float("inf"), "warnings": ["few images", "b"]})

    def save(self, path: Path) -> None:
        path.write_bytes(b"checkpoint")

    def export_onnx(self, path: Path) -> None:
        path.write_bytes(b"onnx")


@dataclass
class Inexpressible(Result):
    """A result of a network that ONNX has no operators for."""

    def export_onnx(self, path: Path) -> None:  # noqa: ARG002 - as the real one has it
        raise OnnxExportError("Layer 'fc' is of paper.", "Use the checkpoint.")


RESULT = cast(QuantizationResult, Result())


def test_files_become_the_jobs(
    claimed: Callable[..., Claim], sessions: Sessions, artifacts: Artifacts, tmp_path: Path
) -> None:
    state = publish(claimed(), RESULT, ["a", "b"], tmp_path, artifacts, sessions)
    assert state == JobState.SUCCEEDED
    with sessions() as session:
        job = JobRepository(session).get("job")
        report, checkpoint = job.artifact("report"), job.artifact("checkpoint")
    assert report is not None
    assert checkpoint is not None
    assert json.loads(artifacts.get_bytes(report.key)) == {"loss": None, "warnings": ["few images", "b", "a"]}
    assert artifacts.get_bytes(checkpoint.key) == b"checkpoint"
    assert (job.state, job.stage) == (JobState.SUCCEEDED, "save")


@pytest.mark.parametrize("possible", [True, False])
def test_onnx_or_why_there_is_none(
    possible: bool, claimed: Callable[..., Claim], sessions: Sessions, artifacts: Artifacts, tmp_path: Path
) -> None:
    result = RESULT if possible else cast(QuantizationResult, Inexpressible())
    assert publish(claimed(), result, [], tmp_path, artifacts, sessions) == JobState.SUCCEEDED
    with sessions() as session:
        found = {artifact.name: artifact.key for artifact in JobRepository(session).get("job").artifacts}
    if possible:
        assert ONNX_PROBLEM not in found
        assert artifacts.get_bytes(found["onnx"]) == b"onnx"
    else:
        assert "onnx" not in found
        problem = json.loads(artifacts.get_bytes(found[ONNX_PROBLEM]))
        assert (problem["code"], problem["detail"]) == ("onnx_export_unsupported", "Layer 'fc' is of paper.")


def test_a_dry_run_has_a_report_alone(
    claimed: Callable[..., Claim], sessions: Sessions, artifacts: Artifacts, tmp_path: Path
) -> None:
    state = publish_plan(claimed(), {"dry_run": True, "warnings": ["b"]}, ["a"], tmp_path, artifacts, sessions)
    assert state == JobState.SUCCEEDED
    with sessions() as session:
        job = JobRepository(session).get("job")
        report = job.artifact("report")
    assert report is not None
    assert json.loads(artifacts.get_bytes(report.key)) == {"dry_run": True, "warnings": ["b", "a"]}
    assert [artifact.name for artifact in job.artifacts] == ["report"]
    assert (job.state, job.stage) == (JobState.SUCCEEDED, "forecast")


def test_outlived_attempt_leaves_no_file(
    claimed: Callable[..., Claim], sessions: Sessions, artifacts: Artifacts, tmp_path: Path
) -> None:
    claim = claimed()
    with sessions.begin() as session:
        session.execute(update(JobRecord).values(attempt=2))
    assert publish(claim, RESULT, [], tmp_path, artifacts, sessions) is None
    with sessions() as session:
        assert JobRepository(session).get("job").state == JobState.RUNNING
    assert artifacts.keys("") == []


def test_cancelled_at_the_last_moment_leaves_no_file(
    claimed: Callable[..., Claim], sessions: Sessions, artifacts: Artifacts, tmp_path: Path
) -> None:
    claim = claimed()
    with sessions.begin() as session:
        JobRepository(session).cancel("job")
    assert publish(claim, RESULT, [], tmp_path, artifacts, sessions) == JobState.CANCELLED
    assert artifacts.keys("") == []

"""Publishes a job's results: files first, each whole, then one fenced commit that makes them the job's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.orm import Session, sessionmaker

from aquant_core.errors import AQuantError
from service.artifacts import Artifacts, job_prefix
from service.jobs.records import ONNX_PROBLEM, ArtifactRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.schemas import Problem
from service.jobs.states import JobState

if TYPE_CHECKING:
    from aquant_core import QuantizationResult


def publish(
    claim: Claim,
    result: QuantizationResult,
    warnings: list[str],
    folder: Path,
    artifacts: Artifacts,
    sessions: sessionmaker[Session],
) -> JobState | None:
    """Store report, checkpoint and ONNX and end the job; its last state, or None where the claim was lost.

    The keys hold the attempt's number, so that an outlived worker cannot write over its successor's files;
    where the commit does not make the files the job's, they are deleted again.
    """
    checkpoint = folder / "quantized.safetensors"
    result.save(checkpoint)
    name, exported = _export(result, folder)
    report = _write_report(result.report, warnings, folder)
    files = {"report": report, "checkpoint": checkpoint, name: exported}
    return _finish(claim, "save", files, artifacts, sessions)


def publish_plan(
    claim: Claim,
    document: dict[str, Any],
    warnings: list[str],
    folder: Path,
    artifacts: Artifacts,
    sessions: sessionmaker[Session],
) -> JobState | None:
    """The same for a dry run, whose report is all it has."""
    files = {"report": _write_report(document, warnings, folder)}
    return _finish(claim, "forecast", files, artifacts, sessions)


def _write_report(document: dict[str, Any], warnings: list[str], folder: Path) -> Path:
    path = folder / "report.json"
    document = {**document, "warnings": list(dict.fromkeys([*document.get("warnings", []), *warnings]))}
    path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False))
    return path


def _finish(
    claim: Claim, stage: str, files: dict[str, Path], artifacts: Artifacts, sessions: sessionmaker[Session]
) -> JobState | None:
    prefix = f"{job_prefix(claim.job_id)}attempt-{claim.attempt}/"
    state = None
    try:
        records = [_record(claim, name, artifacts, prefix, path) for name, path in files.items()]
        with sessions.begin() as session:
            state = JobRepository(session).finish(claim, JobState.SUCCEEDED, stage, artifacts=records)
    finally:
        if state != JobState.SUCCEEDED:
            artifacts.discard(prefix)
    return state


def _export(result: QuantizationResult, folder: Path) -> tuple[str, Path]:
    """The network as ONNX; where it cannot be, the problem that says why, which is no reason for the job to fail."""
    path = folder / "quantized.onnx"
    try:
        result.export_onnx(path)
    except AQuantError as error:
        problem = Problem.of_job(error.code, error.detail, error.remedy)
        path = folder / "onnx-problem.json"
        path.write_text(problem.model_dump_json())
        return ONNX_PROBLEM, path
    return "onnx", path


def _record(claim: Claim, name: str, artifacts: Artifacts, prefix: str, path: Path) -> ArtifactRecord:
    stored = artifacts.put_file(prefix + path.name, path)
    return ArtifactRecord(
        job_id=claim.job_id,
        name=name,
        key=stored.key,
        format=path.suffix.removeprefix("."),
        size=stored.size,
        sha256=stored.sha256,
    )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value

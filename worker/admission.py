"""The worker's side of the intake: fetches the uploads, has the sandbox read them, judges how it ended."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aquant_core.config import QuantizationConfig
from aquant_core.progress import Progress
from service.artifacts import Artifacts
from service.jobs.records import JobRecord
from service.jobs.schemas import Problem
from service.settings import Settings
from worker import sandbox
from worker.confinement import CALLS, FILES, PRIVILEGES
from worker.intake import CALIBRATION, CAPTURED, EVALUATION, MESSAGES, Request
from worker.lease import JobStopError, Lease

log = logging.getLogger(__name__)


class IntakeFailedError(Exception):
    """The uploads are not fit to be quantized; another attempt would find the same."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class IntakeLostError(IntakeFailedError):
    """The child was killed from outside, or found no space; another attempt may do better."""


@dataclass(frozen=True)
class Intake:
    """Checked uploads, as files this package's core wrote itself, and what the user should know of them."""

    captured: Path
    calibration: Path
    evaluation: Path | None
    warnings: list[str]


def admit(job: JobRecord, lease: Lease, folder: Path, artifacts: Artifacts, settings: Settings) -> Intake:
    """Take a job's uploads in.

    Raises:
        IntakeFailedError: they are not fit.
        JobStopError: the job had to stop meanwhile.
    """
    uploads: dict[str, Path] = {}
    for artifact in job.artifacts:
        lease.check()
        uploads[artifact.name] = folder / f"{artifact.name}.{artifact.format}"
        artifacts.get_file(artifact.key, uploads[artifact.name])
    limits = sandbox.Limits(
        wall_seconds=settings.intake_seconds,
        cpu_seconds=math.ceil(settings.intake_seconds) * (os.cpu_count() or 1),
        memory_bytes=settings.intake_memory_bytes,
        file_bytes=settings.intake_file_bytes,
    )
    request = Request(
        parent=os.getpid(),
        limits=limits,
        model=uploads["model"],
        calibration=uploads["calibration"],
        evaluation=uploads.get("evaluation"),
        config=QuantizationConfig.model_validate(job.config),
    )
    path = folder / "request.json"
    path.write_text(request.model_dump_json())
    messages: dict[str, Any] = {}

    def on_line(line: str) -> None:
        message = _read_message(line)
        if not messages and isinstance(confined := message.get("confined"), list):
            _tell_confinement(job.id, [str(name) for name in confined])
        messages.update(message)
        if message.get("stage") == "capture":
            try:
                lease.report(Progress(stage="capture"))
            except JobStopError:
                return  # should_stop sees it too, and ends the child

    # Safe path: what lies in the folder is not to be imported.
    argv = [sys.executable, "-P", "-m", "worker.intake", str(path)]
    outcome = sandbox.run(argv, folder, limits, on_line, lambda: lease.stopping)
    lease.check()
    if outcome.returncode == 0 and "warnings" in messages:
        for upload in uploads.values():
            upload.unlink()
        evaluation = folder / EVALUATION if request.evaluation else None
        warnings = [str(warning) for warning in messages["warnings"]]
        return Intake(folder / CAPTURED, folder / CALIBRATION, evaluation, warnings)
    if outcome.stderr:
        log.warning("job %s: the intake wrote: %s", job.id, outcome.stderr)
    if "problem" in messages:
        kind = IntakeLostError if messages.get("lost") is True else IntakeFailedError
        raise kind(Problem.model_validate(messages["problem"]))
    raise _judge(outcome, limits)


def _tell_confinement(job_id: str, inside: list[str]) -> None:
    log.info("job %s: the intake is confined in its %s", job_id, ", ".join(inside))
    missing = [name for name in (FILES, CALLS, PRIVILEGES) if name not in inside]
    if missing:
        log.warning(
            "job %s: this kernel or container does not confine the intake in its %s; uploads are read all the same",
            job_id,
            ", ".join(missing),
        )


def _judge(outcome: sandbox.Outcome, limits: sandbox.Limits) -> IntakeFailedError:
    """What to say of a child that ended without a word."""
    if outcome.timed_out or outcome.returncode == -signal.SIGXCPU:
        return IntakeFailedError(
            Problem.of_job(
                "intake_timeout",
                f"Reading the upload took more than the {limits.wall_seconds:.0f} seconds it is given.",
                "Send a smaller model or fewer images, or have the operator raise AQUANT_INTAKE_SECONDS.",
            )
        )
    if outcome.returncode == -signal.SIGKILL:
        return IntakeLostError(
            Problem.of_job(
                "intake_killed",
                "The process that reads the upload was killed each time, most often for want of memory.",
                "Send a smaller model or fewer images, or give the worker more memory.",
            )
        )
    how = f"signal {-outcome.returncode}" if outcome.returncode < 0 else f"exit status {outcome.returncode}"
    return IntakeFailedError(
        Problem.of_job(
            "intake_crashed",
            f"The process that reads the upload broke down ({how}).",
            "The file is damaged, or made to break its reader: export the model again.",
        )
    )


def _read_message(line: str) -> dict[str, Any]:
    """The child is not to be trusted once it has read an upload: what is no message of its kind is dropped."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return {key: message[key] for key in MESSAGES if key in message} if isinstance(message, dict) else {}

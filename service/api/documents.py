"""Turns a job's row into the document the API shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from aquant_core.config import QuantizationConfig
from service.jobs.records import JobRecord
from service.jobs.schemas import FileInfo, JobDocument, JobLinks, JobProgress, Problem, WebhookStatus
from service.jobs.states import FINISHED, Device, JobState


def describe(job: JobRecord, queue_position: int | None = None, workers: Sequence[Device] = ()) -> JobDocument:
    """The document of a job; ``workers`` are the devices of those alive."""
    here = f"/jobs/{job.id}"
    done = job.state == JobState.SUCCEEDED
    filenames: dict[str, str] = (job.origin or {}).get("filenames", {})
    return JobDocument(
        id=job.id,
        name=_name_of(job, filenames),
        state=job.state,
        stage=job.stage,
        device=job.device,
        queue_position=queue_position,
        workers=sum(job.device in (None, device) for device in workers) if job.state == JobState.QUEUED else None,
        progress=progress_of(job),
        attempt=job.attempt,
        created_at=job.created_at,
        started_at=job.started_at,
        finished_at=job.finished_at,
        config=QuantizationConfig.model_validate(job.config),
        files={
            artifact.name: FileInfo(
                size=artifact.size,
                sha256=artifact.sha256,
                format=artifact.format,
                filename=filenames.get(artifact.name),
            )
            for artifact in sorted(job.artifacts, key=lambda artifact: artifact.name)
        },
        error=None if job.error is None else Problem.model_validate(job.error),
        webhook=None
        if job.webhook is None
        else WebhookStatus(
            url=job.webhook.url,
            tries=job.webhook.tries,
            delivered_at=job.webhook.delivered_at,
            error=job.webhook.error,
        ),
        links=JobLinks(
            self=here,
            page=f"/page{here}",
            events=f"{here}/events",
            cancel=f"{here}/cancel" if job.state in (JobState.QUEUED, JobState.RUNNING) else None,
            report=f"{here}/report" if done else None,
            checkpoint=f"{here}/checkpoint" if done and job.artifact("checkpoint") is not None else None,
            onnx=f"{here}/onnx" if job.artifact("onnx") is not None else None,
        ),
    )


def progress_of(job: JobRecord) -> JobProgress:
    """How far a job is."""
    progress = JobProgress.model_validate(job.progress or {})
    if job.state in FINISHED:
        progress.eta_seconds = None  # the last estimate of what has ended
    return progress


def _name_of(job: JobRecord, filenames: Mapping[str, str]) -> str:
    model = job.artifact("model")
    digest = job.id[:8] if model is None else f"sha256:{model.sha256[:12]}"
    return filenames.get("model") or job.config.get("architecture") or digest

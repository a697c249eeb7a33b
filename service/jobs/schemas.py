"""The documents of the API: job, page of jobs, problem; shared by server and client."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from aquant_core.config import QuantizationConfig
from aquant_core.report.schema import LossCurve
from service.jobs.problem_kinds import address_of, title_of
from service.jobs.states import FINISHED, Device, JobState

_MAX_WORDS = 2_000


def _fit_to_show(text: str) -> str:
    """It may name what stands in an upload, of any length and in any characters."""
    shown = "".join(character if character.isprintable() else " " for character in text[:_MAX_WORDS])
    return shown if len(text) <= _MAX_WORDS else f"{shown}..."


class Problem(BaseModel):
    """An RFC 9457 problem document; a failed job carries the same one in ``error``."""

    model_config = ConfigDict(extra="allow")

    type: Annotated[
        str,
        Field(description="Where its cause and remedy are explained, on this service: /errors#CODE."),
    ] = "about:blank"
    title: Annotated[str, Field(description="The kind of problem in words.")]
    status: Annotated[
        int | None, Field(description="HTTP status; null inside a job, which was accepted before it failed.")
    ] = None
    code: Annotated[str, Field(description="Stable identifier of the kind of problem.")]
    detail: Annotated[str, AfterValidator(_fit_to_show), Field(description="What was wrong, naming the value.")]
    remedy: Annotated[str, AfterValidator(_fit_to_show), Field(description="What to do about it.")]

    @classmethod
    def of_job(cls, code: str, detail: str, remedy: str) -> Problem:
        """The problem that a failed job carries."""
        return cls(type=address_of(code), title=title_of(code), code=code, detail=detail, remedy=remedy)


class BlockForecast(BaseModel):
    """What one block was expected to take."""

    name: str
    seconds: float
    peak_bytes: int
    placement: Annotated[str, Field(description="Where its inputs and outputs are kept: device, memory or disk.")]
    learned: Annotated[bool, Field(description="Whether it is reconstructed; progress counts no others.")] = True


class JobForecast(BaseModel):
    """What the reconstruction was expected to take, from one trial iteration of every block."""

    seconds: float
    peak_bytes: Annotated[int, Field(description="Memory of the worker's process, or on its GPU.")]
    blocks: list[BlockForecast]


class JobProgress(BaseModel):
    """How far a running job has come."""

    method: Annotated[
        str | None, Field(description="Method under way, of the one asked for and those to compare it with.")
    ] = None
    block: Annotated[int, Field(description="Block under reconstruction, from 1; 0 outside that stage.")] = 0
    blocks: Annotated[
        int, Field(description="Blocks in all, of all networks that a search learns; 0 while unknown.")
    ] = 0
    iteration: Annotated[
        int, Field(description="Step within the block; in search and sensitivity, the width tried.")
    ] = 0
    iterations: Annotated[int, Field(description="Steps per block; in search and sensitivity, widths to be tried.")] = 0
    loss: Annotated[float | None, Field(description="Reconstruction loss of the latest step.")] = None
    curve: Annotated[
        LossCurve | None, Field(description="Reconstruction loss of the block so far, thinned to a few points.")
    ] = None
    eta_seconds: Annotated[
        float | None,
        Field(
            description="Estimated seconds until all blocks are done, what follows not counted; null while no block is "
            "under way."
        ),
    ] = None
    forecast: Annotated[JobForecast | None, Field(description="Null until it is known.")] = None


class FileInfo(BaseModel):
    """One stored file of a job."""

    size: Annotated[int, Field(description="Bytes.")]
    sha256: Annotated[str, Field(description="Digest of the bytes, in hex.")]
    format: str
    filename: Annotated[str | None, Field(description="What its sender called it; null if unknown.")] = None


class WebhookRequest(BaseModel):
    """Whom to tell when a job has ended, by a signed POST (Standard Webhooks)."""

    model_config = ConfigDict(extra="forbid")

    url: Annotated[str, Field(description="https, and a public address.", max_length=2048)]
    secret: Annotated[
        str, Field(description="`whsec_` and the base64 of 24 to 64 random bytes; never shown again.", max_length=128)
    ]


class WebhookStatus(BaseModel):
    """How far the telling of a webhook has come."""

    url: str
    tries: Annotated[int, Field(description="How often it was tried.")]
    delivered_at: datetime | None = None
    error: Annotated[str | None, Field(description="Why the latest try came to nothing.")] = None


JOB_ID = "[0-9a-f]{24}"
"""What every job's id is like: ``submission.new_job_id``."""

FILE_REFERENCE = f"^(sha256:[0-9a-f]{{64}}|job:{JOB_ID})$"
FileReference = Annotated[
    str,
    Field(
        pattern=FILE_REFERENCE,
        description="A complete upload, `sha256:` and its digest in hex; or an earlier job with the same file, `job:` "
        "and its id.",
    ),
]


UploadName = Literal["model", "calibration", "evaluation"]


class JobRequest(BaseModel):
    """A job whose files are here: uploaded before, or those of an earlier job."""

    model_config = ConfigDict(extra="forbid")

    model: FileReference
    calibration: FileReference
    evaluation: FileReference | None = None
    filenames: Annotated[
        dict[UploadName, str], Field(description="What the files are called, to be shown; folders are left out.")
    ] = {}
    config: QuantizationConfig
    device: Annotated[Device | None, Field(description="What it is to run on; else whichever is free first.")] = None
    reuse: Annotated[
        bool, Field(description="If a job with the same config and files has succeeded, answer with that one (200).")
    ] = False
    webhook: WebhookRequest | None = None


class UploadDocument(BaseModel):
    """An upload, and how far it is."""

    sha256: Annotated[str, Field(description="Digest of the whole file, in hex.")]
    size: Annotated[int, Field(description="Bytes of the whole file.")]
    offset: Annotated[int, Field(description="Bytes that are there: where to go on.")]
    complete: Annotated[bool, Field(description="Whole and checked: jobs may name it.")]
    expires_at: Annotated[
        datetime, Field(description="When it is deleted, unless it is sent again, added to, or used by a job before.")
    ]


class JobEvent(BaseModel):
    """Data of an event of a job's stream; what a kind of event does not tell of is left out."""

    at: datetime
    attempt: int
    state: JobState | None = None
    stage: str | None = None
    error: Problem | None = None
    method: str | None = None
    block: int | None = None
    blocks: int | None = None
    loss: float | None = None


class JobLinks(BaseModel):
    """Where to go from here; ``null`` where there is nothing to be had (yet)."""

    self: str
    page: Annotated[str | None, Field(description="The job's page, for people.")] = None
    events: str
    cancel: str | None = None
    report: str | None = None
    checkpoint: str | None = None
    onnx: str | None = None


class JobDocument(BaseModel):
    """A job as the API tells of it."""

    id: str
    name: Annotated[
        str,
        Field(
            description="What to call it: its model's file name, else the architecture, else the beginning of the "
            "model's digest."
        ),
    ] = ""
    state: JobState
    stage: Annotated[
        str | None,
        Field(
            description="intake, capture, forecast, search (for a target), nearest, reconstruct, evaluate, sensitivity "
            "or save."
        ),
    ] = None
    device: Annotated[
        Device | None,
        Field(description="What it runs on, from its first start on; before that what was asked for, null for either."),
    ] = None
    queue_position: Annotated[
        int | None,
        Field(description="Older jobs of the same owner that wait for the same device; owners take turns."),
    ] = None
    workers: Annotated[
        int | None, Field(description="Workers alive that could take a queued job: with 0 it waits for one to start.")
    ] = None
    progress: JobProgress = JobProgress()
    attempt: Annotated[int, Field(description="How often a worker has started on it.")] = 0
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    config: QuantizationConfig
    files: Annotated[dict[str, FileInfo], Field(description="Uploads and results by name.")] = {}
    error: Problem | None = None
    webhook: Annotated[WebhookStatus | None, Field(description="Null if none was asked for.")] = None
    links: JobLinks

    @property
    def finished(self) -> bool:
        """Whether the job has reached a state it never leaves."""
        return self.state in FINISHED


class JobPage(BaseModel):
    """Jobs, newest first."""

    jobs: list[JobDocument]
    next: Annotated[str | None, Field(description="Link to the next page; null on the last.")] = None


class WorkerInfo(BaseModel):
    """A worker and how long ago it gave a sign of life."""

    name: str
    seconds_since_seen: float
    alive: bool
    device: Annotated[Device, Field(description="What it computes on, and which jobs it takes.")]
    detail: Annotated[str, Field(description="The device in words, or why it has no GPU.")]


class Health(BaseModel):
    """Whether the service can do its work, and which part cannot."""

    status: Annotated[str, Field(description="ok or unavailable.")]
    version: Annotated[str | None, Field(description="Of the service.")] = None
    checks: dict[str, Any] = {}
    workers_alive: Annotated[
        int | None, Field(description="With 0, jobs are taken in and wait; null while the database does not answer.")
    ] = None
    workers: Annotated[list[WorkerInfo], Field(description="Without a key, where there are keys, none.")] = []

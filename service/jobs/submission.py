"""Takes a job in: checks configuration and uploads by content, puts in the row, tells the workers."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from pydantic import ValidationError
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.config import QuantizationConfig
from aquant_core.config_reading import faults_of, repeated_key
from service.artifacts import Artifacts, Stored
from service.jobs.announcement import announce
from service.jobs.errors import (
    ConfigError,
    FormError,
    PreprocessUnusedError,
    UploadEmptyError,
    UploadMissingError,
)
from service.jobs.idempotency import IdempotencyKeys
from service.jobs.image_files import ARCHIVES, check_images
from service.jobs.model_files import check_model
from service.jobs.owners import Account
from service.jobs.queue import JobQueue, QueueDownError
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.references import References, earlier_files
from service.jobs.repository import JobRepository, now
from service.jobs.schemas import UploadName, WebhookRequest
from service.jobs.states import Device, JobState
from service.jobs.uploads import UploadRepository
from service.jobs.webhooks import new_webhook
from service.logs import what_about
from service.settings import Settings
from service.tracing import carrier

log = logging.getLogger(__name__)

FORM_REMEDY = (
    "Send multipart/form-data with the files `model` and `calibration`, optionally `evaluation`, and the "
    "field `config` (JSON)."
)
CONFIG_REMEDY = (
    "Only weight_bits and activation_bits are required, or a target; /docs has the schema (QuantizationConfig)."
)
TWICE_REMEDY = "Say it once: which of the two was meant cannot be told."
UPLOADS: tuple[UploadName, ...] = get_args(UploadName)


def new_job_id() -> str:
    """An id that cannot be guessed and needs no escaping anywhere."""
    return secrets.token_hex(12)


@dataclass(frozen=True)
class Submission:
    """What a submitter sent.

    Attributes:
        job_id: the id the job is to have.
        owner: whose it is to be.
        config: what is to be done.
        device: what it is to run on, if it matters.
        files: those sent along; they are already in the store, under the job's prefix.
        references: those that are here: uploaded before, or of an earlier job.
        filenames: what the files are called where they came from.
        reuse: whether a job that did the same work will do as well.
        webhook: whom to tell of the end.
        idempotency_key: what the submitter calls this request, to send it again without having it done again.
        is_form: whether the key names a form, which may have been changed when it is sent again.
    """

    job_id: str
    owner: str | None
    config: QuantizationConfig | None
    device: Device | None
    files: Mapping[UploadName, Stored]
    references: References
    filenames: Mapping[UploadName, str]
    reuse: bool = False
    webhook: WebhookRequest | None = None
    idempotency_key: str | None = None
    is_form: bool = False


@dataclass(frozen=True)
class Submitted:
    """What came of a submission: a new job, or one that was there."""

    job_id: str
    outcome: Literal["queued", "replayed", "reused"]


class Submitter:
    """Turns submissions into queued jobs."""

    def __init__(
        self, settings: Settings, sessions: sessionmaker[Session], queue: JobQueue, artifacts: Artifacts
    ) -> None:
        self._settings, self._sessions, self._queue, self._artifacts = settings, sessions, queue, artifacts

    def submit(self, submission: Submission) -> Submitted:
        """Queue the job, once everything that can be told without reading the model has been checked.

        Where another job is the answer, or an error, the submission's files are the caller's to delete.

        Raises:
            ServiceError: what is wrong with it.
        """
        config, references = submission.config, submission.references
        if config is None:
            raise ConfigError("The form has no field `config`.", CONFIG_REMEDY)
        for name in ("model", "calibration"):
            if not any(name in sent for sent in (submission.files, references.uploads, references.jobs)):
                raise FormError(
                    f"The form has no file `{name}`.",
                    FORM_REMEDY,
                )
        webhook = (
            None if submission.webhook is None else new_webhook(submission.webhook, self._settings.webhook_networks)
        )
        earlier_job = references.jobs.get("model")
        submission = self._with_earlier(submission)
        with self._sessions.begin() as session:
            taken = _take(self._uploads(session, submission), submission.references.uploads)
        files = {**submission.files, **taken}
        job = JobRecord(
            id=submission.job_id,
            owner=submission.owner,
            state=JobState.QUEUED,
            device=submission.device,
            config=config.model_dump(mode="json"),
            created_at=now(),
            origin={
                "request_id": what_about().get("request_id"),
                "filenames": dict(submission.filenames),
                "earlier_job": earlier_job,
                **carrier(),
            },
            fingerprint=_fingerprint(config, submission.device, files),
            attempt=0,
            webhook=webhook,
            artifacts=[
                ArtifactRecord(
                    job_id=submission.job_id,
                    name=name,
                    key=stored.key,
                    format=self._check(name, stored, config),
                    size=stored.size,
                    sha256=stored.sha256,
                )
                for name, stored in files.items()
            ],
        )
        if config.preprocess is not None and not any(artifact.format in ARCHIVES for artifact in job.artifacts):
            raise PreprocessUnusedError(
                "config.preprocess says how image files are prepared, and the images come as arrays.",
                "Send the image files as a zip or tar, or leave preprocess out: arrays are taken as they are.",
            )
        try:
            submitted = self._put_in(submission, job)
        except IntegrityError:  # the same idempotency key, at the same time: the job is there now
            submitted = self._put_in(submission, job)
        if submitted.outcome == "queued":
            self._announce(job.id)
        return submitted

    def _put_in(self, submission: Submission, job: JobRecord) -> Submitted:
        """Add the job, unless another is the answer; all in one transaction."""
        key, asked = submission.idempotency_key, _digest_of_request(submission, job)
        with self._sessions.begin() as session:
            keys = IdempotencyKeys(session, self._settings, submission.owner)
            if key is not None and submission.is_form:
                key = keys.of_form(key, asked)
            if key is not None and (known := keys.job_of(key, asked)) is not None:
                return Submitted(known, "replayed")
            repository = JobRepository(session).of(submission.owner)
            if submission.reuse and (same := repository.same_work(job.fingerprint or "")) is not None:
                if key is not None:
                    keys.add(key, asked, same.id)
                return Submitted(same.id, "reused")
            sent = sum(stored.size for stored in submission.files.values())
            Account(session, self._settings, submission.owner).check_job(sent)
            if key is not None:
                keys.add(key, asked, job.id)
            taken = _take(self._uploads(session, submission), submission.references.uploads)
            for name, stored in taken.items():  # as they were when they were checked
                if stored.key not in {artifact.key for artifact in job.artifacts}:
                    raise UploadMissingError(name, stored.sha256)
            repository.add(job)
        return Submitted(job.id, "queued")

    def _with_earlier(self, submission: Submission) -> Submission:
        """The submission with the files of earlier jobs: uploads are shared, of others it gets its own."""
        with self._sessions.begin() as session:
            earlier = earlier_files(session, submission.owner, submission.references.jobs)
        shared = {file.name: file.stored.sha256 for file in earlier if file.is_shared}
        copies = {file.name: file.copy(self._artifacts, submission.job_id) for file in earlier if not file.is_shared}
        filenames = {file.name: file.filename for file in earlier if file.filename is not None}
        return replace(
            submission,
            files={**submission.files, **copies},
            references=References({**submission.references.uploads, **shared}, {}),
            filenames={**filenames, **submission.filenames},
        )

    def _announce(self, job_id: str) -> None:
        log.info("job %s is queued", job_id)
        try:
            announce(job_id, self._sessions, self._queue)
        except QueueDownError as error:
            # The row is in, so the job is accepted; the reaper announces it when the broker is back.
            log.warning("job %s is queued but not announced yet: %s", job_id, error)

    def _uploads(self, session: Session, submission: Submission) -> UploadRepository:
        return UploadRepository(session, self._settings, submission.owner)

    def _check(self, name: UploadName, stored: Stored, config: QuantizationConfig) -> str:
        if stored.size == 0:
            raise UploadEmptyError(f"The file `{name}` is empty.", "Send the file's bytes.")
        with self._artifacts.open(stored.key) as file:
            if name == "model":
                return check_model(file, stored.size, config.architecture)
            return check_images(file, stored.size, name, self._settings.max_unpacked_bytes, config.preprocess)


def read_device(text: bytes) -> Device:
    """The device a job asks for.

    Raises:
        FormError: there is none of this name.
    """
    for device in get_args(Device):
        if text.decode(errors="replace").strip() == device:
            return cast(Device, device)
    raise FormError(
        f"`device` is {text[:40].decode(errors='replace')!r}.", "Say gpu or cpu, or leave it out to take either."
    )


def read_config(text: bytes) -> QuantizationConfig:
    """The job's configuration.

    Raises:
        ConfigError: it is not JSON, names a key twice, or holds something the core does not take; faults are named.
    """
    try:
        config = QuantizationConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigError(f"The configuration is not valid: {faults_of(error)}.", CONFIG_REMEDY) from error
    if (twice := repeated_key(text)) is not None:
        raise ConfigError(f'The configuration names "{twice}" twice.', TWICE_REMEDY)
    return config


def _take(uploads: UploadRepository, references: Mapping[UploadName, str]) -> dict[UploadName, Stored]:
    """The files that were uploaded before."""
    taken: dict[UploadName, Stored] = {}
    for name, sha256 in references.items():
        upload = uploads.use(sha256)
        if upload is None or upload.key is None:
            raise UploadMissingError(name, sha256)
        taken[name] = Stored(upload.key, upload.size, upload.sha256)
    return taken


def _fingerprint(config: QuantizationConfig, device: Device | None, files: Mapping[UploadName, Stored]) -> str:
    """The same for all jobs that are to do the same work; what is as by default may be said or not."""
    digests = {name: stored.sha256 for name, stored in files.items()}
    return _digest([config.model_dump(mode="json", exclude_defaults=True), device, digests])


def _digest_of_request(submission: Submission, job: JobRecord) -> str:
    webhook = None if submission.webhook is None else submission.webhook.model_dump()
    return _digest([job.fingerprint, submission.reuse, webhook])


def _digest(document: Any) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

"""Takes a job in: checks configuration and uploads by content, puts in the row, tells the workers."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from pydantic import ValidationError
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.config import QuantizationConfig
from service.artifacts import Artifacts, Stored
from service.jobs.announcement import announce
from service.jobs.errors import ConfigError, FormError, UploadEmptyError
from service.jobs.image_files import check_images
from service.jobs.model_files import check_model
from service.jobs.owners import Account
from service.jobs.queue import JobQueue, QueueDownError
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import JobRepository, now
from service.jobs.states import Device, JobState
from service.logs import what_about
from service.settings import Settings
from service.tracing import carrier

log = logging.getLogger(__name__)

UploadName = Literal["model", "calibration", "evaluation"]
CONFIG_REMEDY = (
    "Only weight_bits and activation_bits are required, or a target; /docs has the schema (QuantizationConfig)."
)
UPLOADS: tuple[UploadName, ...] = get_args(UploadName)


def new_job_id() -> str:
    """An id that cannot be guessed and needs no escaping anywhere."""
    return secrets.token_hex(12)


@dataclass(frozen=True)
class Submission:
    """What a submitter sent; the uploads are already in the store, under the job's prefix."""

    job_id: str
    owner: str | None
    config: QuantizationConfig | None
    device: Device | None
    uploads: Mapping[UploadName, Stored]


class Submitter:
    """Turns submissions into queued jobs."""

    def __init__(
        self, settings: Settings, sessions: sessionmaker[Session], queue: JobQueue, artifacts: Artifacts
    ) -> None:
        self._settings, self._sessions, self._queue, self._artifacts = settings, sessions, queue, artifacts

    def submit(self, submission: Submission) -> None:
        """Queue the job, once everything that can be told without reading the model has been checked.

        Raises:
            ServiceError: what is wrong with it. The uploads are the caller's to delete then.
        """
        config = submission.config
        if config is None:
            raise ConfigError("The form has no field `config`.", CONFIG_REMEDY)
        for name in ("model", "calibration"):
            if name not in submission.uploads:
                raise FormError(
                    f"The form has no file `{name}`.",
                    "Send multipart/form-data with the files `model` and `calibration`, optionally "
                    "`evaluation`, and the field `config` (JSON).",
                )
        records = [
            ArtifactRecord(
                job_id=submission.job_id,
                name=name,
                key=stored.key,
                format=self._check(name, stored, config),
                size=stored.size,
                sha256=stored.sha256,
            )
            for name, stored in submission.uploads.items()
        ]
        with self._sessions.begin() as session:
            Account(session, self._settings, submission.owner).check_job(sum(record.size for record in records))
            JobRepository(session).add(
                JobRecord(
                    id=submission.job_id,
                    owner=submission.owner,
                    state=JobState.QUEUED,
                    device=submission.device,
                    config=config.model_dump(mode="json"),
                    created_at=now(),
                    origin={"request_id": what_about().get("request_id"), **carrier()},
                    attempt=0,
                    artifacts=records,
                )
            )
        log.info("job %s is queued", submission.job_id)
        try:
            announce(submission.job_id, self._sessions, self._queue)
        except QueueDownError as error:
            # The row is in, so the job is accepted; the reaper announces it when the broker is back.
            log.warning("job %s is queued but not announced yet: %s", submission.job_id, error)

    def _check(self, name: UploadName, stored: Stored, config: QuantizationConfig) -> str:
        if stored.size == 0:
            raise UploadEmptyError(f"The file `{name}` is empty.", "Send the file's bytes.")
        with self._artifacts.open(stored.key) as file:
            if name == "model":
                return check_model(file, stored.size, config.architecture)
            return check_images(file, stored.size, name, self._settings.max_unpacked_bytes)


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
        ConfigError: it is not JSON, or holds something the core does not take; all faults are named.
    """
    try:
        return QuantizationConfig.model_validate_json(text)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc'])) or 'config'}: {_plain(fault['type'], fault['msg'])}"
            for fault in error.errors(include_url=False, include_context=False)
        ]
        raise ConfigError(f"The configuration is not valid: {'; '.join(faults)}.", CONFIG_REMEDY) from error


def _plain(kind: str, message: str) -> str:
    return "unknown key" if kind == "extra_forbidden" else message.removeprefix("Value error, ")

"""Takes in the body of a submission as it streams: a form from a program, one from the page, or JSON."""

from __future__ import annotations

import asyncio
from typing import Protocol

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import TypeAdapter, ValidationError

from aquant_core.config import QuantizationConfig
from aquant_core.config_reading import faults_of, repeated_key
from service.api.auth import Owner
from service.api.deps import Parts
from service.api.forms import FormStream, Part, read_whole, without_folder
from service.artifacts import ArtifactsDownError, Stored, job_prefix
from service.jobs.errors import ConfigError, FormError, ServiceError, UploadTooLargeError
from service.jobs.owners import Room, check_queued
from service.jobs.references import References, read_reference
from service.jobs.schemas import JobRequest, UploadName, WebhookRequest
from service.jobs.states import Device
from service.jobs.submission import (
    CONFIG_REMEDY,
    FORM_REMEDY,
    TWICE_REMEDY,
    UPLOADS,
    Submission,
    Submitted,
    new_job_id,
    read_config,
    read_device,
)
from service.logs import about
from service.settings import Settings

MAX_FIELD_BYTES = 4096


class Fields(Protocol):
    """What a form says besides its files; the fields come in any order, before, between and after them."""

    device: Device | None
    reuse: bool
    webhook: WebhookRequest | None
    filenames: dict[UploadName, str]
    is_form: bool

    async def take(self, part: Part) -> None:
        """Read a field.

        Raises:
            ServiceError: there is no such field, or it cannot be taken.
        """

    def config(self) -> QuantizationConfig | None:
        """What is to be done, once all of the form has been read; None if it does not say.

        Raises:
            ConfigError: it cannot be.
        """


class JobFields:
    """The fields of ``POST /jobs``; the config is checked as soon as it is there."""

    is_form = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._config: QuantizationConfig | None = None
        self.device: Device | None = None
        self.reuse = False
        self.webhook: WebhookRequest | None = None
        self.filenames: dict[UploadName, str] = {}

    async def take(self, part: Part) -> None:
        """Read a field."""
        if part.name == "config":
            self._config = read_config(await part.content(self._settings.max_config_bytes))
        elif part.name == "device":
            self.device = read_device(await part.content(MAX_FIELD_BYTES))
        elif part.name == "reuse":
            self.reuse = _read_flag(await text_of(part))
        elif part.name == "webhook":
            self.webhook = _read_webhook(await text_of(part))
        elif part.name == "filenames":
            self.filenames = _read_filenames(await part.content(MAX_FIELD_BYTES))
        else:
            raise FormError(f"The form has a part {part.name!r}, which means nothing here.", FORM_REMEDY)

    def config(self) -> QuantizationConfig | None:
        """The field ``config``."""
        return self._config


async def take_in(
    request: Request, parts: Parts, owner: Owner, fields: Fields, idempotency_key: str | None = None
) -> Submitted:
    """Queue what a request submits.

    Raises:
        ServiceError: what is wrong with it. Nothing of it is kept then.
    """
    job_id = new_job_id()
    content_type = request.headers.get("content-type")
    form: FormStream | None = None
    submitted: Submitted | None = None
    try:
        if content_type is not None and content_type.partition(";")[0].strip().lower() == "application/json":
            submission = await _read_json(job_id, request, owner, idempotency_key, parts.settings.max_config_bytes)
        else:
            form = FormStream(request.stream(), content_type)
            room = await run_in_threadpool(_room, owner, idempotency_key)
            submission = await _receive(job_id, form, owner, idempotency_key, parts, room, fields)
        with about(job_id=job_id):
            submitted = await run_in_threadpool(parts.submitter.submit, submission)
    except (ServiceError, ArtifactsDownError):
        if form is not None:
            await form.drain()
        raise
    finally:
        if submitted is None or submitted.job_id != job_id:
            # Whatever went wrong, a lost connection included: nothing of it stays in the store.
            await asyncio.shield(run_in_threadpool(parts.artifacts.discard, job_prefix(job_id)))
    return submitted


def _room(owner: Owner, key: str | None) -> Room:
    """What the owner may send: known before anything is stored, and decided when the row is put in."""
    with owner.account() as account:
        limits, usage = account.limits(), account.usage()
    if key is not None and owner.has_used(key):  # what is sent will not be kept: the job is there
        return Room(limits, None)
    check_queued(limits, usage)
    return Room(limits, usage)


async def _read_json(job_id: str, request: Request, owner: Owner, key: str | None, limit: int) -> Submission:
    """A body that names files that are here."""
    too_large = UploadTooLargeError(
        f"The JSON body is larger than the {limit} bytes this service takes.", "Send files as uploads."
    )
    body = await read_whole(request.stream(), limit, too_large)
    try:
        asked = JobRequest.model_validate_json(body, strict=True)
    except ValidationError as error:
        if all(fault["loc"][:1] == ("config",) for fault in error.errors()):
            raise ConfigError(f"The configuration is not valid: {faults_of(error)}.", CONFIG_REMEDY) from error
        raise FormError(
            f"The body is no job: {faults_of(error, 'the whole', values=False)}.",
            "See JobRequest in /docs; files are named as sha256:DIGEST or job:ID.",
        ) from error
    if (twice := repeated_key(body)) is not None:
        refusal = ConfigError if twice.startswith("config.") else FormError
        raise refusal(f'The body names "{twice}" twice.', TWICE_REMEDY)
    named: dict[UploadName, str] = {"model": asked.model, "calibration": asked.calibration}
    if asked.evaluation is not None:
        named["evaluation"] = asked.evaluation
    filenames = {name: without_folder(filename) for name, filename in asked.filenames.items()}
    return Submission(
        job_id,
        owner.name,
        asked.config,
        asked.device,
        {},
        References.of(named),
        filenames,
        asked.reuse,
        asked.webhook,
        key,
    )


async def _receive(
    job_id: str, form: FormStream, owner: Owner, key: str | None, parts: Parts, room: Room, fields: Fields
) -> Submission:
    """Stream the form's files to the store."""
    files: dict[UploadName, Stored] = {}
    filenames: dict[UploadName, str] = {}
    named: dict[UploadName, str] = {}
    seen: set[str] = set()
    async for part in form.parts():
        if part.name in seen:
            raise FormError(f"The form has `{part.name}` twice.", FORM_REMEDY)
        seen.add(part.name)
        name = next((name for name in UPLOADS if name == part.name), None)
        if name is None:
            await fields.take(part)
        elif part.filename is None:
            named[name] = read_reference(name, await text_of(part))
        else:
            chunks = room.admit(part.chunks(room.limits.upload_bytes))
            stored = await parts.artifacts.put_stream(job_prefix(job_id) + name, chunks)
            if stored.size or part.filename:  # else a browser's way to say that no file was chosen
                files[name], filenames[name] = stored, part.filename
    filenames |= fields.filenames
    return Submission(
        job_id, owner.name, fields.config(), fields.device, files, References.of(named), filenames, fields.reuse,
        fields.webhook, key, fields.is_form,
    )  # fmt: skip


async def text_of(part: Part) -> str:
    """A short field."""
    return (await part.content(MAX_FIELD_BYTES)).decode("utf-8", "replace").strip()


def _read_flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise FormError(f"`reuse` is {text[:80]!r}.", "Say true or false, or leave it out.")
    return text == "true"


def _read_webhook(text: str) -> WebhookRequest:
    try:
        return WebhookRequest.model_validate_json(text)
    except ValidationError as error:
        raise FormError(
            f"The field `webhook` is not valid: {faults_of(error, 'the whole', values=False)}.",
            'Send {"url": "https://...", "secret": "whsec_..."}.',
        ) from error


def _read_filenames(text: bytes) -> dict[UploadName, str]:
    try:
        said = TypeAdapter(dict[UploadName, str]).validate_json(text, strict=True)
    except ValidationError as error:
        raise FormError(
            f"The field `filenames` is not valid: {faults_of(error, 'the whole', values=False)}.",
            'Send {"model": "net.onnx"}, with what is to be shown for `model`, `calibration` or `evaluation`.',
        ) from error
    if (twice := repeated_key(text)) is not None:
        raise FormError(f'The field `filenames` names "{twice}" twice.', TWICE_REMEDY)
    return {name: without_folder(filename) for name, filename in said.items()}

"""Named errors of the service: what was wrong, with which value, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

KEY_REMEDY = (
    "Send the header `Authorization: Bearer KEY`; the aquant command takes the key from AQUANT_API_KEY or --key. "
    "The operator makes keys with `aquant keys create`."
)


class ServiceError(Exception):
    """Base of every error that reaches the user as a problem document.

    Attributes:
        code: stable identifier.
        detail: what was wrong, naming the value.
        remedy: what the caller can do about it.
        members: further members of the problem document.
        headers: header fields of the answer.
    """

    code = "service_error"
    headers: Mapping[str, str] = MappingProxyType({})

    def __init__(self, detail: str, remedy: str, **members: Any) -> None:
        super().__init__(f"{detail} {remedy}")
        self.detail = detail
        self.remedy = remedy
        self.members = members


class JobNotFoundError(ServiceError):
    """There is no job of this id."""

    code = "job_not_found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"There is no job {job_id!r}.", "List the jobs with GET /jobs.")


class JobStateError(ServiceError):
    """The job is not in a state that allows this."""

    code = "job_state_conflict"


class ArtifactNotReadyError(ServiceError):
    """The job has not produced this artifact (yet)."""

    code = "artifact_not_ready"


class OnnxUnavailableError(ServiceError):
    """The job's network cannot be written as ONNX; the worker found out why."""

    code = "onnx_export_unsupported"


class CursorError(ServiceError):
    """A page cursor that this service did not hand out."""

    code = "cursor_invalid"


class FormError(ServiceError):
    """The request body is not the multipart form that POST /jobs takes."""

    code = "form_invalid"


class FormTypeError(ServiceError):
    """The request body is not multipart/form-data at all."""

    code = "content_type_unsupported"


class UploadTooLargeError(ServiceError):
    """A part of the form is larger than this deployment takes."""

    code = "upload_too_large"


class UploadEmptyError(ServiceError):
    """An uploaded file holds no bytes."""

    code = "upload_empty"


class ConfigError(ServiceError):
    """The job's configuration is not valid."""

    code = "config_invalid"


class ModelRefusedError(ServiceError):
    """A model in a format that is never read, because reading it would run code from the file."""

    code = "model_format_unsupported"


class ModelInvalidError(ServiceError):
    """The model file is damaged, or not a model at all."""

    code = "model_invalid"


class ArchitectureMissingError(ServiceError):
    """A state dict came without the name of the network it belongs to."""

    code = "architecture_missing"


class ImagesInvalidError(ServiceError):
    """The image file is damaged, not an image set, or of a shape or type that cannot be images."""

    code = "images_invalid"


class UploadNotFoundError(ServiceError):
    """There is no upload of this digest, or it is somebody else's."""

    code = "upload_not_found"

    def __init__(self, sha256: str) -> None:
        super().__init__(f"There is no upload {sha256!r}.", f"Send it with PUT /uploads/{sha256}.")


class UploadMissingError(ServiceError):
    """A job names an upload that is not there, or not complete."""

    code = "upload_missing"

    def __init__(self, name: str, sha256: str) -> None:
        super().__init__(
            f"`{name}` is said to be sha256:{sha256}, of which there is no complete upload.",
            f"Complete PUT /uploads/{sha256} first; HEAD tells how far it is.",
        )


class JobFileMissingError(ServiceError):
    """A job is to have a file of another job that is not there."""

    code = "job_file_missing"

    def __init__(self, name: str, job_id: str) -> None:
        super().__init__(
            f"`{name}` is said to be that of job {job_id}, and there is no such job, or it has none.",
            "Send the file, or name a job that has it; GET /jobs lists them.",
        )


class UploadInUseError(ServiceError):
    """An upload cannot be deleted while a job uses it."""

    code = "upload_in_use"


class UploadOffsetError(ServiceError):
    """A piece does not begin where its upload ends."""

    code = "upload_offset_conflict"

    def __init__(self, detail: str, offset: int) -> None:
        super().__init__(detail, f"Go on at byte {offset}.", offset=offset)


class ContentRangeError(ServiceError):
    """A piece's place in its file cannot be read, or is not what was said before."""

    code = "content_range_invalid"


class DigestMismatchError(ServiceError):
    """A finished upload is not what it was announced as."""

    code = "digest_mismatch"


class IdempotencyKeyReusedError(ServiceError):
    """An idempotency key came a second time, with another request."""

    code = "idempotency_key_reused"


class IdempotentJobDeletedError(ServiceError):
    """The job that an idempotency key stands for is gone."""

    code = "idempotent_job_deleted"


class WebhookRefusedError(ServiceError):
    """A webhook's address or secret is not one that is used."""

    code = "webhook_refused"


class PreprocessMissingError(ServiceError):
    """An archive of images came without a word on how they are prepared."""

    code = "preprocess_missing"


class PreprocessUnusedError(ServiceError):
    """The configuration says how image files are prepared, and there are none."""

    code = "preprocess_unused"


class DryRunError(ServiceError):
    """A job that forecasts and does not run has no checkpoint."""

    code = "dry_run_has_no_checkpoint"


class KeyMissingError(ServiceError):
    """The service asks for an API key, and the request has none."""

    code = "key_missing"
    headers = MappingProxyType({"WWW-Authenticate": 'Bearer realm="aquant"'})

    def __init__(self) -> None:
        super().__init__("This call needs an API key, and the request has none.", KEY_REMEDY)


class KeyInvalidError(ServiceError):
    """The request's API key is not one, or no longer."""

    code = "key_invalid"
    headers = MappingProxyType({"WWW-Authenticate": 'Bearer realm="aquant", error="invalid_token"'})


class KeyScopeError(ServiceError):
    """The request's API key is for something else."""

    code = "key_scope_insufficient"


class KeysRequiredError(ServiceError):
    """A stranger asks a service that has no API keys."""

    code = "keys_required"


class HostRefusedError(ServiceError):
    """The request calls the service by a name that may be someone else's."""

    code = "host_refused"


class OriginRefusedError(ServiceError):
    """A page of another site wants to change something."""

    code = "origin_refused"


class LimitError(ServiceError):
    """A limit on what one owner may use, in ``limit``, and the present use, in ``used``."""

    def __init__(self, detail: str, remedy: str, *, limit: int, used: int, retry_after: int | None = None) -> None:
        super().__init__(detail, remedy, limit=limit, used=used)
        if retry_after is not None:
            self.headers = {"Retry-After": str(retry_after)}


class RateLimitedError(LimitError):
    """Too many requests within a minute."""

    code = "rate_limited"


class JobQuotaError(LimitError):
    """The owner has as many jobs waiting as may be."""

    code = "job_quota_exceeded"


class StorageQuotaError(LimitError):
    """The owner's files would take more than they may."""

    code = "storage_quota_exceeded"

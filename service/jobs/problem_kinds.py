"""Every kind of problem there is: its code, where it is met, cause and remedy; ``docs/errors.md`` is made of it."""

from __future__ import annotations

from dataclasses import dataclass

PAGE = "/errors"
"""Where the service tells of all of them."""


@dataclass(frozen=True)
class Kind:
    """One kind of problem.

    Attributes:
        status: HTTP status of an answer; None if no answer has it.
        cause: what has happened, in general; an occurrence's ``detail`` names the value.
        remedy: what to do, in general.
        in_job: whether a job may carry it as its ``error``; what neither has is raised by the library alone.
    """

    status: int | None
    cause: str
    remedy: str
    in_job: bool = False


def _job(cause: str, remedy: str) -> Kind:
    return Kind(None, cause, remedy, in_job=True)


def _library(cause: str, remedy: str) -> Kind:
    return Kind(None, cause, remedy)


def _either(status: int, cause: str, remedy: str) -> Kind:
    return Kind(status, cause, remedy, in_job=True)


_SERVER = "If it stays, tell the operator the answer's `X-Request-ID`: the server's log has the reason under it."

KINDS: dict[str, Kind] = {
    # The request itself.
    "request_invalid": Kind(
        422,
        "A parameter or header of the request is missing, of the wrong type or out of its range.",
        "The detail names each; `/docs` and docs/api.md have the parameters of every call.",
    ),
    "not_found": Kind(404, "The service has nothing at this path.", "See `/docs` for the paths there are."),
    "method_not_allowed": Kind(
        405, "The path exists, but not for this method.", "Use one of the methods in the `Allow` header."
    ),
    "body_too_large": Kind(413, "The request's body is larger than this call takes.", "Send a smaller body."),
    "content_type_unsupported": Kind(
        415,
        "The body's `Content-Type` is not one that this call reads.",
        "`POST /jobs` takes `multipart/form-data` or `application/json`.",
    ),
    "http_error": Kind(
        400, "The request could not be understood, for a reason without a code of its own.", "The detail says more."
    ),
    "cursor_invalid": Kind(
        422,
        "The `cursor` of a list is not one that this service gave out.",
        "Follow the `next` link of a page as it is; begin without a cursor.",
    ),
    "range_not_satisfiable": Kind(
        416,
        "The `Range` asked for begins beyond the end of the file.",
        "`Content-Range` of the answer has the file's size; ask for a range inside it.",
    ),
    # Who asks, and for how much.
    "key_missing": Kind(
        401,
        "This call needs an API key, and the request has none.",
        "Send `Authorization: Bearer KEY`. The operator makes keys with `aquant keys create`.",
    ),
    "key_invalid": Kind(
        401,
        "The request's API key is not one of this service, or has expired or been revoked.",
        "Check that it was copied whole, or have the operator make another with `aquant keys create`.",
    ),
    "key_scope_insufficient": Kind(
        403,
        "The request's API key is for something else: one for metrics does not submit jobs, and the reverse.",
        "Use another key; the operator makes them with `aquant keys create`, with `--metrics` for metrics.",
    ),
    "keys_required": Kind(
        403,
        "The service has no API keys, and so answers its own machine alone.",
        "Its operator makes the first key with `aquant keys create`, or sets `AQUANT_OPEN=true`.",
    ),
    "host_refused": Kind(
        403,
        "A service without API keys was called by a name that may be someone else's.",
        "Call it by its address or as localhost, or have the operator add the name to `AQUANT_HOSTS`.",
    ),
    "origin_refused": Kind(
        403,
        "A page of another site wants to change something here.",
        "Send the request from a page of the service itself, or from a program.",
    ),
    "rate_limited": Kind(
        429,
        "Too many requests within a minute, by this owner or, without keys, from this address.",
        "Wait for `Retry-After`. Follow jobs with `?wait=20` or their event stream instead of asking often.",
    ),
    "job_quota_exceeded": Kind(
        429,
        "As many jobs of this owner wait as may; `limit` and `used` say how many.",
        "Wait for `Retry-After` or until one has begun, or cancel one.",
    ),
    "storage_quota_exceeded": Kind(
        403,
        "This owner's files would take more than they may; `limit` and `used` are bytes.",
        "Delete jobs and uploads that are no longer needed, or ask the operator for a higher limit.",
    ),
    # Submitting.
    "form_invalid": Kind(
        400,
        "The body of `POST /jobs` cannot be read as its form: damaged, cut short, or with a part that is missing, "
        "doubled or unknown.",
        "Send the files `model` and `calibration`, optionally `evaluation`, and the field `config`; a part with a "
        "file name is a file, one without is a field.",
    ),
    "config_invalid": Kind(
        422,
        "The job's `config` is missing, not JSON, names a key twice, or holds an unknown key or a value that is not "
        "taken.",
        "The detail names the faults, the first 20 of many. Only `weight_bits` and `activation_bits` are required, or "
        "a `target`; the schema QuantizationConfig is in `/docs` and docs/api.md.",
    ),
    "upload_empty": Kind(422, "An uploaded file has no bytes.", "Send the file's bytes."),
    "upload_too_large": Kind(
        413,
        "A file, or the `config`, is larger than this deployment takes.",
        "Send a smaller one, or ask the operator for a higher limit.",
    ),
    "model_format_unsupported": Kind(
        415,
        "The model is in a format that is never read here, because reading it would run code from the file "
        "(pickled modules, TorchScript, `.pt2`).",
        "Export it as ONNX, or save its state dict as safetensors and name the `architecture`.",
    ),
    "model_invalid": _either(
        422,
        "The model is damaged, or not a model in one of the formats that are read; or it is ONNX, and the config's "
        "`architecture` names another network.",
        "Check that it loads where it was exported (`onnx.checker`, `safetensors`), and export it again. With ONNX "
        "leave `architecture` out.",
    ),
    "architecture_missing": Kind(
        422,
        "A state dict has weights but no network.",
        "Name the network it belongs to in the config's `architecture`, or send ONNX.",
    ),
    "images_invalid": _either(
        422,
        "A file of calibration or evaluation images is damaged, of a wrong shape or type, or has too few images.",
        "Send `.npz` with `images` (N, C, H, W) and, for evaluation, `labels`, or one of the other formats in the "
        "README; shapes must fit the model's input.",
    ),
    "preprocess_missing": _either(
        422,
        "An archive of image files came without a word on how they are prepared.",
        "Say in the config's `preprocess` (size, crop, mean, std) what the network was trained with.",
    ),
    "preprocess_unused": Kind(
        422,
        "The config's `preprocess` says how image files are prepared, and the images come as arrays.",
        "Send the image files as a zip or tar, or leave `preprocess` out.",
    ),
    "idempotency_key_reused": Kind(
        422,
        "The `Idempotency-Key` was used before with another body.",
        "Use a new key for a new job, and the old one only to send the same request again.",
    ),
    "idempotent_job_deleted": Kind(
        409,
        "The request was carried out before under this `Idempotency-Key`, and its job has been deleted since.",
        "Use a new key to have the job run again.",
    ),
    "webhook_refused": Kind(
        422,
        "The webhook's address or secret is not one this service uses: only https to public addresses, and a secret "
        "of 24 to 64 bytes.",
        "Give an https URL without credentials, and a secret as `whsec_` and its base64. An operator can admit "
        "private networks with `AQUANT_WEBHOOK_ALLOW`.",
    ),
    # Jobs.
    "job_not_found": Kind(
        404, "There is no job of this id, or it is somebody else's.", "List your jobs with `GET /jobs`."
    ),
    "job_state_conflict": Kind(
        409,
        "The job's state does not allow this: one that has finished cannot be cancelled, one that runs not deleted.",
        "The remedy of the answer says what is possible now.",
    ),
    "artifact_not_ready": Kind(
        409,
        "The job has not produced this file: it has not succeeded yet, or never will.",
        "Follow the job until it has `succeeded`; a failed one has the reason in its `error`.",
    ),
    "dry_run_has_no_checkpoint": Kind(
        404,
        "The job is a dry run: it forecasts and does not run, and has a plan for its report, nothing more.",
        "Read its report; submit it again without `dry_run` to have it run.",
    ),
    "onnx_export_unsupported": Kind(
        409,
        "The job's network, or its settings, cannot be written as ONNX with standard operators.",
        "The detail says why. The checkpoint holds the same network.",
    ),
    # Uploads.
    "upload_not_found": Kind(
        404,
        "There is no upload of this digest, it has expired, or it is somebody else's.",
        "Send it with `PUT /uploads/{sha256}` from the first byte.",
    ),
    "upload_missing": Kind(
        422,
        "A job names an upload (`sha256:...`) that is not there or not complete.",
        "Complete it with `PUT /uploads/{sha256}` first; `HEAD` tells how far it is.",
    ),
    "job_file_missing": Kind(
        422,
        "A job names a file of an earlier job (`job:...`) that is not there.",
        "Send the file, or name a job that has it; `GET /jobs` lists them.",
    ),
    "upload_in_use": Kind(
        409, "The upload cannot be deleted while a job uses it.", "Delete the jobs that use it first."
    ),
    "upload_offset_conflict": Kind(
        409,
        "A piece does not begin where the upload ends, or another request added one meanwhile.",
        "Go on at the `offset` of the answer, which is also the `Upload-Offset` of `HEAD`.",
    ),
    "content_range_invalid": Kind(
        400,
        "The `Content-Range` of a piece cannot be read, or does not fit its body, or the size said before.",
        "Send `bytes FIRST-LAST/SIZE` with exactly those bytes, or `bytes */SIZE` with none.",
    ),
    "digest_mismatch": Kind(
        422,
        "The bytes of a finished upload do not have the sha256 they were announced with; they have been deleted.",
        "Compute the digest of the file again and send it from the first byte.",
    ),
    # What the worker finds in an upload.
    "operator_unsupported": _job(
        "The network has an operator that cannot be captured.",
        "The detail names operator and node; replace it, or quantize the part of the network before it.",
    ),
    "architecture_unknown": _job(
        "The config's `architecture` is not in the catalogue.", "The remedy of the job's error lists the names."
    ),
    "weights_mismatch": _job(
        "The state dict does not fit the architecture: weights are missing, left over, or of another shape.",
        "Check that the architecture is the one it was saved from; the detail names the weights.",
    ),
    "values_not_finite": _job(
        "There is NaN or infinity in weights, images or the network's outputs.",
        "Check the model where it was trained, and the images' preprocessing.",
    ),
    "capture_mismatch": _job(
        "The captured graph does not reproduce the float model's outputs.",
        "Report it with the model: this is an error of the service, which stops before it gives wrong results.",
    ),
    "layer_unknown": _job(
        "The config names a layer that the network does not have.", "The job's error lists the names that are like it."
    ),
    "dry_run_requested": _library(
        "A config with `dry_run` was given to what runs; a job with it ends after its forecast.",
        "Call `aquant_core.plan`, or leave `dry_run` out.",
    ),
    "checkpoint_invalid": _job(
        "A quantized checkpoint is damaged, incomplete or of an unknown format version.",
        "Copy or download it again from where it was written, or quantize anew with this version.",
    ),
    "device_unavailable": _library(
        "A network was to run, or be quantized, on a device that is not there; jobs run on their worker's.",
        'Run it with `device="cpu"`, or on a machine with an NVIDIA driver and a torch that was built for CUDA.',
    ),
    "resume_mismatch": _job(
        "The finished blocks kept for a further attempt belong to another run.",
        "Submit the job again; if it happens twice, tell the operator the job's id.",
    ),
    "upload_unreadable": _job(
        "The upload could not be read, for a reason without a code of its own.",
        "Check that the model runs where it was exported, and send it again.",
    ),
    "upload_too_large_for_memory": _job(
        "Reading the upload takes more memory than the check is given.",
        "Send a smaller model or fewer images, or have the operator raise `AQUANT_INTAKE_MEMORY_BYTES`.",
    ),
    "intake_timeout": _job(
        "Reading the upload takes longer than the check is given.",
        "Send a smaller model or fewer images, or have the operator raise `AQUANT_INTAKE_SECONDS`.",
    ),
    "intake_killed": _job(
        "The process that reads the upload was killed each time, most often for want of memory.",
        "Send a smaller model or fewer images, or have the operator give the worker more memory.",
    ),
    "intake_crashed": _job(
        "The process that reads the upload broke down: the file is damaged, or made to break its reader.",
        "Export the model again.",
    ),
    # What happens to running jobs.
    "time_limit_exceeded": _job(
        "The job ran for longer than this deployment allows.",
        "Choose a smaller preset or fewer iterations, or have the operator raise `AQUANT_JOB_SECONDS`.",
    ),
    "memory_limit_exceeded": _job(
        "The job took more memory than this deployment gives it.",
        "Send fewer images or a smaller network, or have the operator raise `AQUANT_JOB_MEMORY_BYTES`.",
    ),
    "memory_exceeded": _job(
        "The memory of the worker's machine does not do for this job.",
        "Send fewer images or a smaller network, or have the operator lower `AQUANT_MEMORY_BYTES` or give the worker "
        "more memory.",
    ),
    "gpu_memory_exceeded": _job(
        "The GPU's memory does not do for this job.",
        "Submit it with `device` cpu, or have the operator lower `AQUANT_DEVICE_MEMORY_BYTES`.",
    ),
    "gpu_lost": _job(
        "The GPU broke down while it ran this job, in every attempt.",
        "Submit it again; the operator finds the GPU's error in the worker's log.",
    ),
    "worker_lost": _job(
        "The worker stopped without a word, in every attempt; most often it ran out of memory.",
        "Try a smaller model or fewer images, or a worker with more memory.",
    ),
    "disk_full": _job(
        "The worker's disk had no space left, in every attempt.",
        "Submit the job again once there is space; docs/operations.md says how much a job needs.",
    ),
    # The service's own state.
    "database_unavailable": Kind(
        503, "The service's database does not answer.", f"Try again after `Retry-After`. {_SERVER}"
    ),
    "artifacts_unavailable": _either(
        503, "The store of the service's files does not answer.", f"Try again after `Retry-After`. {_SERVER}"
    ),
    "not_ready": Kind(
        503,
        "A part the service needs (database, files or broker) does not answer.",
        "`checks` of the answer names it; the probe turns green by itself when it is back.",
    ),
    "internal_error": _either(500, "The service met an error that nobody foresaw.", f"Try again. {_SERVER}"),
}


def title_of(code: str) -> str:
    """A kind's name in words."""
    return code.replace("_", " ").capitalize()


def address_of(code: str) -> str:
    """Where a kind is explained: the ``type`` of its problem documents."""
    return f"{PAGE}#{code}"

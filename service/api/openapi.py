"""What FastAPI cannot find out by itself for the OpenAPI document: the body of a submission, and examples."""

from __future__ import annotations

from typing import Any, get_args

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from service.jobs.schemas import JobEvent, JobRequest
from service.jobs.states import Device

_SCHEMAS = "#/components/schemas/"
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "fast"}


def _file(description: str) -> dict[str, Any]:
    return {
        "type": "string",
        "format": "binary",
        "description": f"{description} A part with a file name, or a field that names "
        "an upload, `sha256:DIGEST`, or an earlier job with the same file, `job:ID`.",
    }


SUBMISSION: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["model", "calibration", "config"],
                    "additionalProperties": False,
                    "properties": {
                        "config": {"$ref": f"{_SCHEMAS}QuantizationConfig-Input"},
                        "model": _file("ONNX, or a safetensors or .pth state dict."),
                        "calibration": _file(
                            "Images: .npz (`images`, `labels`), .npy, safetensors; or a zip or tar of image files, "
                            "with `preprocess`."
                        ),
                        "evaluation": _file("Labelled images to measure accuracy on."),
                        "device": {
                            "type": "string",
                            "enum": list(get_args(Device)),
                            "description": "What it is to run on; without it whichever is free first.",
                        },
                        "reuse": {
                            "type": "boolean",
                            "description": "If a job with the same config and files has succeeded, answer with that "
                            "one (200).",
                        },
                        "filenames": JobRequest.model_json_schema()["properties"]["filenames"],
                        "webhook": {"$ref": f"{_SCHEMAS}WebhookRequest"},
                    },
                },
                "encoding": {
                    "config": {"contentType": "application/json"},
                    "filenames": {"contentType": "application/json"},
                    "webhook": {"contentType": "application/json"},
                },
            },
            "application/json": {
                "schema": {"$ref": f"{_SCHEMAS}JobRequest"},
                "examples": {
                    "uploads": {
                        "summary": "Files that were uploaded before",
                        "value": {
                            "model": f"sha256:{_DIGEST}",
                            "calibration": f"sha256:{_DIGEST}",
                            "filenames": {"model": "resnet18.onnx"},
                            "config": _CONFIG,
                        },
                    }
                },
            },
        },
    }
}
"""OpenAPI's entry for the body of POST /jobs, which is read as it streams."""

EVENT: dict[str, Any] = {
    "type": "object",
    "description": "One event.",
    "properties": {
        "event": {"type": "string", "enum": ["state", "stage", "block", "progress", "deleted"]},
        "id": {"type": "string", "description": "Its number; the next connection's Last-Event-ID."},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [{"$ref": f"{_SCHEMAS}JobEvent"}, {"$ref": f"{_SCHEMAS}JobProgress"}]},
        },
    },
}
"""OpenAPI's schema of each event of a stream."""

_JOB = {
    "id": "0a1b2c3d4e5f60718293a4b5",
    "name": "resnet18.onnx",
    "state": "running",
    "stage": "reconstruct",
    "queue_position": None,
    "progress": {
        "method": "aquant",
        "block": 2,
        "blocks": 5,
        "iteration": 120,
        "iterations": 300,
        "loss": 0.0173,
        "eta_seconds": 41.5,
        "forecast": None,
    },
    "attempt": 1,
    "created_at": "2026-01-31T12:00:00Z",
    "started_at": "2026-01-31T12:00:05Z",
    "finished_at": None,
    "config": _CONFIG,
    "files": {"model": {"size": 183204, "sha256": _DIGEST, "format": "onnx", "filename": "resnet18.onnx"}},
    "error": None,
    "webhook": None,
    "links": {
        "self": "/jobs/0a1b2c3d4e5f60718293a4b5",
        "page": "/page/jobs/0a1b2c3d4e5f60718293a4b5",
        "events": "/jobs/0a1b2c3d4e5f60718293a4b5/events",
        "cancel": "/jobs/0a1b2c3d4e5f60718293a4b5/cancel",
        "report": None,
        "checkpoint": None,
        "onnx": None,
    },
}
_EXAMPLES: dict[str, Any] = {
    "JobDocument": _JOB,
    "JobPage": {"jobs": [_JOB], "next": "/jobs?limit=1&cursor=MjAyNi0wMS0zMVQxMjowMDowMCswMDowMCAwYTFi"},
    "UploadDocument": {
        "sha256": _DIGEST,
        "size": 4194304,
        "offset": 1048576,
        "complete": False,
        "expires_at": "2026-02-02T12:00:00Z",
    },
    "Health": {
        "status": "ok",
        "checks": {"database": "ok", "artifacts": "ok", "broker": "ok", "workers": "1 alive"},
        "workers": [
            {"name": "worker@host", "device": "cpu", "detail": "2 cores", "seconds_since_seen": 1.2, "alive": True}
        ],
    },
}


def install(app: FastAPI) -> None:
    """Complete the application's OpenAPI document."""
    made_by_fastapi = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made_by_fastapi())
        return made_by_fastapi()

    app.openapi = document  # type: ignore[method-assign]


def _complete(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name, example in _EXAMPLES.items():
        schemas[name]["examples"] = [example]
    # A schema of what is sent lets defaults be left out; one of what is answered promises them.
    asked = models_json_schema([(JobRequest, "validation")], ref_template=_SCHEMAS + "{model}")[1]
    told = models_json_schema([(JobEvent, "validation")], ref_template=_SCHEMAS + "{model}")[1]
    definitions = {"JobEvent": told["$defs"]["JobEvent"], **asked["$defs"]}
    renamed = {
        name: f"{name}-Input" for name in definitions if schemas.get(name, definitions[name]) != definitions[name]
    }
    for name, definition in definitions.items():
        schemas[renamed.get(name, name)] = _with_references(definition, renamed)
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    operations = {
        f"{method} {path}": operation for path, item in document["paths"].items() for method, operation in item.items()
    }
    for operation in operations.values():
        operation["responses"] = dict(sorted(operation["responses"].items()))
        for parameter in operation.get("parameters", []):
            parameter["schema"] = _without_null(parameter["schema"])
    _link(operations)


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter that is optional can be left out; there is no null among them."""
    alternatives: list[dict[str, Any]] = [entry for entry in schema.get("anyOf", []) if entry != {"type": "null"}]
    if len(alternatives) != 1:
        return schema
    return {name: value for name, value in schema.items() if name != "anyOf"} | alternatives[0]


def _link(operations: dict[str, dict[str, Any]]) -> None:
    """Say where an answer's values lead to."""
    of_a_job = {
        operation["operationId"]: {
            "operationId": operation["operationId"],
            "parameters": {"job_id": "$response.body#/id"},
        }
        for name, operation in operations.items()
        if "{job_id}" in name
    }
    for status in ("200", "202"):
        operations["post /jobs"]["responses"][status]["links"] = of_a_job
    of_an_upload = {
        operation["operationId"]: {
            "operationId": operation["operationId"],
            "parameters": {"sha256": "$response.body#/sha256"},
        }
        for name, operation in operations.items()
        if "{sha256}" in name
    }
    for status in ("200", "201", "202"):
        operations["put /uploads/{sha256}"]["responses"][status]["links"] = of_an_upload


def _with_references(node: Any, renamed: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {
            key: _SCHEMAS + renamed.get(name := str(value).removeprefix(_SCHEMAS), name)
            if key == "$ref"
            else _with_references(value, renamed)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [_with_references(value, renamed) for value in node]
    return node

"""What the generated requests need to get anywhere: files that are there, digests that are true, streams that end."""

from __future__ import annotations

import hashlib
import os
import re
from typing import Any

import schemathesis

FILES = {name: f"sha256:{os.environ[f'TEST_{name.upper()}']}" for name in ("model", "calibration")}
ENDED_JOB = os.environ["TEST_ENDED_JOB"]

_REFERENCE = re.compile(r"sha256:[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:  # noqa: ARG001
    """Change what is valid but cannot be known; what is invalid stays as it is."""
    label, body = case.operation.label, case.body
    if label == "POST /jobs" and isinstance(body, dict):
        for name, reference in FILES.items():
            if isinstance(value := body.get(name), str) and _REFERENCE.fullmatch(value):
                body[name] = reference
        if isinstance(value := body.get("evaluation"), str) and _REFERENCE.fullmatch(value):
            body["evaluation"] = FILES["calibration"]
    path = case.path_parameters
    if label == "PUT /uploads/{sha256}" and isinstance(body, bytes) and body:
        named = path.get("sha256")
        whole = not any(name.lower() == "content-range" for name in case.headers)
        if whole and isinstance(named, str) and _DIGEST.fullmatch(named):
            path["sha256"] = hashlib.sha256(body).hexdigest()
    if label == "GET /jobs/{job_id}/events" and re.fullmatch("[0-9a-f]{24}", str(path.get("job_id"))):
        path["job_id"] = ENDED_JOB  # one that waits would be followed for ever
    if label == "GET /jobs/{job_id}" and isinstance(wait := (case.query or {}).get("wait"), int | float):
        case.query["wait"] = min(wait, 0.01) if 0 <= wait <= 20 else wait

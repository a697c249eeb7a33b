"""Generated requests, valid and invalid, alone and one after another: whatever comes, the OpenAPI document is true."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fastapi import FastAPI
from httpx import Client
from servers import PAIRS

from service.main import create_app
from service.settings import Settings

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)
def test_the_service_is_as_its_document_says(
    serve: Callable[[FastAPI], AbstractContextManager[Client]],
    settings: Settings,
    make_key: Callable[..., dict[str, str]],
    onnx_model: bytes,
    images: bytes,
    tmp_path: Path,
) -> None:
    unlimited = {"reads_per_minute": 0, "writes_per_minute": 0}
    with serve(create_app(settings.model_copy(update=unlimited))) as web:
        key = make_key("ada")
        environment = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(SUPPORT)}
        for name, data in {"model": onnx_model, "calibration": images}.items():
            digest = hashlib.sha256(data).hexdigest()
            web.put(f"/uploads/{digest}", content=data, headers=key).raise_for_status()
            environment[f"TEST_{name.upper()}"] = digest
        files = {name: f"sha256:{environment[f'TEST_{name.upper()}']}" for name in ("model", "calibration")}
        ended = web.post("/jobs", json={**files, "config": {"weight_bits": 2, "activation_bits": 2}}, headers=key)
        web.post(f"{ended.headers['location']}/cancel", headers=key).raise_for_status()
        environment["TEST_ENDED_JOB"] = ended.json()["id"]
        done = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"),
                f"--config-file={SUPPORT / 'schemathesis.toml'}",
                "--no-color",
                "run",
                f"{web.base_url}/openapi.json",
                f"--header=Authorization:{key['Authorization']}",
                "--checks=all",
                "--max-examples=8",
                "--continue-on-failure",
                "--no-shrink",
            ],
            env={**os.environ, **environment},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert web.get("/jobs", headers=key).status_code == 200
        count = sum(map(len, web.get("/openapi.json").json()["paths"].values()))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Selected: {count}/{count}" in done.stdout
    assert f"Tested: {count}" in done.stdout

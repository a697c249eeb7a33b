"""The whole service on PostgreSQL and S3, as on several machines that share no folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx
import pytest
import uploads
from servers import S3, Storage

from service.artifacts import open_artifacts
from service.client import Client, ServiceProblemError
from service.jobs.states import JobState
from service.local import local_stack
from service.settings import Settings

CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke"}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(600),
    pytest.mark.parametrize("storage", ["postgresql-s3"], indirect=True),
]


def test_job_from_upload_to_deletion(storage: Storage, s3: S3, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path / "data",
        database_url=storage.database_url,
        artifacts_url=storage.artifacts_url,
        broker_url=None,
        port=0,
    )
    artifacts = open_artifacts(settings.artifacts)
    with local_stack(settings) as stack, Client(stack.url) as client:
        model, images = tmp_path / "model.onnx", tmp_path / "images.npz"
        model.write_bytes(uploads.onnx_model())
        images.write_bytes(uploads.images())
        job = client.wait(client.submit(model, images, CONFIG).id, 240)
        assert job.state == JobState.SUCCEEDED, job.error
        target = tmp_path / "quantized.safetensors"
        assert client.download(job.id, target) == job.files["checkpoint"].sha256
        assert hashlib.sha256(target.read_bytes()).hexdigest() == job.files["checkpoint"].sha256
        assert client.report(job.id)["accuracy"]["quantized"]["n"] > 0
        health = httpx.get(f"{stack.url}/health/ready").json()
        assert health["checks"] == {"database": "ok", "artifacts": "ok", "broker": "ok", "workers": "1 alive"}
        kept = {key.rpartition("/")[2] for key in artifacts.keys(f"jobs/{job.id}")}
        assert kept == {"quantized.onnx", "quantized.safetensors", "report.json"}
        client.delete(job.id)
        assert (
            len(artifacts.keys("uploads")) == len(artifacts.keys("")) == 2
        )  # other jobs may name them, until they expire
        with pytest.raises(ServiceProblemError, match="There is no job"):
            client.get(job.id)
    assert sorted(path.name for path in settings.data_dir.iterdir()) == ["broker", "logs", "up.lock", "work"]
    assert s3.unfinished_uploads() == []

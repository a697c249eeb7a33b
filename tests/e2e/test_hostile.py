"""A corpus of hostile uploads against the whole service: each is refused or fails with its code, and all goes on."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import uploads
from hostile import PREPROCESS, Hostile, corpus
from PIL import Image

from service.client import Client, ServiceProblemError
from service.jobs.schemas import JobDocument
from service.jobs.states import JobState
from service.local import Stack, local_stack
from service.settings import MIB, Settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke"}
CORPUS = [one for one in corpus() if not one.alike]
PATIENCE = 600.0
ROOM = 200 * MIB
"""More than this no part may grow by, whatever is sent; what is refused claims up to an exbibyte."""


@dataclass
class Outcomes:
    """What became of the corpus.

    Attributes:
        answers: to what was refused at once, by upload.
        jobs: of what was not, as they ended.
        growth: the peak memory of each part over what it had before, in bytes.
        in_store: the jobs with files in the store, after everything had ended.
        left: in the work folder by then.
    """

    answers: dict[str, httpx.Response] = field(default_factory=dict)
    jobs: dict[str, JobDocument] = field(default_factory=dict)
    growth: dict[str, int] = field(default_factory=dict)
    in_store: set[str] = field(default_factory=set)
    left: list[Path] = field(default_factory=list)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("stack"),
        broker_url=None,
        port=0,
        max_upload_bytes=32 * MIB,
        max_unpacked_bytes=100 * MIB,
        intake_seconds=PATIENCE / 2,
        intake_memory_bytes=2048 * MIB,
        intake_file_bytes=64 * MIB,
    )
    with local_stack(settings) as stack:
        yield stack
        stack.check()


@pytest.fixture(scope="module")
def marker(stack: Stack) -> Path:
    """The file that every payload would make."""
    return stack.data_dir / "marker"


def key(one: Hostile) -> str:
    return f"{one.slot}: {one.name}"


def send(url: str, one: Hostile, marker: Path) -> httpx.Response:
    """The upload in its slot, beside sound ones."""
    files = {"model": uploads.onnx_model(), "calibration": uploads.images(), "evaluation": uploads.images()}
    parts = {"config": json.dumps({**CONFIG, **one.config}).encode(), **files, one.slot: one.data(marker)}
    return httpx.post(f"{url}/jobs", files={name: (name, data) for name, data in parts.items()}, timeout=60)


def processes(stack: Stack) -> dict[str, psutil.Process]:
    """The API, the worker, and the worker's child, in which tasks run."""
    found = {part.name: psutil.Process(part.process.pid) for part in stack.components if part.name != "broker"}
    found["worker's child"] = next(
        child for child in found["worker"].children() if "spawn_main" in " ".join(child.cmdline())
    )
    return found


def peak(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_store(stack: Stack) -> set[str]:
    """The jobs that have files in the store."""
    return {path.name for path in (stack.data_dir / "artifacts" / "jobs").glob("*")}


@pytest.fixture(scope="module")
def outcomes(stack: Stack, marker: Path) -> Outcomes:
    """All of the corpus sent, and waited for."""
    outcomes, before = Outcomes(), {}
    for name, process in processes(stack).items():
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # its peak begins anew
        before[name] = process, process.memory_info().rss
    accepted = {}
    for one in CORPUS:
        response = send(stack.url, one, marker)
        outcomes.answers[key(one)] = response
        if response.status_code == 202:
            accepted[key(one)] = response.json()["id"]
    with Client(stack.url) as client:
        outcomes.jobs = {name: client.wait(job_id, PATIENCE) for name, job_id in accepted.items()}
    outcomes.growth = {name: peak(process) - rss for name, (process, rss) in before.items()}
    deadline = time.monotonic() + 10  # a row is finished a little before its files are gone
    while (left := list((stack.data_dir / "work").iterdir())) and time.monotonic() < deadline:
        time.sleep(0.05)
    outcomes.left = left
    outcomes.in_store = in_store(stack)
    return outcomes


@pytest.mark.parametrize("one", CORPUS, ids=key)
def test_ends_with_its_code(one: Hostile, outcomes: Outcomes) -> None:
    answer = outcomes.answers[key(one)]
    if not one.inside:
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == one.code, answer.text
        problem = answer.json()
    else:
        assert answer.status_code == 202, answer.text
        job = outcomes.jobs[key(one)]
        assert job.state == JobState.FAILED
        assert job.error is not None
        assert (job.error.code, job.attempt) == (one.code, 1), job.error
        problem = job.error.model_dump()
    assert problem["detail"]
    assert problem["remedy"]
    assert len(problem["detail"]) < 3000


def test_no_payload_ran(outcomes: Outcomes, marker: Path) -> None:
    assert sum(one.payload for one in CORPUS) >= 10
    assert outcomes.answers
    assert not marker.exists()


def test_memory_stays_within_limits(outcomes: Outcomes) -> None:
    assert set(outcomes.growth) == {"api", "worker", "worker's child"}
    assert all(grown < ROOM for grown in outcomes.growth.values()), outcomes.growth


def test_nothing_is_left_on_disk(outcomes: Outcomes, stack: Stack) -> None:
    """Of what was refused, nothing; of jobs that failed, what their users may look at until they delete it."""
    assert outcomes.left == []
    assert outcomes.in_store == {job.id for job in outcomes.jobs.values()}
    with Client(stack.url) as client:
        for job in outcomes.jobs.values():
            client.delete(job.id)
    assert in_store(stack) == set()


def test_the_next_good_job_works(outcomes: Outcomes, stack: Stack, tmp_path: Path) -> None:
    assert outcomes.jobs
    (tmp_path / "model.onnx").write_bytes(uploads.onnx_model())
    (tmp_path / "images.npz").write_bytes(uploads.images())
    with Client(stack.url) as client:
        job = client.submit(tmp_path / "model.onnx", tmp_path / "images.npz", CONFIG)
        done = client.wait(job.id, PATIENCE)
    assert (done.state, done.error) == (JobState.SUCCEEDED, None)


def test_the_log_says_how_the_intake_is_confined(outcomes: Outcomes, stack: Stack) -> None:
    log = next(part.log for part in stack.components if part.name == "worker").read_text()
    for job in outcomes.jobs.values():
        assert log.count(f"job {job.id}: the intake is confined in its limits") == 1


def pictures() -> bytes:
    """A zip of pictures in a folder for each of ten classes."""
    buffer = io.BytesIO()
    rng = np.random.default_rng(3)
    with zipfile.ZipFile(buffer, "w") as archive:
        for index in range(40):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (12, 10)).astype(np.uint8)).save(picture, "PNG")
            archive.writestr(f"class{index % 10}/{index}.png", picture.getvalue())
    return buffer.getvalue()


def test_dry_run_on_pictures_ends_after_its_forecast(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(uploads.onnx_model())
    (tmp_path / "pictures.zip").write_bytes(pictures())
    config: dict[str, Any] = {**CONFIG, **PREPROCESS, "dry_run": True}
    with Client(stack.url) as client:
        job = client.submit(tmp_path / "model.onnx", tmp_path / "pictures.zip", config)
        done = client.wait(job.id, PATIENCE)
        assert (done.state, done.stage, done.error) == (JobState.SUCCEEDED, "forecast", None)
        report = client.report(job.id)
        with pytest.raises(ServiceProblemError) as caught:
            client.download(job.id, tmp_path / "nothing")
    assert caught.value.problem.code == "dry_run_has_no_checkpoint"
    assert caught.value.problem.status == 404
    assert done.links.checkpoint is None
    assert done.files["calibration"].format == "zip"
    assert report["dry_run"] is True
    assert report["other_bits"] == ["conv", "fc"]
    assert report["evaluation"]["images"] == 5
    assert done.progress.forecast is not None
    assert [block["name"] for block in report["blocks"]] == [block.name for block in done.progress.forecast.blocks]

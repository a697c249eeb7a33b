"""The whole service as a user meets it: real broker, API and worker processes, HTTP from outside."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from otlp_receiver import Receiver, Span, otlp_receiver
from prometheus_client.parser import text_string_to_metric_families

from service.client import Client, ServiceProblemError
from service.jobs.schemas import JobDocument
from service.jobs.states import JobState
from service.local import Stack, local_stack
from service.local_components import StackError
from service.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "fashion_mnist"
CALIBRATION, EVALUATION = EXAMPLE / "calibration.npz", EXAMPLE / "evaluation.npz"
MODEL = next(iter(sorted(EXAMPLE.glob("residual*.onnx"))), EXAMPLE / "residual.onnx")
CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke"}
LONG = {**CONFIG, "iterations": 100_000}
PATIENCE = 240.0


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Where the stack sends its traces."""
    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Stack]:
    if not MODEL.exists():
        pytest.skip(f"{MODEL} has not been trained yet")
    settings = Settings(
        data_dir=tmp_path_factory.mktemp("stack"),
        broker_url=None,
        port=0,
        lease_seconds=4,
        reaper_seconds=0.5,
        job_seconds=PATIENCE,
        log_format="json",
        otlp_endpoint=receiver.url,
    )
    with local_stack(settings) as stack:
        yield stack
        stack.check()


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.url) as client:
        yield client


@pytest.fixture(scope="module")
def finished(stack: Stack) -> tuple[JobDocument, list[JobDocument]]:
    """The example, quantized; and everything that was seen of it on the way."""
    with Client(stack.url) as client:
        job = client.submit(MODEL, CALIBRATION, {**CONFIG, "compare": ["qdrop"]}, EVALUATION)
        seen = list(client.watch(job.id))
    assert seen[-1].state == JobState.SUCCEEDED, seen[-1].error
    return seen[-1], seen


def worker_child(stack: Stack) -> psutil.Process:
    """The process in which the worker runs its tasks."""
    worker = next(part for part in stack.components if part.name == "worker")
    for child in psutil.Process(worker.process.pid).children():
        if child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline()):
            return child
    raise AssertionError("the worker has no child")


def until(client: Client, job_id: str, reached: Callable[[JobDocument], bool]) -> JobDocument:
    for job in client.watch(job_id):
        if reached(job):
            return job
    raise AssertionError(f"the job ended before that: {job}")


def test_progress_was_shown_on_the_way(finished: tuple[JobDocument, list[JobDocument]]) -> None:
    job, seen = finished
    assert job.stage == "save"
    assert job.started_at is not None
    assert job.finished_at is not None
    assert job.created_at <= job.started_at <= job.finished_at
    assert job.attempt == 1
    assert {one.state for one in seen} >= {JobState.RUNNING, JobState.SUCCEEDED}
    assert {one.progress.method for one in seen} >= {"aquant", "qdrop"}


def test_events_tell_every_stage_and_block(stack: Stack, finished: tuple[JobDocument, list[JobDocument]]) -> None:
    job, _ = finished
    lines = httpx.get(f"{stack.url}{job.links.events}").text.splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    events = list(zip(kinds, data, strict=True))
    states = [event["state"] for kind, event in events if kind == "state"]
    assert states == ["queued", "running", "succeeded"]
    stages = [event["stage"] for kind, event in events if kind == "stage"]
    assert stages == ["capture", "forecast", "nearest", "reconstruct", "evaluate", "sensitivity", "save"]
    blocks = [(event["block"], event["method"]) for kind, event in events if kind == "block"]
    count = job.progress.blocks or max(number for number, _ in blocks)
    assert sorted(blocks) == [(number, method) for number in range(1, count + 1) for method in ("aquant", "qdrop")]
    assert all(event["loss"] > 0 for kind, event in events if kind == "block")


def test_report_and_checkpoint_are_those_of_the_job(
    client: Client, finished: tuple[JobDocument, list[JobDocument]], tmp_path: Path
) -> None:
    job, _ = finished
    report = client.report(job.id)
    assert report["accuracy"]["float"]["top1"] > 0.9
    assert report["accuracy"]["quantized"]["n"] == 2000
    assert report["seed"] == 0
    assert [row["method"] for row in report["comparison"]] == ["aquant", "qdrop"]
    assert report["comparison"][0]["accuracy"] == report["accuracy"]["quantized"]
    assert report["protocol"]["name"] == "paper"
    assert report["size"]["checkpoint_bytes"] == job.files["checkpoint"].size
    files = {"model": MODEL, "calibration": CALIBRATION, "evaluation": EVALUATION}
    assert report["sources"] == {name: path.name for name, path in files.items()}
    assert report["repeat"]["command"].startswith("aquant quantize MODEL --calibration CALIBRATION --evaluation")
    page = client.report_page(job.id)
    assert f"{100 * report['accuracy']['quantized']['top1']:.2f}" in page
    assert page.count('class="of-layer"') == len(report["layers"])
    target = tmp_path / "quantized.safetensors"
    assert client.download(job.id, target) == job.files["checkpoint"].sha256
    assert hashlib.sha256(target.read_bytes()).hexdigest() == job.files["checkpoint"].sha256
    assert list(tmp_path.iterdir()) == [target]


def test_checkpoint_comes_in_ranges(stack: Stack, finished: tuple[JobDocument, list[JobDocument]]) -> None:
    job, _ = finished
    url, size = f"{stack.url}{job.links.checkpoint}", job.files["checkpoint"].size
    whole = httpx.get(url).content
    middle = size // 2
    parts = [httpx.get(url, headers={"Range": f"bytes={span}"}) for span in (f"0-{middle - 1}", f"{middle}-")]
    assert [part.status_code for part in parts] == [206, 206]
    assert b"".join(part.content for part in parts) == whole


def test_onnx_decides_as_the_checkpoint(
    client: Client, finished: tuple[JobDocument, list[JobDocument]], tmp_path: Path
) -> None:
    import onnxruntime
    import torch

    from aquant_core import load
    from aquant_core.images import read_images

    job, _ = finished
    assert job.links.onnx == f"/jobs/{job.id}/onnx"
    assert client.download(job.id, tmp_path / "q.onnx", "onnx") == job.files["onnx"].sha256
    client.download(job.id, tmp_path / "q.safetensors")
    images = read_images(EVALUATION, what="evaluation").images[:200]
    session = onnxruntime.InferenceSession(tmp_path / "q.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": images.numpy()})
    with torch.no_grad():
        assert (logits.argmax(1) == load(tmp_path / "q.safetensors")(images).argmax(1).numpy()).all()


def test_loaded_checkpoint_gives_the_logits_the_worker_evaluated(
    client: Client, finished: tuple[JobDocument, list[JobDocument]], tmp_path: Path
) -> None:
    import torch

    from aquant_core import load
    from aquant_core.images import read_images

    job, _ = finished
    client.download(job.id, tmp_path / "q.safetensors")
    module = load(tmp_path / "q.safetensors")
    images = read_images(EVALUATION, what="evaluation").images
    digest = hashlib.sha256()
    with torch.no_grad():
        for batch in images.split(256):
            digest.update(module(batch).numpy().astype("<f4").tobytes())
    assert digest.hexdigest() == client.report(job.id)["digests"]["logits"]


def lines_of(stack: Stack, name: str) -> list[dict[str, Any]]:
    """What a part of the stack has logged; each line is JSON."""
    log = next(part.log for part in stack.components if part.name == name)
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_log_lines_tell_their_job(stack: Stack, finished: tuple[JobDocument, list[JobDocument]]) -> None:
    job, _ = finished
    accepted = next(line for line in lines_of(stack, "api") if line.get("job_id") == job.id)
    assert (accepted["level"], accepted["logger"]) == ("INFO", "service.jobs.submission")
    first, last = (f"job {job.id}: attempt 1 {what}" for what in ("begins", "ends: succeeded"))
    deadline = time.monotonic() + 30  # the row is finished a little before the worker says so
    while last not in (messages := [line["message"] for line in lines_of(stack, "worker")]):
        assert time.monotonic() < deadline, messages
        time.sleep(0.1)
    lines = lines_of(stack, "worker")[messages.index(first) : messages.index(last) + 1]
    about = {"job_id": job.id, "attempt": 1, "request_id": accepted["request_id"], "trace_id": accepted["trace_id"]}
    assert [
        line for line in lines if not line["logger"].startswith("celery") and not about.items() <= line.items()
    ] == []


def test_trace_goes_from_the_request_to_the_blocks(
    receiver: Receiver, finished: tuple[JobDocument, list[JobDocument]]
) -> None:
    job, seen = finished

    def of_job(spans: list[Span]) -> Span | None:
        return next((span for span in spans if span.attributes.get("aquant.job.id") == job.id), None)

    attempt = of_job(receiver.wait(lambda spans: of_job(spans) is not None))
    assert attempt is not None
    whole = receiver.wait(lambda spans: any(span.id == attempt.parent for span in spans))
    (request,) = (span for span in whole if span.id == attempt.parent)
    assert (request.name, request.service, request.parent) == ("POST /jobs", "aquant-api", "")
    assert (attempt.name, attempt.service, attempt.failed) == ("job attempt", "aquant-worker", False)
    assert attempt.trace == request.trace
    assert attempt.attributes["aquant.job.state"] == "succeeded"
    stages = sorted((span for span in whole if span.parent == attempt.id), key=lambda span: span.start)
    assert [span.name for span in stages] == [
        "intake", "capture", "forecast", "nearest", "reconstruct", "evaluate", "sensitivity", "save",
    ]  # fmt: skip
    reconstruct = next(span for span in stages if span.name == "reconstruct")
    blocks = [span for span in whole if span.parent == reconstruct.id]
    count = max(one.progress.blocks for one in seen)
    assert sorted((span.attributes["aquant.method"], span.attributes["aquant.block"]) for span in blocks) == [
        (method, number) for method in ("aquant", "qdrop") for number in range(1, count + 1)
    ]
    assert all(reconstruct.start <= span.start <= span.end <= reconstruct.end for span in blocks)


def test_metrics_count_what_the_worker_did(stack: Stack, finished: tuple[JobDocument, list[JobDocument]]) -> None:
    job, seen = finished
    assert job.finished_at is not None
    assert job.started_at is not None
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(httpx.get(f"{stack.url}/metrics").text)
        for sample in family.samples
    }
    # The first job of the stack, and not the last.
    assert found["aquant_job_duration_seconds_count", "aquant", "succeeded"] >= 1
    assert (
        found["aquant_job_duration_seconds_sum", "aquant", "succeeded"]
        >= (job.finished_at - job.started_at).total_seconds()
    )
    blocks = max(one.progress.blocks for one in seen)
    assert found["aquant_block_duration_seconds_count", "qdrop"] == blocks  # no other job compares
    assert found["aquant_block_duration_seconds_count", "aquant"] >= blocks
    assert found["aquant_workers_alive", "cpu"] == 1


def left_in(folder: Path) -> list[Path]:
    """What the worker does not clear away once it is done: a row is finished a little before its files are gone."""
    deadline = time.monotonic() + 10
    while (left := list(folder.glob("*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def test_nothing_is_left_in_the_work_folder(stack: Stack, finished: tuple[JobDocument, list[JobDocument]]) -> None:
    assert finished[0].finished
    assert left_in(stack.data_dir / "work") == []


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def cut(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": lambda: b"this is no model"}, "model_invalid"),
        ({"model": lambda: b""}, "upload_empty"),
        ({"model": lambda: cut(MODEL)}, "model_invalid"),
        ({"calibration": lambda: cut(CALIBRATION)}, "images_invalid"),
        ({"calibration": lambda: npz(pictures=np.zeros((8, 1, 28, 28), np.uint8))}, "images_invalid"),
        ({"calibration": lambda: npz(images=np.zeros((8, 28, 28), np.uint8))}, "images_invalid"),
    ],
)
def test_bad_upload_is_refused_at_once(
    client: Client, stack: Stack, tmp_path: Path, changes: dict[str, Callable[[], bytes]], code: str
) -> None:
    before = set((stack.data_dir / "artifacts/jobs").glob("*"))
    with pytest.raises(ServiceProblemError) as caught:
        client.submit(*files(tmp_path, changes), CONFIG)
    assert caught.value.problem.code == code
    assert set((stack.data_dir / "artifacts/jobs").glob("*")) == before


@pytest.mark.parametrize(
    ("changes", "config", "code", "word"),
    [
        (
            {"calibration": lambda: npz(images=np.zeros((64, 3, 28, 28), np.uint8))},
            {},
            "images_invalid",
            "28",
        ),
        ({"calibration": lambda: npz(images=np.zeros((64, 1, 9, 9), np.uint8))}, {}, "images_invalid", "9"),
        ({"calibration": lambda: npz(images=np.zeros((1, 1, 28, 28), np.uint8))}, {}, "images_invalid", "1"),
        (
            {"calibration": lambda: npz(images=np.full((64, 1, 28, 28), np.nan, np.float32))},
            {},
            "values_not_finite",
            "calibration",
        ),
        ({}, {"layers": {"nowhere": {"weight_bits": 4}}}, "layer_unknown", "nowhere"),
        ({"model": lambda: state_dict()}, {"architecture": "resnet999"}, "architecture_unknown", "resnet999"),
        ({"model": lambda: state_dict()}, {"architecture": "resnet18"}, "weights_mismatch", "fc.weight"),
        ({"model": lambda: unsupported()}, {}, "operator_unsupported", "Hardmax"),
    ],
)
def test_bad_upload_fails_in_the_intake(
    client: Client,
    tmp_path: Path,
    changes: dict[str, Callable[[], bytes]],
    config: dict[str, Any],
    code: str,
    word: str,
) -> None:
    job = client.wait(client.submit(*files(tmp_path, changes), {**CONFIG, **config}).id, PATIENCE)
    assert job.state == JobState.FAILED
    assert job.stage in ("intake", "capture")
    assert job.error is not None
    assert (job.error.code, job.attempt) == (code, 1)
    assert word in job.error.detail
    assert job.error.remedy


def files(folder: Path, changes: dict[str, Callable[[], bytes]]) -> tuple[Path, Path]:
    """Paths of model and calibration, with the changed ones written to ``folder``."""
    paths = {"model": MODEL, "calibration": CALIBRATION}
    for name, content in changes.items():
        paths[name] = folder / name
        paths[name].write_bytes(content())
    return paths["model"], paths["calibration"]


def state_dict() -> bytes:
    from safetensors.numpy import save

    return save({"fc.weight": np.ones((10, 4), np.float32)})


def unsupported() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1, 28, 28]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Hardmax", ["x"], ["y"])], "net", [x], [y])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()
    )


def test_running_job_is_cancelled(client: Client, stack: Stack) -> None:
    job = client.submit(MODEL, CALIBRATION, LONG)
    progress = until(client, job.id, lambda now: now.stage == "reconstruct").progress
    assert 1 <= progress.block <= progress.blocks
    assert 0 <= progress.iteration <= progress.iterations == LONG["iterations"]
    assert client.cancel(job.id).state == JobState.CANCELLING
    ended = client.wait(job.id, PATIENCE)
    assert (ended.state, ended.error, ended.links.checkpoint) == (JobState.CANCELLED, None, None)
    client.delete(job.id)
    assert not (stack.data_dir / "artifacts/jobs" / job.id).exists()


def test_job_of_a_killed_worker_is_run_again(client: Client, stack: Stack) -> None:
    job = client.submit(MODEL, CALIBRATION, {**CONFIG, "iterations": 400})
    until(client, job.id, lambda now: now.progress.block == 2)
    worker_child(stack).kill()
    again = until(client, job.id, lambda now: now.attempt == 2 and now.stage == "reconstruct")
    assert "aquant_job_retries_total 1.0" in httpx.get(f"{stack.url}/metrics").text
    assert again.state == JobState.RUNNING
    assert again.progress.block >= 2  # the first was kept
    assert again.progress.forecast is not None
    assert len(again.progress.forecast.blocks) >= again.progress.blocks
    client.cancel(job.id)
    assert client.wait(job.id, PATIENCE).state == JobState.CANCELLED
    assert left_in(stack.data_dir / "artifacts/jobs" / job.id / "blocks") == []
    assert client.wait(client.submit(MODEL, CALIBRATION, CONFIG).id, PATIENCE).state == JobState.SUCCEEDED
    assert left_in(stack.data_dir / "work") == []


def test_job_whose_workers_all_die_fails_with_a_reason(client: Client, stack: Stack) -> None:
    job = client.submit(MODEL, CALIBRATION, LONG)
    for attempt in (1, 2, 3):
        until(client, job.id, lambda now, n=attempt: now.attempt == n and now.state == "running")
        worker_child(stack).kill()
    ended = client.wait(job.id, PATIENCE)
    assert ended.state == JobState.FAILED
    assert ended.error is not None
    assert ended.error.code == "worker_lost"
    lost = [line for line in lines_of(stack, "worker") if "signal 9" in line["message"]]
    assert {line["level"] for line in lost} == {"ERROR"}
    taken_back = [line for line in lines_of(stack, "api") if line["logger"] == "service.jobs.reaper"]
    assert {(line["job_id"], line["attempt"]) for line in taken_back} >= {(job.id, 3)}


def test_no_part_outlives_the_stack(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, broker_url=None, port=0)
    with local_stack(settings) as stack:
        own = [psutil.Process(part.process.pid) for part in stack.components]
        family = own + [child for process in own for child in process.children(recursive=True)]
        url = stack.url
        own[0].kill()  # the broker dies: the rest must still be stopped
        with pytest.raises(StackError, match="broker stopped by itself"):
            stack.watch()
    assert len(family) >= 4
    _, alive = psutil.wait_procs(family, timeout=10)  # a killed process takes a moment to go
    assert alive == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)

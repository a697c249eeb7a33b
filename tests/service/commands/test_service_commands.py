"""The commands that talk to a service, against one: what they print where, and how they end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from job_rows import MINUTE, finish, stored
from old_reports import old_report
from servers import PAIRS
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.report.summary import ending, summary
from service import cli
from service.artifacts import Artifacts
from service.client import Client
from service.commands.progress import describe, job_display, share_done
from service.jobs.keys import KeyRepository
from service.jobs.repository import JobRepository
from service.jobs.schemas import JobDocument, Problem
from service.jobs.states import JobState
from service.settings import Settings

in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

BITS = ("--weight-bits", "2", "--activation-bits", "2")

Sessions = sessionmaker[Session]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Aquant = Callable[..., Done]


@pytest.fixture
def aquant(web: httpx.Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Aquant:
    """Runs a command against the service."""
    monkeypatch.setattr(cli, "entry_points", lambda **_: [])
    monkeypatch.setenv("AQUANT_URL", str(web.base_url).rstrip("/"))

    def run(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["aquant", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told = capsys.readouterr()
        return Done(int(caught.value.code or 0), told.out, told.err)

    return run


@pytest.fixture
def given(files: dict[str, Path]) -> tuple[object, ...]:
    return files["model"], "--calibration", files["calibration"]


def fail(sessions: Sessions, job_id: str) -> None:
    finish(sessions, job_id, JobState.FAILED, error=Problem.of_job("worker_lost", "It is gone.", "Try again."))


@in_a_folder
def test_submit_prints_the_id_or_the_document_and_nothing_else(aquant: Aquant, given: tuple[object, ...]) -> None:
    done = aquant("submit", *given, *BITS, "--idempotency-key", "once")
    assert done.code == 0
    job_id = done.out.strip()
    again = aquant("submit", *given, *BITS, "--idempotency-key", "once", "--json")
    assert (again.code, again.document["id"], again.err) == (0, job_id, "")
    assert aquant("submit", *given, *BITS, "--dry-run", "--json").document["config"]["dry_run"] is True


@in_a_folder
def test_a_target_is_an_option(aquant: Aquant, given: tuple[object, ...]) -> None:
    config = aquant("submit", *given, "--target", "0.5", "--config", '{"seed": 3}', "--json").document["config"]
    assert config["target"] == {"max_accuracy_drop": 0.5}
    assert (config["weight_bits"], config["activation_bits"], config["seed"]) == (2, 2, 3)


@in_a_folder
def test_a_job_s_end_is_the_exit_code(
    aquant: Aquant, sessions: Sessions, artifacts: Artifacts, add_job: Callable[[], str]
) -> None:
    waits, fails, stops, works = (add_job() for _ in range(4))
    fail(sessions, fails)
    assert aquant("cancel", stops).out == "cancelled\n"
    report = {"report": json.dumps(old_report()).encode()}
    finish(sessions, works, results=stored(artifacts, works, report))
    ends = {job_id: aquant("watch", job_id, "--timeout", "0.2") for job_id in (works, fails, stops, waits)}
    assert [end.code for end in ends.values()] == [0, 3, 4, 5]
    assert [end.out for end in ends.values()] == [""] * 4
    assert "It is gone. Try again." in ends[fails].err
    assert f"aquant watch {waits}" in ends[waits].err
    assert ends[works].err.splitlines() == [f"{works} succeeded", *ending(old_report())]
    told = aquant("watch", fails, "--json")
    assert told.document["error"]["code"] == "worker_lost"
    assert told.err == "It is gone. Try again.\n"


@in_a_folder
def test_a_result_that_cannot_be_told_is_no_failure(
    aquant: Aquant, sessions: Sessions, artifacts: Artifacts, add_job: Callable[[], str]
) -> None:
    gone, later = add_job(), add_job()
    finish(sessions, gone)
    finish(sessions, later, results=stored(artifacts, later, {"report": b'{"format": "aquant-report/9"}'}))
    told = aquant("watch", gone)
    assert (told.code, "has no report" in told.err) == (0, True)
    told = aquant("watch", later)
    assert (told.code, f"`aquant report {later} --json` prints it" in told.err) == (0, True)


@in_a_folder
def test_a_report_is_for_eyes_a_browser_or_programs(
    aquant: Aquant, sessions: Sessions, artifacts: Artifacts, add_job: Callable[[], str]
) -> None:
    job_id, later = add_job(), add_job()
    finish(sessions, job_id, results=stored(artifacts, job_id, {"report": json.dumps(old_report()).encode()}))
    shown = aquant("report", job_id)
    assert (shown.code, shown.out.splitlines(), shown.err) == (0, summary(old_report()), "")
    assert aquant("report", job_id, "--json").document == old_report()
    assert aquant("report", job_id, "--html").out.startswith("<!DOCTYPE html>")
    assert aquant("report", job_id, "--html", "--json").code == 2
    finish(sessions, later, results=stored(artifacts, later, {"report": b'{"format": "aquant-report/9"}'}))
    unknown = aquant("report", later)
    assert (unknown.code, unknown.out) == (1, "")
    assert "--json` prints it" in unknown.err
    assert aquant("report", later, "--json").document == {"format": "aquant-report/9"}


@in_a_folder
def test_submit_can_follow(aquant: Aquant, sessions: Sessions, given: tuple[object, ...], web: httpx.Client) -> None:
    def work() -> None:
        while not (jobs := web.get("/jobs").json()["jobs"]):
            time.sleep(0.02)
        fail(sessions, jobs[0]["id"])

    worker = threading.Thread(target=work)
    worker.start()
    done = aquant("submit", *given, *BITS, "--watch", "--json")
    worker.join()
    assert done.code == 3
    documents = [JobDocument.model_validate_json(line) for line in done.out.splitlines()]
    assert documents[-1].state == "failed"
    assert "It is gone" in done.err
    assert "failed" not in done.err


@in_a_folder
def test_lists_are_lines_or_json(aquant: Aquant, sessions: Sessions, add_job: Callable[[], str]) -> None:
    ids = [add_job() for _ in range(3)]
    fail(sessions, ids[0])
    lines = aquant("list").out.splitlines()
    assert {line.split()[0] for line in lines} == set(ids)
    assert all(line.split()[-4:] == ["aquant", "W2A2", "fast", line[:8]] for line in lines)  # without a model, its id
    page = aquant("list", "--limit", "2", "--json").document
    assert [job["id"] for job in aquant("list", "--page", page["next"], "--json").document["jobs"]] == [ids[0]]
    assert [job["id"] for job in aquant("list", "--state", "failed", "--json").document["jobs"]] == [ids[0]]


@in_a_folder
def test_lists_tell_jobs_apart(aquant: Aquant, web: httpx.Client, onnx_model: bytes, images: bytes) -> None:
    for name, config in (
        ("net.onnx", {"target": {"max_accuracy_drop": 0.5}, "preset": "paper"}),
        ("m", {"weight_bits": 4, "activation_bits": 8, "method": "nearest", "dry_run": True}),
        ("n", {"weight_bits": 2, "activation_bits": 2, "layers": {"fc": {"weight_bits": 4, "activation_bits": 6}}}),
        ("o", {"weight_bits": 2, "activation_bits": 2, "layers": {"fc": {"weight_bits": 4}}}),
        (
            "p",
            {
                "weight_bits": 2,
                "activation_bits": 2,
                "layers": {"fc": {"weight_bits": 4}, "conv": {"activation_bits": 4}},
            },
        ),
    ):
        parts = {"config": (None, json.dumps(config)), "model": (name, onnx_model), "calibration": ("c", images)}
        assert web.post("/jobs", files=parts).status_code == 202
    lines = [line.split(" queued ")[1].strip() for line in reversed(aquant("list").out.splitlines())]
    assert lines == [
        "aquant target 0.5 from W2A2 paper          net.onnx",
        "nearest W4A8 fast (dry run)                m",
        "aquant W2A2 (fc at 4/6) fast               n",
        "aquant W2A2 (fc at 4/2) fast               o",
        "aquant W2A2 (2 layers at other bits) fast  p",
    ]
    shown = aquant("show", aquant("list", "--limit", 1, "--json").document["jobs"][0]["id"]).out
    assert "network     p\n" in shown
    assert "config      aquant W2A2 (2 layers at other bits) fast, seed 0\n" in shown


@in_a_folder
def test_show_is_for_eyes_or_programs(aquant: Aquant, sessions: Sessions, add_job: Callable[[], str]) -> None:
    job_id = add_job()
    fail(sessions, job_id)
    shown = aquant("show", job_id).out
    assert shown.startswith(f"{job_id} failed\n")
    assert "worker_lost: It is gone." in shown
    assert aquant("show", job_id, "--json").document["state"] == "failed"


@in_a_folder
def test_delete_removes_the_job(aquant: Aquant, add_job: Callable[[], str]) -> None:
    job_id = add_job()
    assert aquant("cancel", job_id, "--json").document["state"] == "cancelled"
    assert aquant("delete", job_id, "--json").document == {"deleted": job_id}
    again = aquant("delete", job_id)
    assert (again.code, again.out) == (1, "")
    assert job_id in again.err


@in_a_folder
def test_check_tells_which_part_is_missing(aquant: Aquant, sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = aquant("check")
    assert (idle.code, idle.out.splitlines()[-1]) == (1, "not ready")
    assert "0 alive" in idle.out
    with sessions.begin() as session:
        JobRepository(session).note_worker("w1", "cpu", "2 CPU cores", MINUTE)
    ready = aquant("check")
    assert (ready.code, ready.out.splitlines()[-1]) == (0, "ready")
    assert "w1  alive" in ready.out
    document = aquant("check", "--json").document
    assert document["ready"] is True
    assert document["version"] == document["client_version"]
    assert document["workers"][0]["name"] == "w1"
    monkeypatch.setenv("AQUANT_URL", "http://127.0.0.1:1")
    assert aquant("check").code == 1


@in_a_folder
def test_check_tells_that_the_key_is_refused(
    aquant: Aquant, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's health is told to everybody."""
    with sessions.begin() as session:
        JobRepository(session).note_worker("w1", "cpu", "2 CPU cores", MINUTE)
    unneeded = aquant("check", "--key", "wrong", "--json")
    assert (unneeded.code, unneeded.document["ready"], unneeded.document["refused"]) == (0, True, None)
    with sessions.begin() as session:
        _, good = KeyRepository(session).create("ada's", "ada", "jobs", None)
        _, of_metrics = KeyRepository(session).create("graphs", "ada", "metrics", None)
    for key, code, why in [
        ("", "key_missing", "needs an API key"),
        ("wrong", "key_invalid", "API key"),
        (of_metrics, "key_scope_insufficient", "is for metrics, this call is for jobs"),
    ]:
        monkeypatch.setenv("AQUANT_API_KEY", key)
        told = aquant("check")
        assert (told.code, told.out.splitlines()[-1], told.err) == (1, "not ready", "")
        assert f"\n{'refused':<10} " in told.out
        assert why in told.out
        assert "broker     ok" in told.out
        found = aquant("check", "--json")
        assert (found.code, found.document["ready"], found.document["refused"]["code"]) == (1, False, code)
    accepted = aquant("check", "--key", good)
    assert (accepted.code, accepted.out.splitlines()[-1]) == (0, "ready")
    assert "refused" not in accepted.out


@in_a_folder
def test_check_asks_for_nothing_more_where_a_part_is_away(
    aquant: Aquant, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client would wait for it."""
    monkeypatch.setattr(Client, "list", lambda *_, **__: pytest.fail("it was asked for jobs"))
    Path(urlsplit(settings.artifacts).path).rename(settings.data_dir / "elsewhere")
    found = aquant("check", "--json")
    assert (found.code, found.document["ready"], found.document["refused"]) == (1, False, None)
    assert found.document["checks"]["artifacts"] == "unavailable"


@in_a_folder
def test_progress_is_told_in_a_line(aquant: Aquant, add_job: Callable[[], str], web: httpx.Client) -> None:
    document = web.get(f"/jobs/{add_job()}").json()
    assert describe(JobDocument.model_validate(document)).endswith("queued (no worker is there to take it)")
    progress = {"block": 2, "blocks": 4, "iteration": 50, "iterations": 100, "loss": 0.25, "eta_seconds": 7.4}
    job = JobDocument.model_validate({**document, "state": "running", "stage": "reconstruct", "progress": progress})
    assert describe(job).endswith("running reconstruct block 2 of 4, 50/100 loss 0.25 7 s left")
    assert share_done(job) == 0.375
    assert aquant("list").err == ""


@in_a_folder
def test_a_log_has_a_line_for_each_step_and_each_place_in_the_queue(
    add_job: Callable[[], str], web: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    document = web.get(f"/jobs/{add_job()}").json() | {"workers": 1}
    counting = [{"iteration": iteration, "iterations": 3} for iteration in range(3)]
    with job_display() as display:
        for changes in (
            *({"queue_position": place} for place in (11, 11, 2, 0)),
            {"workers": 0},
            *({"state": "running", "stage": "sensitivity", "progress": progress} for progress in counting),
        ):
            display.show(JobDocument.model_validate(document | changes))
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" ")[2].strip() for line in lines] == [
        "queued (11 ahead)", "queued (2 ahead)", "queued", "queued (no worker is there to take it)",
        "running sensitivity",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("aquant ch", ["check"]),
        ("aquant submit --ta", ["--target"]),
        ("aquant submit --preset s", ["smoke"]),
        ("aquant submit --method qdrop", ["qdrop", "qdrop_refactored"]),
    ],
)
def test_shells_complete(typed: str, offered: list[str]) -> None:
    """What `aquant --install-completion` makes bash ask."""
    program = "import sys; sys.argv = ['aquant']; from service.cli import main; main()"
    asked = {"_AQUANT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, **asked}
    )
    assert done.stdout.split() == offered, done.stderr

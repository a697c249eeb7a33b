"""`aquant up` from a shell: it says where it is, and stops cleanly when told to."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from sqlalchemy.orm import Session

from service.client import Client
from service.jobs.database import open_database
from service.jobs.records import JobRecord
from service.local import local_stack
from service.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("how", "options", "workers"),
    [(signal.SIGINT, [], ["worker"]), (signal.SIGTERM, ["--workers", "2"], ["worker-1", "worker-2"])],
)
def test_up_prints_its_address_and_stops(
    tmp_path: Path, how: signal.Signals, options: list[str], workers: list[str]
) -> None:
    aquant, folder = [sys.executable, "-u", "-m", "service.cli"], ["--data-dir", str(tmp_path)]
    headers = {}
    if options:  # with keys, too
        subprocess.run([*aquant, "migrate", *folder], check=True)
        make = [*aquant, "keys", "create", "a-key", "--owner", "ada", *folder]
        token = subprocess.run(make, capture_output=True, text=True, check=True).stdout.strip()
        headers = {"Authorization": f"Bearer {token}"}
    with subprocess.Popen([*aquant, "up", "--port", "0", *folder, *options], stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        lines = []
        for line in up.stdout:
            lines.append(line)
            if line.startswith("ready"):
                break
        assert [line.split()[0] for line in lines] == ["broker", *workers, "api", "client", "keys", "ready"]
        url = lines[-1].split()[1]
        assert lines[-3].split() == ["client", "export", f"AQUANT_URL={url}"]
        assert lines[-2].split()[1:] == f"aquant keys create NAME --owner OWNER --data-dir {tmp_path}".split()
        assert httpx.get(f"{url}/jobs").status_code == (401 if headers else 200)
        ready = httpx.get(f"{url}/health/ready", headers=headers)
        assert ready.is_success
        found = [(one["device"], one["detail"]) for one in ready.json()["workers"] if one["alive"]]
        assert len(found) == len(workers)
        for name, (device, detail) in zip(workers, sorted(found), strict=True):
            assert device == "gpu" or "CPU cores" in detail
            assert detail in (tmp_path / "logs" / f"{name}.log").read_text()
        family = psutil.Process(up.pid).children(recursive=True)
        assert len(family) >= 3
        up.send_signal(how)
        try:
            rest, _ = up.communicate(timeout=60)
        finally:
            up.kill()  # or a test that failed would wait for it without end
    assert (up.returncode, rest.strip()) == (0, "stopped")
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_job_under_way_waits_for_the_next_up(tmp_path: Path) -> None:
    """Handed on as the worker ends, not found by the next one when its lease has run out."""
    example = Path(__file__).parents[2] / "examples" / "fashion_mnist"
    long = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke", "iterations": 100_000}
    argv = [sys.executable, "-u", "-m", "service.cli", "up", "--port", "0", "--data-dir", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        url = next(line for line in iter(up.stdout.readline, "") if line.startswith("ready")).split()[1]
        with Client(url) as client:
            job = client.submit(example / "residual.onnx", example / "calibration.npz", long)
            while client.get(job.id).state == "queued":
                time.sleep(0.1)
        up.terminate()
        try:
            up.communicate(timeout=60)
        finally:
            up.kill()
    engine = open_database(Settings(data_dir=tmp_path))
    with Session(engine) as session:
        left = session.get_one(JobRecord, job.id)
        assert (left.state, left.attempt, left.handed_on) == ("queued", 1, 1)
    engine.dispose()
    assert "Traceback" not in (tmp_path / "logs" / "worker.log").read_text()


def test_a_killed_worker_is_started_again_and_its_job_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUANT_LEASE_SECONDS", "3")
    example = Path(__file__).parents[2] / "examples" / "fashion_mnist"
    config = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke", "sensitivity": False}
    argv = [sys.executable, "-u", "-m", "service.cli", "up", "--port", "0", "--data-dir", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        try:
            url = next(line for line in iter(up.stdout.readline, "") if line.startswith("ready")).split()[1]
            with Client(url) as client:
                job = client.submit(example / "residual.onnx", example / "calibration.npz", config)
                while client.get(job.id).state == "queued":
                    time.sleep(0.1)
                family = psutil.Process(up.pid).children()
                next(process for process in family if "celery" in process.cmdline()).kill()
                said = [up.stdout.readline().split("  (log")[0].strip() for _ in range(2)]
                ended = client.wait(job.id, 90)
        finally:
            up.terminate()
            rest, _ = up.communicate(timeout=60)
    assert said == ["worker    ended by itself (status -9); it is started again in 1 s", "worker    started again"]
    assert (ended.state, ended.attempt) == ("succeeded", 2)
    assert (up.returncode, rest.strip()) == (0, "stopped")


def test_killed_up_takes_its_parts_along(tmp_path: Path) -> None:
    argv = [sys.executable, "-u", "-m", "service.cli", "up", "--port", "0", "--data-dir", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        assert any(line.startswith("ready") for line in iter(up.stdout.readline, ""))
        family = psutil.Process(up.pid).children(recursive=True)
        up.kill()
    assert psutil.wait_procs(family, timeout=30)[1] == []


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        argv = [sys.executable, "-m", "service.cli", "up", "--port", port, "--data-dir", str(tmp_path)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"port {port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_data_folder_has_one_stack(tmp_path: Path) -> None:
    argv = [sys.executable, "-u", "-m", "service.cli", "up", "--port", "0", "--data-dir", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as up:
        assert up.stdout is not None
        try:
            url = next(line for line in iter(up.stdout.readline, "") if line.startswith("ready")).split()[1]
            second = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
            assert httpx.get(f"{url}/health/ready").is_success
        finally:
            up.kill()
    assert (second.returncode, second.stdout) == (1, "")
    assert f"The data folder {tmp_path} has its `aquant up` already (process {up.pid}, at {url})" in second.stderr
    assert "--data-dir" in second.stderr
    settings = Settings(data_dir=tmp_path, broker_url=None, port=0)
    with local_stack(settings) as stack:  # what was killed holds nothing
        assert httpx.get(f"{stack.url}/health/ready").is_success

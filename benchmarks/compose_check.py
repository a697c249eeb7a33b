"""Does docker-compose.yml hold what it says? Builds the images, runs the profile `cpu`, and asks the containers.

    python benchmarks/compose_check.py                          the compose file's own images
    python benchmarks/compose_check.py --debian debian:13-slim  its servers from Debian's packages instead

Needs a container engine with Compose: Docker's where its daemon answers, else Podman's. The project is named
``aquant-check``; its containers and volumes are gone afterwards, all but the unnamed ones of workers that ``down``
leaves. What docker-compose.yml lets be set (BASE_IMAGE, PIP_INDEX_URL, REDIS_IMAGE, ...) is taken from the
environment. A job is run undisturbed, then one for every container that is restarted under it; containers are asked
for their rights, their mounts and their routes; the workers are multiplied; everything is taken down and brought up
again, also from a backup. Result: ``results/compose_check.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from record import RESULTS, command, commit, write

from service.client import Client, ServiceProblemError, ServiceUnreachableError
from service.jobs.schemas import JobDocument
from service.jobs.states import JobState
from service.local import free_port

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "digits"
CONFIG = {"weight_bits": 2, "activation_bits": 2, "preset": "fast", "iterations": 60}
PROJECT = "aquant-check"
SERVERS = ("redis", "postgres", "s3")
SERVICES = ("api", "worker", *SERVERS)
ONCE = ("secrets", "migrate")
START_SECONDS, JOB_SECONDS = 240.0, 900.0
WORKERS = 2
"""As many are there, once the one that all else is tried on is multiplied."""
NETWORK_UNREACHABLE = "Network is unreachable"

# What is asked inside a worker, by Python: can the address be reached?
CONNECT = """
import socket, sys, time
started = time.monotonic()
try:
    socket.create_connection((sys.argv[1], 8000), 10).close()
    print("reached")
except OSError as error:
    print(error.strerror or error, "after %.1f s" % (time.monotonic() - started))
"""


class CheckFailedError(Exception):
    """Something is not as the compose file says; the message says what."""


class Deployment:
    """The compose project, seen through the engine's command line."""

    def __init__(self, engine: str, compose: list[str], environment: dict[str, str]) -> None:
        self._engine, self._environment = [engine], environment
        self._compose = [*compose, "-p", PROJECT, "--profile", "cpu"]

    def compose(self, *arguments: str, content: bytes | None = None) -> bytes:
        return self._run([*self._compose, *arguments], content)

    def engine(self, *arguments: str) -> str:
        return self._run([*self._engine, *arguments]).decode()

    def containers(self, service: str) -> list[str]:
        """Ids, of stopped ones too."""
        return self.compose("ps", "--all", "--quiet", service).decode().split()

    def state(self, container: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.engine("inspect", container))[0]["State"]
        return found

    def ask(self, service: str, *argv: str) -> str:
        """What a program says inside the service's first container."""
        return self.engine("exec", self.containers(service)[0], *argv).strip()

    def wait_until_healthy(self, services: tuple[str, ...], count: int = 1) -> None:
        deadline = time.monotonic() + START_SECONDS
        for service in services:
            while True:
                states = [self.state(name) for name in self.containers(service)]
                health = [(state.get("Health") or state.get("Healthcheck") or {}).get("Status") for state in states]
                if health == ["healthy"] * count:
                    break
                if time.monotonic() > deadline:
                    logs = self.compose("logs", "--tail", "20", service).decode(errors="replace")
                    raise CheckFailedError(f"{service} is {health} after {START_SECONDS:.0f} s:\n{logs}")
                time.sleep(0.5)

    def _run(self, argv: list[str], content: bytes | None = None) -> bytes:
        environment = os.environ | self._environment
        done = subprocess.run(argv, cwd=ROOT, env=environment, input=content, capture_output=True, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).decode(errors="replace").strip()
            raise CheckFailedError(f"{shlex.join(argv)} ended with {done.returncode}: {said[-2000:]}")
        return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--debian", metavar="IMAGE", help="build the servers upon this Debian, instead of pulling them")
    parser.add_argument("--out", type=Path, default=RESULTS / "compose_check.json")
    options = parser.parse_args()
    port = free_port("127.0.0.1")
    environment = {"API_PORT": str(port)} | {f"{name.upper()}_IMAGE": own(name) for name in SERVERS if options.debian}
    deployment = Deployment(*find_engine(), environment)
    steps: dict[str, Any] = {}
    wrong: list[str] = []
    url = f"http://127.0.0.1:{port}"
    with Client(url) as client, volumes(deployment):
        try:
            for name, step in plan(deployment, client, url, options.debian):
                print(f"{name} ...", flush=True)
                started = time.monotonic()
                found = step()
                steps[name] = {"seconds": round(time.monotonic() - started, 1), **found}
                print(json.dumps(steps[name]), flush=True)
        except (CheckFailedError, ServiceProblemError, ServiceUnreachableError, TimeoutError) as error:
            wrong.append(f"{name}: {error}")
        about = versions(deployment) if not wrong else {}
    write(options.out, {"about": {"command": command(), "commit": commit(), **about}, "steps": steps, "wrong": wrong})
    if wrong:
        raise SystemExit(wrong[0])


def plan(
    deployment: Deployment, client: Client, url: str, debian: str | None
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The steps by name; later ones know the checkpoint of the undisturbed job."""
    yield "images are built", partial(build, deployment, debian)
    yield "everything comes up from nothing", partial(start, deployment)
    for service in SERVICES:
        yield f"{service} has no more rights than it needs", partial(rights, deployment, service)
    for service in SERVICES:
        yield f"{service} sees its own secrets alone", partial(secrets, deployment, service)
    for service in ("worker", *SERVERS):
        yield f"{service} has no route out", partial(routes, deployment, service)
    yield "a worker reaches the API inside, and not outside", partial(walls, deployment)
    sound: dict[str, Any] = {}
    yield "a job runs", lambda: sound.setdefault("job", run_job(client))
    digest = sound["job"]["checkpoint_sha256"]
    yield f"{WORKERS} workers share {WORKERS} jobs", partial(scale, deployment, client, digest)
    yield "all is there after down and up", partial(down_and_up, deployment, client, digest)
    yield (
        "all is there after a backup is read into empty volumes",
        partial(back_up_and_restore, deployment, client, digest),
    )
    for service in SERVICES:
        yield f"{service} is restarted under a job", partial(restart, deployment, client, service, digest, [])
    at_once = ["-t", "0"]
    yield "a worker is killed under a job", partial(restart, deployment, client, "worker", digest, at_once)
    yield "with a key nobody does without", partial(ask_for_keys, deployment, client, url)


def build(deployment: Deployment, debian: str | None) -> dict[str, Any]:
    if debian:
        file = ("--file", str(ROOT / "tests/deploy/servers.Dockerfile"), "--build-arg", f"BASE_IMAGE={debian}")
        pip = [f"{name}={os.environ[name]}" for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL") if name in os.environ]
        for name in SERVERS:
            arguments = [part for argument in pip for part in ("--build-arg", argument)]
            deployment.engine("build", *file, *arguments, "--target", name, "--tag", own(name), str(ROOT))
    deployment.compose("build")
    return {}


def start(deployment: Deployment) -> dict[str, Any]:
    deployment.compose("up", "--detach", "--no-build")
    deployment.wait_until_healthy(SERVICES)
    exits = {name: deployment.state(deployment.containers(name)[0])["ExitCode"] for name in ONCE}
    expect(exits == dict.fromkeys(ONCE, 0), f"the one-shots ended with {exits}")
    return {"healthy": list(SERVICES), "ended_with_0": list(ONCE)}


def rights(deployment: Deployment, service: str) -> dict[str, Any]:
    """Of the service's first process, as the kernel tells them."""
    lines = deployment.ask(service, "cat", "/proc/1/status").splitlines()
    status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
    mounts = [line.split() for line in deployment.ask(service, "cat", "/proc/1/mounts").splitlines()]
    root = next(options.split(",")[0] for _, place, _, options, *_ in mounts if place == "/")
    found = {
        "user": int(status["Uid"][1]),
        "capabilities": [int(status[kind][0], 16) for kind in ("CapEff", "CapPrm", "CapBnd")],
        "no_new_privileges": status["NoNewPrivs"] == ["1"],
        "root": root,
    }
    expect(found["user"] != 0, f"{service} runs as root")
    expect(found["capabilities"] == [0, 0, 0], f"{service} has capabilities: {found}")
    expect(found["no_new_privileges"], f"{service} may gain privileges")
    expect(root == "ro", f"{service} may write to its root: {root}")
    return found


def secrets(deployment: Deployment, service: str) -> dict[str, Any]:
    own_files = {
        "redis": ["password", "redis.conf"],
        "postgres": ["password"],
        "s3": ["s3.json"],
    }.get(service, ["aquant_broker_url", "aquant_database_url", "credentials"])
    files = sorted(deployment.ask(service, "ls", "/secrets").split())
    expect(files == own_files, f"{service} sees {files}")
    others = deployment.ask(service, "sh", "-c", "touch /secrets/other 2>/dev/null && echo written || echo refused")
    expect(others == "refused", f"{service} may write to its secrets")
    inside = json.loads(deployment.engine("inspect", deployment.containers(service)[0]))[0]["Config"]["Env"]
    password = deployment.ask("postgres", "cat", "/secrets/password")
    expect(not any(password in variable for variable in inside), f"{service} has the password in its environment")
    return {"files": files}


def routes(deployment: Deployment, service: str) -> dict[str, Any]:
    """The kernel's tables for IPv4 and IPv6 have no default route; what is there leads to the network `inside`."""
    table = [line.split() for line in deployment.ask(service, "cat", "/proc/net/route").splitlines()[1:]]
    default = [line for line in table if int(line[1], 16) == 0 and int(line[7], 16) == 0]
    lines = deployment.ask(service, "sh", "-c", "cat /proc/net/ipv6_route 2>/dev/null || true").splitlines()
    beyond = [line for line in map(str.split, lines) if int(line[1], 16) == 0 and line[9] != "lo"]
    expect(not default, f"{service} has a default route: {default}")
    expect(not beyond, f"{service} has a default route for IPv6: {beyond}")
    return {"routes": len(table), "default_routes": 0}


def walls(deployment: Deployment) -> dict[str, Any]:
    """The API has an address on either network; it is the only thing outside that is this check's own to ask for."""
    inspected = json.loads(deployment.engine("inspect", deployment.containers("api")[0]))[0]
    addresses = {
        name.removeprefix(f"{PROJECT}_"): network["IPAddress"]
        for name, network in inspected["NetworkSettings"]["Networks"].items()
    }
    answers = {
        name: deployment.ask("worker", "python", "-c", CONNECT, addresses[name]) for name in ("inside", "outside")
    }
    expect(answers["inside"] == "reached", f"a worker does not reach the API: {answers}")
    expect(answers["outside"].startswith(NETWORK_UNREACHABLE), f"a worker sees the outside: {answers}")
    return answers


def run_job(client: Client) -> dict[str, Any]:
    job = submit(client)
    job = client.wait(job.id, JOB_SECONDS)
    return finished(client, job)


def restart(deployment: Deployment, client: Client, service: str, digest: str, how: list[str]) -> dict[str, Any]:
    job = submit(client)
    reached = until_blocks(client, job.id)
    deployment.engine("restart", *how, deployment.containers(service)[0])
    deployment.wait_until_healthy(SERVICES)
    found = finished(client, client.wait(job.id, JOB_SECONDS))
    expect(found["checkpoint_sha256"] == digest, f"the checkpoint is another: {found}")
    expect(found["attempts"] <= 2, f"one restart cost more than one attempt: {found}")
    return {"restarted_at": reached, **found}


def scale(deployment: Deployment, client: Client, digest: str) -> dict[str, Any]:
    deployment.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", f"worker={WORKERS}")
    deployment.wait_until_healthy(("worker",), count=WORKERS)
    jobs = [submit(client) for _ in range(WORKERS)]
    found = [finished(client, client.wait(job.id, JOB_SECONDS)) for job in jobs]
    expect(all(job["checkpoint_sha256"] == digest for job in found), f"a checkpoint is another: {found}")
    logs = deployment.compose("--ansi", "never", "logs", "worker").decode(errors="replace")
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", logs).splitlines()  # Compose moves the cursor all the same
    takers = {  # each line begins with its container
        job.id: {line.split()[0] for line in lines if f"job {job.id}: attempt 1 begins" in line} for job in jobs
    }
    expect(len(set.union(*takers.values())) == WORKERS, f"the workers did not share the jobs: {takers}")
    deployment.compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "worker=1")
    return {"takers": [*map(sorted, takers.values())]}


def down_and_up(deployment: Deployment, client: Client, digest: str) -> dict[str, Any]:
    before = client.list(limit=100).jobs
    deployment.compose("down")
    start(deployment)
    return the_same(client, before, digest)


def back_up_and_restore(deployment: Deployment, client: Client, digest: str) -> dict[str, Any]:
    """By the commands of docs/operations.md."""
    before = client.list(limit=100).jobs
    database = ("exec", "-T", "postgres", "sh", "-ec")
    connect = "export PGPASSWORD=$(cat /secrets/password) PGHOST=127.0.0.1 PGUSER=aquant;"
    files = ("run", "--rm", "--no-deps", "-T", "--entrypoint", "tar", "secrets", "-C", "/volumes")
    rows = deployment.compose(*database, f"{connect} pg_dump --format=custom aquant")
    deployment.compose("stop", "s3")
    archive = deployment.compose(*files, "-cf", "-", "seed", "store")
    deployment.compose("down", "--volumes")
    deployment.compose(*files, "-xf", "-", content=archive)
    deployment.compose("up", "--detach", "--no-build", "postgres")
    deployment.wait_until_healthy(("postgres",))
    deployment.compose(*database, f"{connect} pg_restore --exit-on-error --dbname=aquant", content=rows)
    start(deployment)
    return {"bytes": {"rows": len(rows), "files": len(archive)}, **the_same(client, before, digest)}


def ask_for_keys(deployment: Deployment, client: Client, url: str) -> dict[str, Any]:
    """Once there is a key, by the command of docs/operations.md, nobody does without; its owner has the jobs."""
    jobs = len(client.list(limit=100).jobs)
    create = ("aquant", "keys", "create", "check", "--owner", "check", "--adopt")
    secret = deployment.compose("exec", "-T", "api", *create).decode().strip()
    try:
        client.list()
    except ServiceProblemError as error:
        refusal = error.problem.code
    else:
        raise CheckFailedError("the API answers without a key")
    with Client(url, key=secret) as owner:
        adopted = len(owner.list(limit=100).jobs)
    expect(adopted == jobs, f"the owner has {adopted} of {jobs} jobs")
    deployment.wait_until_healthy(SERVICES)
    return {"without_a_key": refusal, "jobs_with_it": adopted}


def the_same(client: Client, before: list[JobDocument], digest: str) -> dict[str, Any]:
    """The same jobs with the same checkpoints, and a new one runs."""
    after = client.list(limit=100).jobs
    expect([job.id for job in after] == [job.id for job in before], f"{len(after)} of {len(before)} jobs are there")
    for job in after:
        expect(finished(client, job)["checkpoint_sha256"] == digest, f"the checkpoint of {job.id} is another")
    new = run_job(client)
    expect(new["checkpoint_sha256"] == digest, f"the checkpoint is another: {new}")
    return {"jobs": len(after), "checkpoints_the_same": True, "new_job": new}


def submit(client: Client) -> JobDocument:
    return client.submit(EXAMPLE / "plain.onnx", EXAMPLE / "calibration.npz", CONFIG, EXAMPLE / "evaluation.npz")


def until_blocks(client: Client, job_id: str) -> str:
    """Wait until the job is among its blocks."""
    for job in client.watch(job_id):
        if job.stage == "reconstruct" and job.progress.block > 1:
            return f"block {job.progress.block} of {job.progress.blocks}"
    raise CheckFailedError(f"job {job_id} is {job.state} before it was seen at its second block")


def finished(client: Client, job: JobDocument) -> dict[str, Any]:
    """What a client gets of a job that is over: report, and checkpoint as its digest."""
    expect(job.state == JobState.SUCCEEDED, f"job {job.id} is {job.state}: {job.error}")
    report = client.report(job.id)
    with tempfile.TemporaryDirectory() as folder:
        digest = client.download(job.id, Path(folder) / "checkpoint.safetensors")
    return {"attempts": job.attempt, "accuracy": report["accuracy"], "checkpoint_sha256": digest}


def versions(deployment: Deployment) -> dict[str, Any]:
    programs = {
        "redis": ("redis", "redis-server", "--version"),
        "postgres": ("postgres", "postgres", "--version"),
        "s3": ("s3", "weed", "version"),
        "python": ("worker", "python", "--version"),
    }
    said = {name: deployment.ask(*argv).splitlines()[0] for name, argv in programs.items()}
    engine = deployment.engine("version", "--format", "{{.Server.Version}}").strip()
    return {"engine": engine, "compose": deployment.compose("version").decode().strip(), **said}


@contextmanager
def volumes(deployment: Deployment) -> Iterator[None]:
    """Nothing is left of a run before, nor of this one."""
    deployment.compose("down", "--volumes")
    try:
        yield
    finally:
        with suppress(CheckFailedError):
            deployment.compose("down", "--volumes")


def own(name: str) -> str:
    """Image of a server upon Debian."""
    return f"aquant-check-{name}"


def find_engine() -> tuple[str, list[str]]:
    """The commands of an engine that answers, and of its Compose."""
    for engine, compose in (("docker", ["docker", "compose"]), ("podman", ["podman-compose"])):
        probes = [[engine, "info"], [*compose, "version"]]
        if all(shutil.which(probe[0]) and not run_quietly(probe) for probe in probes):
            return engine, compose
    raise SystemExit("No container engine answers: start Docker with its Compose plugin, or install podman-compose.")


def run_quietly(argv: list[str]) -> int:
    return subprocess.run(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode


def expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise CheckFailedError(otherwise)


if __name__ == "__main__":
    main()

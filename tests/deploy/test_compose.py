"""docker-compose.yml against the settings, the Dockerfile and the rules of a hardened deployment."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import AliasChoices
from sqlalchemy import update
from sqlalchemy.orm import Session

from service.jobs.database import migrate, open_database
from service.jobs.queue import make_celery
from service.jobs.records import WorkerRecord
from service.jobs.repository import JobRepository, now
from service.settings import Settings

ROOT = Path(__file__).parents[2]
DCLINT = "dclint@3"
WORKERS = ["worker", "worker-gpu"]
OWN = ["api", *WORKERS]
ALL = [*OWN, "redis"]


def known_settings() -> set[str]:
    """Names of the environment variables that Settings reads."""
    names: set[str] = set()
    for field, info in Settings.model_fields.items():
        alias = info.validation_alias
        names |= set(map(str, alias.choices)) if isinstance(alias, AliasChoices) else {f"AQUANT_{field.upper()}"}
    return names


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)s", duration)
    assert match, f"{duration} is not in seconds"
    return float(match[1])


def health_check(service: dict[str, Any]) -> list[str]:
    """What a service's health check gives to Python."""
    start, python, *arguments = service["healthcheck"]["test"]
    assert (start, python) == ("CMD", "python")
    return arguments


def exit_status(arguments: list[str], **environment: str) -> int:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    ).returncode


def test_these_are_the_services(services: dict[str, Any]) -> None:
    assert sorted(services) == sorted(ALL)


@pytest.mark.parametrize("name", OWN)
def test_every_setting_is_one_that_is_read_and_valid(
    name: str, services: dict[str, Any], dockerfile: Any, bare_environment: pytest.MonkeyPatch
) -> None:
    image = dockerfile.environment(services[name]["build"]["target"])
    environment = image | services[name]["environment"]
    ours = {variable: value for variable, value in environment.items() if variable.startswith("AQUANT_")}
    assert ours
    assert sorted(ours.keys() - known_settings()) == []
    for variable, value in ours.items():
        bare_environment.setenv(variable, value)
    settings = Settings()
    assert settings.broker_url == "redis://redis:6379/0"
    expected = Settings(data_dir=Path("/data"), broker_url=settings.broker_url, log_format="json")
    assert settings == expected  # what is left empty is the default


def test_api_and_workers_have_the_same_settings(services: dict[str, Any]) -> None:
    assert all(services[name]["environment"] == services["api"]["environment"] for name in WORKERS)


@pytest.mark.parametrize("name", ALL)
def test_a_service_has_no_more_rights_than_it_needs(name: str, services: dict[str, Any]) -> None:
    service = services[name]
    user, group = service["user"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    assert service["cap_drop"] == ["ALL"]
    assert "cap_add" not in service
    assert "privileged" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp"]


@pytest.mark.parametrize("name", ALL)
def test_a_service_comes_back_and_is_watched(name: str, services: dict[str, Any]) -> None:
    assert services[name]["restart"] == "unless-stopped"
    check = services[name]["healthcheck"]
    assert seconds(check["timeout"]) <= seconds(check["interval"])
    assert check["test"]
    for needed, how in services[name].get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert "profiles" not in services[needed]  # it is there whatever profile is chosen


def test_one_profile_is_all_there_is_to_choose(services: dict[str, Any]) -> None:
    profiles = {name: service.get("profiles", []) for name, service in services.items()}
    assert profiles == {"api": [], "redis": [], "worker": ["cpu"], "worker-gpu": ["gpu"]}


@pytest.mark.parametrize("name", OWN)
def test_what_is_built_is_in_the_dockerfile(name: str, services: dict[str, Any], dockerfile: Any) -> None:
    build = services[name]["build"]
    assert build["target"] == ("api" if name == "api" else "worker")
    assert set(build["args"]) <= dockerfile.declared(build["target"])
    assert dockerfile.stages[build["target"]].all("USER") == [services[name]["user"]]
    assert "command" not in services[name]  # the image's own


def test_the_workers_differ_in_their_extras_and_the_gpu(services: dict[str, Any]) -> None:
    extras = {name: set(services[name]["build"]["args"]["EXTRAS"].split(",")) for name in WORKERS}
    assert extras == {"worker": {"worker"}, "worker-gpu": {"worker", "gpu"}}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["worker-gpu"] <= project["optional-dependencies"].keys()
    assert "deploy" not in services["worker"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    # One process per GPU: a container with more would leave the rest idle.
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_data_is_shared_and_working_files_are_not(
    services: dict[str, Any], compose: dict[str, Any], bare_environment: pytest.MonkeyPatch
) -> None:
    bare_environment.setenv("AQUANT_DATA_DIR", services["api"]["environment"]["AQUANT_DATA_DIR"])
    settings = Settings()
    assert services["api"]["volumes"] == [f"data:{settings.data_dir}"]
    for name in WORKERS:
        assert services[name]["volumes"] == [f"data:{settings.data_dir}", f"{settings.work_dir}"]
    assert set(compose["volumes"]) == {"data", "broker"}


def test_only_the_api_is_published_and_only_here(services: dict[str, Any], compose: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    assert services["api"]["ports"] == [{"host_ip": "127.0.0.1", "published": "8000", "target": 8000}]
    assert services["api"]["environment"]["AQUANT_PUBLISHED_ON"] == "127.0.0.1"
    api = compose["services"]["api"]
    assert api["environment"]["AQUANT_PUBLISHED_ON"] == api["ports"][0]["host_ip"]  # whatever it is set to
    assert compose["networks"]["inside"] == {"internal": True}
    assert all(services[name]["networks"] == ["inside"] for name in [*WORKERS, "redis"])


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_given_the_time_it_takes_to_stop(name: str, services: dict[str, Any], dockerfile: Any) -> None:
    app = make_celery(Settings(broker_url="redis://nowhere:1/0"))
    soft = app.conf.worker_soft_shutdown_timeout
    assert seconds(services[name]["stop_grace_period"]) >= 3 * soft
    assert dockerfile.environment("worker")["REMAP_SIGTERM"] == "SIGQUIT"
    assert dockerfile.environment("worker")["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_api_is_given_the_time_it_takes_to_stop(services: dict[str, Any], dockerfile: Any) -> None:
    command = json.loads(dockerfile.stages["api"].all("CMD")[0])
    graceful = float(command[command.index("--timeout-graceful-shutdown") + 1])
    assert seconds(services["api"]["stop_grace_period"]) >= 3 * graceful
    assert command[command.index("--port") + 1] == str(services["api"]["ports"][0]["target"])


def test_the_broker_keeps_every_message(services: dict[str, Any]) -> None:
    command = services["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert services["redis"]["volumes"] == ["broker:/data"]


@pytest.mark.parametrize("name", OWN)
def test_the_images_own_health_check_is_the_same(name: str, services: dict[str, Any], dockerfile: Any) -> None:
    check = services[name]["healthcheck"]
    options, _, command = dockerfile.stages[services[name]["build"]["target"]].all("HEALTHCHECK")[0].partition(" CMD ")
    python, *arguments = shlex.split(command)
    assert python == "python"
    assert [re.sub(r";\s+", "\n", part) for part in arguments] == [
        part.rstrip("\n") for part in health_check(services[name])
    ]
    assert dict(re.findall(r"--([\w-]+)=(\w+)", options)) == {
        key.replace("_", "-"): str(value) for key, value in check.items() if key != "test"
    }


@pytest.mark.parametrize(("status", "expected"), [(200, 0), (503, 1)])
def test_the_api_is_healthy_when_it_is_ready(status: int, expected: int, services: dict[str, Any]) -> None:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    option, script = health_check(services["api"])
    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            found = exit_status([option, script.replace("8000", str(server.server_port))])
        finally:
            server.shutdown()
            thread.join()
    assert found == expected


def test_a_worker_is_healthy_while_it_signs_in(services: dict[str, Any], tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    migrate(settings)
    engine = open_database(settings)

    def status() -> int:
        return exit_status(health_check(services["worker"]), AQUANT_DATA_DIR=str(tmp_path), AQUANT_DATABASE_URL="")

    def sign_in(host: str) -> None:
        with Session(engine) as session, session.begin():
            JobRepository(session).note_worker(f"{host}:1", "cpu", "2 CPU cores", timedelta(hours=1))

    try:
        sign_in("another-host")
        assert status() == 1
        sign_in(socket.gethostname())
        assert status() == 0
        with Session(engine) as session, session.begin():
            session.execute(update(WorkerRecord).values(seen_at=now() - timedelta(seconds=60)))
        assert status() == 1
    finally:
        engine.dispose()


def test_the_compose_file_passes_its_linter() -> None:
    """The schema and the good habits that dclint knows; it comes from the network, so this may be skipped."""
    if shutil.which("npx") is None:
        pytest.skip("npx is not installed")
    environment = {**os.environ, "npm_config_fetch_retries": "0", "npm_config_fetch_timeout": "30000"}

    def dclint(argument: str) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                ["npx", "--yes", DCLINT, argument],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=90,
                check=False,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"npx {DCLINT} did not answer within 90 seconds")

    if (fetched := dclint("--version")).returncode != 0:
        pytest.skip(f"npx could not fetch {DCLINT}: {fetched.stderr.strip()[-200:]}")
    found = dclint("docker-compose.yml")
    assert found.returncode == 0, found.stdout

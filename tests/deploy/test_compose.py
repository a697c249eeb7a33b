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
from typing import Any, Literal

import pytest
import yaml
from pydantic import AliasChoices
from sqlalchemy import make_url, update
from sqlalchemy.orm import Session

from service.cli import app
from service.jobs.database import migrate, open_database
from service.jobs.queue import make_celery
from service.jobs.records import WorkerRecord
from service.jobs.repository import JobRepository, now
from service.passwords import BUCKET, make_passwords
from service.settings import Settings
from worker.lease import HAND_ON_SECONDS, LOOK_SECONDS

ROOT = Path(__file__).parents[2]
DCLINT = "dclint@3"
WORKERS = ["worker", "worker-gpu"]
ONCE = ["secrets", "migrate"]
SERVERS = ["redis", "postgres", "s3"]
CONFIGURED = ["migrate", "api", *WORKERS]
OWN = ["secrets", *CONFIGURED]
STAYING = ["api", *WORKERS, *SERVERS]
ALL = [*ONCE, *STAYING]
DEVICES: dict[str, Literal["cpu", "cuda"]] = {"worker": "cpu", "worker-gpu": "cuda"}
READERS = {"postgres": "postgres", "redis": "redis", "s3": "s3"} | dict.fromkeys(CONFIGURED, "aquant")
"""Whose secrets each service has."""
AWS = {"AWS_ENDPOINT_URL", "AWS_SHARED_CREDENTIALS_FILE"}
"""What is read beside the settings."""


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


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """Target of each mount, with the name of its volume (none for an anonymous one)."""
    found = {}
    for mount in service.get("volumes", []):
        if isinstance(mount, str):
            source, _, target = mount.rpartition(":")
            found[target] = source
        else:
            assert mount["type"] == "volume"
            found[mount["target"]] = mount["source"]
    return found


@pytest.mark.parametrize("name", CONFIGURED)
def test_every_setting_is_one_that_is_read_and_valid(
    name: str, services: dict[str, Any], dockerfile: Any, bare_environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = dockerfile.environment("api" if name == "migrate" else services[name]["build"]["target"])
    given = services[name]["environment"]
    assert sorted(given.keys() - known_settings() - AWS) == []
    ours = {variable: value for variable, value in (image | given).items() if variable in known_settings()}
    assert ours.pop("AQUANT_SECRETS_DIR") == "/secrets"
    for variable, value in ours.items():
        bare_environment.setenv(variable, value)
    expected = Settings(
        data_dir=Path("/data"),
        artifacts_url="s3://aquant/artifacts",
        log_format="json",
        device=DEVICES.get(name, "auto"),
    )
    assert Settings() == expected  # what is left empty is the default
    # The two addresses with a password are in files.
    make_passwords(folders(tmp_path))
    settings = Settings(secrets_dir=tmp_path / "aquant")
    assert make_url(settings.database).render_as_string() == "postgresql://aquant:***@postgres/aquant"
    assert re.fullmatch(r"redis://:[0-9a-f]{64}@redis:6379/0", str(settings.broker_url))


def test_api_migration_and_workers_have_the_same_settings(services: dict[str, Any]) -> None:
    shared = services["api"]["environment"]
    assert services["migrate"]["environment"] == shared
    for name in WORKERS:
        own = {"AQUANT_DEVICE", "AQUANT_MEMORY_BYTES", "AQUANT_DEVICE_MEMORY_BYTES"}
        assert {key: value for key, value in services[name]["environment"].items() if key not in own} == shared


def folders(root: Path) -> Path:
    """As the volumes of the service `secrets`."""
    for name in ("seed", "aquant", "postgres", "redis", "s3"):
        (root / name).mkdir()
    return root


def test_no_secret_is_in_the_file(services: dict[str, Any]) -> None:
    for name, service in services.items():
        for variable, value in service.get("environment", {}).items():
            assert "@" not in value, f"{name}: {variable} has a user in it"
            if re.search("PASSWORD|SECRET|KEY|CREDENTIALS", variable):
                assert value.startswith("/secrets"), f"{name}: {variable} is no file"


def test_a_service_has_its_own_secrets_and_no_others(services: dict[str, Any], dockerfile: Any) -> None:
    made = services["secrets"]["volumes"]
    (creation,) = (run for run in dockerfile.stages["api"].all("RUN") if "/volumes" in run)
    assert sorted(made) == sorted(
        [
            *(f"secrets-{reader}:/volumes/{reader}" for reader in ("seed", "aquant", "postgres", "redis", "s3")),
            "store:/volumes/store",
        ]
    )
    # An empty volume takes owner and mode from the image's folder at the place it is mounted to.
    assert creation.split()[:7] == ["install", "-d", "-o", "aquant", "-g", "aquant", "-m"]
    assert sorted(creation.split()[8:]) == sorted(mount.partition(":")[2] for mount in made)
    assert creation.split()[7] == "0750"
    assert services["secrets"]["command"] == ["python", "-m", "service.passwords", "/volumes"]
    for name, reader in READERS.items():
        (mount,) = (mount for mount in services[name]["volumes"] if "secrets" in str(mount))
        assert mount == {
            "type": "volume",
            "source": f"secrets-{reader}",
            "target": "/secrets",
            "read_only": True,
            "volume": {"nocopy": True},
        }
        # The files are for their group to read.
        groups = [services[name]["user"].partition(":")[2], *services[name].get("group_add", [])]
        assert "10001" in groups


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
    sockets = ["/var/run/postgresql"] if name == "postgres" else []
    assert [mount.partition(":")[0] for mount in service["tmpfs"]] == ["/tmp", *sockets]
    assert all("size=" in mount for mount in service["tmpfs"])
    assert {"max-size", "max-file"} <= service["logging"]["options"].keys()  # logs do not fill the disk


@pytest.mark.parametrize("name", STAYING)
def test_a_service_comes_back_and_is_watched(name: str, services: dict[str, Any]) -> None:
    assert services[name]["restart"] == "unless-stopped"
    check = services[name]["healthcheck"]
    assert seconds(check["timeout"]) <= seconds(check["interval"])
    assert check["test"]


@pytest.mark.parametrize("name", ONCE)
def test_a_one_shot_ends(name: str, services: dict[str, Any]) -> None:
    assert services[name]["restart"] == "no"
    assert "healthcheck" not in services[name]


def test_everything_begins_after_what_it_needs(services: dict[str, Any]) -> None:
    needs = {name: set(service.get("depends_on", {})) for name, service in services.items()}
    runtime = {"migrate", "redis"}
    assert needs == {
        "secrets": set(),
        "migrate": {"postgres", "s3"},
        **{name: {"secrets"} for name in SERVERS},
        **dict.fromkeys(("api", *WORKERS), runtime),
    }
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            condition = "service_completed_successfully" if needed in ONCE else "service_healthy"
            assert how == {"condition": condition}
            assert "profiles" not in services[needed]  # it is there whatever profile is chosen


def test_one_profile_is_all_there_is_to_choose(services: dict[str, Any]) -> None:
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    assert profiles == {"worker": ["cpu"], "worker-gpu": ["gpu"]}


def test_the_migration_is_a_command_of_the_project(services: dict[str, Any]) -> None:
    python, option, module, command = services["migrate"]["command"]
    assert (python, option, module) == ("python", "-m", "service.cli")
    assert command in {found.name or found.callback.__name__ for found in app.registered_commands if found.callback}


@pytest.mark.parametrize("name", OWN)
def test_what_is_built_is_in_the_dockerfile(name: str, services: dict[str, Any], dockerfile: Any) -> None:
    build = services[name]["build"]
    assert build["target"] == ("worker" if name in WORKERS else "api")
    assert set(build["args"]) <= dockerfile.declared(build["target"])
    assert dockerfile.stages[build["target"]].all("USER") == [services[name]["user"]]
    assert ("command" in services[name]) == (name in ONCE)  # else the image's own


@pytest.mark.parametrize("name", SERVERS)
def test_the_image_of_a_server_can_be_chosen(name: str) -> None:
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][name]
    assert re.fullmatch(rf"\$\{{{name.upper()}_IMAGE:-[^:]+:[0-9][^}}]*\}}", written["image"])


def test_the_workers_differ_in_their_extras_and_the_gpu(services: dict[str, Any]) -> None:
    extras = {name: set(services[name]["build"]["args"]["EXTRAS"].split(",")) for name in WORKERS}
    assert extras == {"worker": {"worker"}, "worker-gpu": {"worker", "gpu"}}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras["worker-gpu"] <= project["optional-dependencies"].keys()
    assert "deploy" not in services["worker"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}


def test_what_is_kept_is_in_volumes_of_its_own(
    services: dict[str, Any], compose: dict[str, Any], bare_environment: pytest.MonkeyPatch
) -> None:
    bare_environment.setenv("AQUANT_DATA_DIR", services["api"]["environment"]["AQUANT_DATA_DIR"])
    for name in WORKERS:  # working files are the container's own
        assert mounts(services[name]) == {"/secrets": "secrets-aquant", str(Settings().work_dir): ""}
    assert set(mounts(services["api"])) == set(mounts(services["migrate"])) == {"/secrets"}
    assert mounts(services["redis"])["/data"] == "broker"
    database = services["postgres"]["environment"]["PGDATA"]
    assert mounts(services["postgres"])[str(Path(database).parent)] == "database"
    folder = next(option for option in services["s3"]["command"] if option.startswith("-dir="))
    assert mounts(services["s3"])[folder.removeprefix("-dir=")] == "store"
    used = {volume for service in services.values() for volume in mounts(service).values()} - {""}
    assert set(compose["volumes"]) == used


def test_only_the_api_is_published_and_only_here(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if "ports" in service] == ["api"]
    assert services["api"]["ports"] == [{"host_ip": "127.0.0.1", "published": "8000", "target": 8000}]
    assert services["api"]["environment"]["AQUANT_PUBLISHED_ON"] == "127.0.0.1"
    written = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["api"]
    assert written["environment"]["AQUANT_PUBLISHED_ON"] == written["ports"][0]["host_ip"]  # whatever it is set to


def test_nothing_but_the_api_has_a_way_out(services: dict[str, Any], compose: dict[str, Any]) -> None:
    assert compose["networks"] == {"inside": {"internal": True}, "outside": None}
    reach = {name: service.get("networks", service.get("network_mode")) for name, service in services.items()}
    assert reach.pop("api") == ["outside", "inside"]
    assert reach.pop("secrets") == "none"
    assert all(networks == ["inside"] for networks in reach.values())
    assert not any("network_mode" in services[name] for name in reach)


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_is_given_the_time_it_takes_to_stop(name: str, services: dict[str, Any], dockerfile: Any) -> None:
    app = make_celery(Settings(broker_url="redis://nowhere:1/0"))
    soft = app.conf.worker_soft_shutdown_timeout
    assert seconds(services[name]["stop_grace_period"]) >= 3 * soft
    assert soft > HAND_ON_SECONDS + 2 * LOOK_SECONDS  # noticed, waited for, noticed that it was in vain
    assert dockerfile.environment("worker")["REMAP_SIGTERM"] == "SIGQUIT"
    assert dockerfile.environment("worker")["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_api_is_given_the_time_it_takes_to_stop(services: dict[str, Any], dockerfile: Any) -> None:
    command = json.loads(dockerfile.stages["api"].all("CMD")[0])
    graceful = float(command[command.index("--timeout-graceful-shutdown") + 1])
    assert seconds(services["api"]["stop_grace_period"]) >= 3 * graceful
    assert command[command.index("--port") + 1] == str(services["api"]["ports"][0]["target"])


def test_the_broker_keeps_every_message(services: dict[str, Any]) -> None:
    program, configuration, *rest = services["redis"]["command"]
    assert (program, configuration) == ("redis-server", "/secrets/redis.conf")
    options = dict(zip(rest[::2], rest[1::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"


def test_of_the_s3_server_only_what_asks_for_keys_is_heard(services: dict[str, Any]) -> None:
    options = dict(option.partition("=")[::2] for option in services["s3"]["command"])
    assert options["-ip.bind"] == "127.0.0.1"
    assert (options["-s3.ip.bind"], options["-s3.config"]) == ("0.0.0.0", "/secrets/s3.json")
    assert services["api"]["environment"]["AWS_ENDPOINT_URL"] == f"http://s3:{options['-s3.port']}"
    assert services["api"]["environment"]["AQUANT_ARTIFACTS_URL"].startswith(f"s3://{BUCKET}/")


@pytest.mark.parametrize("name", ["api", *WORKERS])
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


def test_what_can_be_set_is_in_the_manual(services: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    build = {argument for name in OWN for argument, value in services[name]["build"]["args"].items() if value is None}
    table = (ROOT / "docs/operations.md").read_text().partition("Variables, from the shell")[2].partition("\n\n**")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {*re.findall(r"\$\{(\w+):-", text), *build}


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

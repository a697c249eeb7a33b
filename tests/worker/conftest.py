"""Real parts for the worker's tests: database, artifact store, and jobs to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from servers import Storage
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts, open_artifacts
from service.jobs.database import migrate, open_database
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import Claim, JobRepository, now
from service.jobs.states import JobState
from service.settings import Settings


@pytest.fixture
def settings(tmp_path: Path, storage: Storage) -> Settings:
    return Settings(
        data_dir=tmp_path / "data",
        database_url=storage.database_url,
        artifacts_url=storage.artifacts_url,
        broker_url="redis://127.0.0.1:1/0",
        lease_seconds=30,
        heartbeat_seconds=0.02,
    )


@pytest.fixture
def sessions(settings: Settings) -> Iterator[sessionmaker[Session]]:
    migrate(settings)
    engine = open_database(settings)
    yield sessionmaker(engine, expire_on_commit=False)
    engine.dispose()


@pytest.fixture
def artifacts(settings: Settings) -> Artifacts:
    return open_artifacts(settings.artifacts)


@pytest.fixture
def claimed(sessions: sessionmaker[Session], artifacts: Artifacts, tmp_path: Path) -> Callable[..., Claim]:
    """Puts in a job with these uploads (name -> format and bytes) and claims it."""

    def claim(config: dict[str, object] | None = None, **uploads: tuple[str, bytes]) -> Claim:
        records = []
        for name, (kind, data) in uploads.items():
            (tmp_path / name).write_bytes(data)
            stored = artifacts.put_file(f"jobs/job/{name}", tmp_path / name)
            records.append(
                ArtifactRecord(name=name, key=stored.key, format=kind, size=stored.size, sha256=stored.sha256)
            )
        job = JobRecord(
            id="job",
            state=JobState.QUEUED,
            config={"weight_bits": 2, "activation_bits": 2, "preset": "smoke", **(config or {})},
            created_at=now(),
            attempt=0,
            artifacts=records,
        )
        with sessions.begin() as session:
            JobRepository(session).add(job)
        with sessions.begin() as session:
            taken = JobRepository(session).claim("job", "me", timedelta(seconds=30))
        assert taken is not None
        return taken

    return claim

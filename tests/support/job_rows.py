"""What a worker does to a job's row, and the job's state, each in a transaction of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts, job_prefix
from service.jobs.records import ArtifactRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.schemas import Problem
from service.jobs.states import JobState

MINUTE = timedelta(minutes=1)


def claim(sessions: sessionmaker[Session], job_id: str, lease: timedelta = MINUTE) -> Claim:
    with sessions.begin() as session:
        taken = JobRepository(session).claim(job_id, "me", lease)
    assert taken is not None
    return taken


def stored(artifacts: Artifacts, job_id: str, files: Mapping[str, bytes]) -> list[ArtifactRecord]:
    """Results of a job's first attempt, in the store but in no transaction yet: see ``finish``."""
    records = []
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.write_bytes(content)
            kept = artifacts.put_file(f"{job_prefix(job_id)}attempt-1/{name}", path)
            record = ArtifactRecord(job_id=job_id, name=name, key=kept.key, format="x")
            record.size, record.sha256 = kept.size, kept.sha256
            records.append(record)
    return records


def finish(
    sessions: sessionmaker[Session],
    job_id: str,
    state: JobState = JobState.SUCCEEDED,
    stage: str = "save",
    error: Problem | None = None,
    results: Iterable[ArtifactRecord] = (),
) -> None:
    """Claim a queued job, and end it."""
    held = claim(sessions, job_id)
    document = None if error is None else error.model_dump(mode="json")
    with sessions.begin() as session:
        assert JobRepository(session).finish(held, state, stage, document, results) == state


def not_overdue(lease: object, stop: BaseException) -> NoReturn:
    """For leases of work that stops when it is told to."""
    raise AssertionError(f"{lease} did not stop: {stop!r}")


def state(sessions: sessionmaker[Session], job_id: str) -> JobState:
    with sessions() as session:
        return JobRepository(session).get(job_id).state

"""The lease shows progress, and stops the work when it must stop."""

from __future__ import annotations

import math
import mmap
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
from job_rows import not_overdue
from servers import DATABASES
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from aquant_core.progress import Progress
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository, now
from service.logs import about, what_about
from service.settings import Settings
from worker.lease import (
    JobCancelledError,
    JobMemoryError,
    JobStopError,
    JobTimeoutError,
    Lease,
    LeaseLostError,
    own_memory,
)

pytestmark = pytest.mark.parametrize("storage", DATABASES, indirect=True)

Claimed = Callable[..., Claim]
Sessions = sessionmaker[Session]
AT_WORK = Progress("reconstruct", 2, 8, 10, 100, math.nan, 4.5, method="qdrop")
FORECAST = {"seconds": 1.5, "peak_bytes": 3, "blocks": []}


def work(lease: Lease, until: Callable[[], bool] = lambda: False) -> None:
    """Report as a core would, until told otherwise."""
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline, "nothing happened"
        lease.report(AT_WORK)
        time.sleep(0.01)


def test_progress_and_lease_reach_the_row(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    claim = claimed()
    with sessions.begin() as session:
        session.execute(update(JobRecord).values(lease_expires_at=now()))

    def shown() -> bool:
        with sessions() as session:
            job = JobRepository(session).get("job")
            return job.stage == "reconstruct"

    with Lease(claim, settings, sessions, not_overdue) as lease:
        lease.report(Progress("nearest", forecast=FORECAST))
        work(lease, shown)
    with sessions() as session:
        job = JobRepository(session).get("job")
        assert job.progress == {
            "method": "qdrop", "block": 2, "blocks": 8, "iteration": 10, "iterations": 100, "loss": None,
            "eta_seconds": 4.5, "forecast": FORECAST, "curve": None,
        }  # fmt: skip
        assert job.lease_expires_at is not None
        assert job.lease_expires_at > now() + timedelta(seconds=20)


def test_gpu_memory_reaches_the_row_where_there_is_one(
    settings: Settings, sessions: Sessions, claimed: Claimed
) -> None:
    gpu = {"used_bytes": 2, "total_bytes": 3, "peak_bytes": 1}

    def shown() -> bool:
        with sessions() as session:
            return (JobRepository(session).get("job").progress or {}).get("gpu") == gpu

    with Lease(claimed(), settings, sessions, not_overdue) as lease:
        deadline = time.monotonic() + 20
        while not shown():
            assert time.monotonic() < deadline
            lease.report(AT_WORK, gpu)


def test_the_lease_logs_about_its_job(
    settings: Settings, sessions: Sessions, claimed: Claimed, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[dict[str, object]] = []
    caplog.handler.addFilter(lambda _: seen.append(dict(what_about())) or True)
    claim = claimed()
    with sessions() as session:
        session.connection().exec_driver_sql("ALTER TABLE jobs RENAME TO hidden")
        session.commit()
    with about(job_id="job", attempt=1), Lease(claim, settings, sessions, not_overdue):
        deadline = time.monotonic() + 20
        while not seen:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert seen[0] == {"job_id": "job", "attempt": 1}


def test_cancel_stops_the_work(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    with Lease(claimed(), settings, sessions, not_overdue) as lease:
        with sessions.begin() as session:
            JobRepository(session).cancel("job")
        with pytest.raises(JobCancelledError):
            work(lease)
        assert lease.stopping


def test_lost_lease_stops_the_work(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    with Lease(claimed(), settings, sessions, not_overdue) as lease:
        with sessions.begin() as session:
            session.execute(update(JobRecord).values(attempt=2))
        with pytest.raises(LeaseLostError):
            work(lease)


def test_deleted_row_stops_the_work(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    with Lease(claimed(), settings, sessions, not_overdue) as lease:
        with sessions.begin() as session:
            session.delete(JobRepository(session).get("job"))
        with pytest.raises(LeaseLostError):
            work(lease)


def test_time_limit_stops_the_work(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    short = settings.model_copy(update={"job_seconds": 0.05})
    with Lease(claimed(), short, sessions, not_overdue) as lease, pytest.raises(JobTimeoutError):
        work(lease)


def test_unreachable_database_loses_the_lease_in_time(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    claim = claimed()
    brief = settings.model_copy(update={"lease_seconds": 0.2})
    with sessions() as session:
        session.connection().exec_driver_sql("ALTER TABLE jobs RENAME TO hidden")
        session.commit()
    with Lease(claim, brief, sessions, not_overdue) as lease, pytest.raises(JobStopError):
        work(lease)


def test_memory_limit_stops_the_work(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    limited = settings.model_copy(update={"job_memory_bytes": own_memory() + (64 << 20)})
    with Lease(claimed(), limited, sessions, not_overdue) as lease:
        work(lease, lambda: True)
        held = bytearray(b"x") * (128 << 20)
        with pytest.raises(JobMemoryError):
            work(lease)
        assert held


def test_mapped_files_are_not_counted(settings: Settings) -> None:
    before = own_memory()
    settings.data_dir.mkdir()
    (settings.data_dir / "big").write_bytes(bytes(64 << 20))
    with (settings.data_dir / "big").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        assert own_memory() - before < 32 << 20


def test_what_ends_the_work_is_written_at_once(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    slow = settings.model_copy(update={"heartbeat_seconds": 3600})
    with Lease(claimed(), slow, sessions, not_overdue) as lease:
        lease.report(Progress("forecast", forecast=FORECAST))
        lease.flush()
        with sessions() as session:
            job = JobRepository(session).get("job")
        assert (job.stage, (job.progress or {})["forecast"]) == ("forecast", FORECAST)
        with sessions.begin() as session:
            JobRepository(session).cancel("job")
        lease.flush()
        with pytest.raises(JobCancelledError):
            lease.check()


@pytest.mark.parametrize("lost", [False, True])
def test_work_that_does_not_stop_is_overdue(
    settings: Settings, sessions: Sessions, claimed: Claimed, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    monkeypatch.setattr("worker.lease.STOP_SECONDS", 0.1)
    told: list[JobStopError] = []
    with Lease(claimed(), settings, sessions, lambda _, stop: told.append(stop)):
        with sessions.begin() as session:
            if lost:
                session.execute(update(JobRecord).values(attempt=2))
            else:
                JobRepository(session).cancel("job")
        deadline = time.monotonic() + 20
        while not told:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
    assert [type(stop) for stop in told] == [LeaseLostError if lost else JobCancelledError]


def test_work_over_its_time_is_overdue_though_it_never_looks(
    settings: Settings, sessions: Sessions, claimed: Claimed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.lease.STOP_SECONDS", 0.1)
    overdue = threading.Event()
    brief = settings.model_copy(update={"job_seconds": 0.1})
    with Lease(claimed(), brief, sessions, lambda *_: overdue.set()):
        assert overdue.wait(20)


def test_stages_and_blocks_are_written_down(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    """None is missed, however fast they come; the last at the latest when the attempt ends."""
    rare = settings.model_copy(update={"heartbeat_seconds": 3600.0})
    claim = claimed()
    with Lease(claim, rare, sessions, not_overdue) as lease:
        for stage in ("capture", "reconstruct", "reconstruct", "save"):
            lease.report(Progress(stage))  # type: ignore[arg-type]
        lease.note_block("aquant", 1, 2, math.inf)
        lease.note_block("aquant", 2, 2, 0.5)
        lease.flush()
        lease.flush()
    with sessions() as session:
        _, events = JobRepository(session).events_after("job", 0, 100)
    happened = [(event.number, event.kind, event.data) for event in events if event.kind != "state"]
    block = {"method": "aquant", "blocks": 2, "attempt": 1}
    assert [(kind, data) for _, kind, data in happened] == [
        ("stage", {"stage": "capture", "attempt": 1}),
        ("stage", {"stage": "reconstruct", "attempt": 1}),
        ("stage", {"stage": "save", "attempt": 1}),
        ("block", {**block, "block": 1, "loss": None}),
        ("block", {**block, "block": 2, "loss": 0.5}),
    ]
    numbers = [number for number, _, _ in happened]
    assert numbers == list(range(numbers[0], numbers[0] + 5))


def test_whose_claim_is_lost_writes_nothing_down(settings: Settings, sessions: Sessions, claimed: Claimed) -> None:
    with Lease(claimed(), settings, sessions, not_overdue) as lease:
        with sessions.begin() as session:
            session.execute(update(JobRecord).values(attempt=2))
        lease.note_block("aquant", 1, 2, 0.5)
        lease.flush()
    with sessions() as session:
        _, events = JobRepository(session).events_after("job", 0, 100)
    assert [event.kind for event in events if event.kind != "state"] == []

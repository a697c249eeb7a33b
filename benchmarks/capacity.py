"""What one database, one broker and one API process carry: the numbers that capacity planning starts from.

    python benchmarks/capacity.py                                     SQLite in a folder that is gone afterwards
    python benchmarks/capacity.py --database-url postgresql://...     an empty database, which it fills

Everything is on loopback and bounded. Results: ``results/capacity_DATABASE.json``; docs/operations.md uses them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
from record import RESULTS, command, commit, write
from sqlalchemy import Engine, func, insert, select, text
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.database import migrate, open_database
from service.jobs.queue import JobQueue
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import Claim, JobRepository, now
from service.jobs.states import JobState
from service.local import api_command, broker_command, environment_of, free_port
from service.local_components import start_component, stop_component
from service.settings import Settings

CONFIG = {"weight_bits": 2, "activation_bits": 2}
PROGRESS = {
    "method": "aquant", "block": 3, "blocks": 10, "iteration": 1234, "iterations": 20000, "loss": 0.0123,
    "eta_seconds": 321.5,
    "forecast": {
        "seconds": 700.0,
        "peak_bytes": 1 << 30,
        "blocks": 10 * [{"name": "layer1.0", "seconds": 7.0, "peak_bytes": 1 << 30, "placement": "memory"}],
    },
}  # fmt: skip
"""A running job's, of ten blocks."""
LEASE = timedelta(minutes=30)
Sessions = sessionmaker[Session]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database-url")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each rate")
    parser.add_argument("--queues", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="lengths, ascending")
    parser.add_argument("--owners", type=int, default=10)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aquant-capacity-") as folder:
        settings = Settings(data_dir=Path(folder), database_url=options.database_url, reads_per_minute=10**9)
        migrate(settings)
        engine = open_database(settings)
        sessions = sessionmaker(engine, expire_on_commit=False)
        found: dict[str, Any] = {"renewals_a_second": renewals(sessions, options.writers, options.seconds)}
        with broker(settings) as settings:
            found["announcements_a_second"] = announcements(settings, options.seconds)
            found["polls_a_second"] = polls(settings, sessions, options.seconds)
        empty = size(engine)
        found["queues"] = [queue(sessions, length, options.owners) for length in options.queues]
        with sessions() as session:
            rows = session.scalar(select(func.count()).select_from(JobRecord)) or 1
        found["bytes_a_job"] = round((size(engine) - empty) / rows)
        engine.dispose()
    given = {"writers": options.writers, "seconds": options.seconds, "owners": options.owners}
    where = {"cores": os.cpu_count(), "python": platform.python_version(), "database": engine.dialect.name}
    write(
        options.out or RESULTS / f"capacity_{engine.dialect.name}.json",
        {"about": {"command": command(), "commit": commit(), **where, **given}, **found},
    )
    print(json.dumps(found, indent=1))


def rate(seconds: float, *workers: Callable[[], object]) -> float:
    """Calls a second of all workers together, each in a thread that calls without pause."""
    end = time.monotonic() + seconds
    counts = [0] * len(workers)

    def run(number: int) -> None:
        while time.monotonic() < end:
            workers[number]()
            counts[number] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(workers))]
    begun = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(sum(counts) / (time.monotonic() - begun), 1)


def rows(first: int, count: int, owners: int) -> list[dict[str, Any]]:
    """Queued jobs."""
    at = now()
    return [
        {
            "id": f"{number:024d}", "state": JobState.QUEUED, "config": CONFIG,
            "owner": f"owner-{number % owners}" if owners > 1 else None,
            "created_at": at + timedelta(microseconds=number), "attempt": 0,
        }
        for number in range(first, first + count)
    ]  # fmt: skip


def renewals(sessions: Sessions, writers: int, seconds: float) -> float:
    """Leases renewed, with a running job's progress, each by a writer of its own in a transaction of its own."""
    claims: list[Claim] = []
    with sessions.begin() as session:
        session.execute(insert(JobRecord), rows(0, writers, 1))
    for _ in range(writers):
        with sessions.begin() as session:
            claim = JobRepository(session).claim_next("capacity", LEASE, "cpu")
        assert claim is not None
        claims.append(claim)

    def renew(claim: Claim) -> Callable[[], None]:
        def once() -> None:
            with sessions.begin() as session:
                assert JobRepository(session).renew(claim, LEASE, "reconstruct", PROGRESS) == JobState.RUNNING

        return once

    found = rate(seconds, *map(renew, claims))
    for claim in claims:
        with sessions.begin() as session:
            JobRepository(session).finish(claim, JobState.SUCCEEDED, "save")
    return found


@contextmanager
def broker(settings: Settings) -> Any:
    """The settings with a broker of their own."""
    port = free_port("127.0.0.1")
    log = settings.data_dir / "broker.log"
    part = start_component("broker", broker_command(port, settings.data_dir / "broker"), log, "", os.environ)
    try:
        time.sleep(1.0)
        yield settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{port}/0"})
    finally:
        stop_component(part)


def announcements(settings: Settings, seconds: float) -> float:
    """Messages sent by one process."""
    queue = JobQueue(settings)
    try:
        return rate(seconds, lambda: queue.announce("x" * 24, ["cpu"]))
    finally:
        queue.close()


def polls(settings: Settings, sessions: Sessions, seconds: float) -> float:
    """`GET /jobs/{id}` of a running job answered by one API process to 8 clients on the same machine."""
    with sessions.begin() as session:
        session.execute(insert(JobRecord), rows(1_000_000, 1, 1))
        claim = JobRepository(session).claim_next("capacity", LEASE, "cpu")
        assert claim is not None
        JobRepository(session).renew(claim, LEASE, "reconstruct", PROGRESS)
    port = free_port("127.0.0.1")
    environment = environment_of(settings, str(settings.broker_url), port)
    log = settings.data_dir / "api.log"
    part = start_component("api", api_command("127.0.0.1", port), log, "", environment)
    try:
        url = f"http://127.0.0.1:{port}/jobs/{claim.job_id}"
        for _ in range(300):
            try:
                httpx.get(url).raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        clients = [httpx.Client() for _ in range(8)]
        return rate(seconds, *(lambda client=client: client.get(url).raise_for_status() for client in clients))
    finally:
        stop_component(part)
        with sessions.begin() as session:
            JobRepository(session).finish(claim, JobState.SUCCEEDED, "save")


def queue(sessions: Sessions, length: int, owners: int) -> dict[str, Any]:
    """Milliseconds to take the next of so many queued jobs, to tell a queued job's place, and to list a page."""
    with sessions.begin() as session:
        there = session.scalar(select(func.count()).where(JobRecord.state == JobState.QUEUED)) or 0
        first = 2_000_000 + length
        for start in range(first, first + length - there, 5_000):
            session.execute(insert(JobRecord), rows(start, min(5_000, first + length - there - start), owners))
    with sessions() as session:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(text("ANALYZE jobs"))
            session.commit()

    def claim() -> None:
        with sessions.begin() as session:
            assert JobRepository(session).claim_next("capacity", LEASE, "cpu") is not None

    def place() -> None:
        with sessions() as session:
            last = session.scalars(select(JobRecord).order_by(JobRecord.created_at.desc()).limit(1)).one()
            assert JobRepository(session).queue_position(last)

    def page() -> None:
        with sessions() as session:
            assert len(JobRepository(session).page(20, state=JobState.QUEUED).jobs) == 20

    return {"jobs": length, **{f"{one.__name__}_ms": milliseconds(one) for one in (claim, place, page)}}


def milliseconds(call: Callable[[], object]) -> float:
    """The median of twenty calls."""
    times = []
    for _ in range(20):
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    return round(statistics.median(times), 2)


def size(engine: Engine) -> int:
    """Bytes of the tables and indices of jobs."""
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            tables = (JobRecord.__tablename__, ArtifactRecord.__tablename__)
            return sum(connection.scalar(text(f"SELECT pg_total_relation_size('{name}')")) or 0 for name in tables)
        pages, of_each = (connection.scalar(text(f"PRAGMA {name}")) for name in ("page_count", "page_size"))
        return int(pages or 0) * int(of_each or 0)


if __name__ == "__main__":
    main()

"""Jobs are taken in their owners' turn and their own, by workers on a device that may run them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from job_rows import MINUTE
from servers import DATABASES
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.owners import OwnerRepository, ensure_owner
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.states import Device, JobState

pytestmark = pytest.mark.parametrize("storage", DATABASES, indirect=True)

AddJob = Callable[..., str]
Sessions = sessionmaker[Session]


def take(sessions: Sessions, device: Device = "cpu", max_running: int | None = None) -> Claim | None:
    with sessions.begin() as session:
        return JobRepository(session).claim_next("me", MINUTE, device, max_running)


def taken(sessions: Sessions, device: Device = "cpu") -> Iterator[str]:
    while (claim := take(sessions, device)) is not None:
        yield claim.job_id


def give(sessions: Sessions, job_id: str, **columns: object) -> str:
    with sessions.begin() as session:
        job = session.get_one(JobRecord, job_id)
        for name, value in columns.items():
            setattr(job, name, value)
    return job_id


def test_jobs_of_one_owner_go_in_the_order_they_came(sessions: Sessions, add_job: AddJob) -> None:
    jobs = [add_job() for _ in range(5)]
    assert list(taken(sessions)) == jobs


def test_owners_take_turns(sessions: Sessions, add_job: AddJob) -> None:
    """One who came first with many jobs does not keep the others waiting."""
    eager = [give(sessions, add_job(), owner="eager") for _ in range(4)]
    late = [give(sessions, add_job(), owner="late") for _ in range(2)]
    nobody = add_job()
    order = [eager[0], late[0], nobody, eager[1], late[1], eager[2], eager[3]]
    assert list(taken(sessions)) == order


def test_an_owner_whose_jobs_have_ended_is_next(sessions: Sessions, add_job: AddJob) -> None:
    for owner in ("a", "a", "b", "b"):
        give(sessions, add_job(), owner=owner)
    first, second = take(sessions), take(sessions)
    assert first is not None
    assert second is not None
    with sessions.begin() as session:
        JobRepository(session).finish(second, JobState.FAILED, "intake")
    third = take(sessions)
    assert third is not None
    with sessions() as session:
        assert JobRepository(session).get(third.job_id).owner == "b"


def test_a_worker_takes_what_its_device_can_run(sessions: Sessions, add_job: AddJob) -> None:
    either = add_job()
    on_gpu = give(sessions, add_job(), device="gpu")
    on_cpu = give(sessions, add_job(), device="cpu")
    assert list(taken(sessions, "gpu")) == [either, on_gpu]
    assert list(taken(sessions, "cpu")) == [on_cpu]


def test_a_job_stays_on_the_device_it_began_on(sessions: Sessions, add_job: AddJob) -> None:
    job_id = add_job()
    claim = take(sessions, "gpu")
    assert claim is not None
    with sessions.begin() as session:
        assert JobRepository(session).give_back(claim, 3, {}) == JobState.QUEUED
    assert take(sessions, "cpu") is None
    again = take(sessions, "gpu")
    assert again is not None
    assert (again.job_id, again.attempt) == (job_id, 2)


def test_workers_at_once_take_each_job_once(sessions: Sessions, add_job: AddJob) -> None:
    jobs = [give(sessions, add_job(), owner=f"{number % 3}") for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: list(taken(sessions)), range(4)))
    assert sorted(job for part in found for job in part) == jobs
    with sessions() as session:
        assert set(session.scalars(select(JobRecord.attempt))) == {1}


def limit(sessions: Sessions, owner: str, jobs: int | None) -> None:
    with sessions.begin() as session:
        ensure_owner(session, owner)
        OwnerRepository(session).set_limits(owner, max_jobs_running=jobs)


def test_an_owner_at_its_limit_waits_and_others_do_not(sessions: Sessions, add_job: AddJob) -> None:
    for owner in ("a", "a", "a", "b", "b", None):
        give(sessions, add_job(), owner=owner)
    limit(sessions, "a", 2)  # its own; the others have what is said for all

    def owners() -> Iterator[str | None]:
        while (claim := take(sessions, max_running=1)) is not None:
            with sessions() as session:
                yield JobRepository(session).get(claim.job_id).owner

    assert sorted(owners(), key=str) == [None, "a", "a", "b"]
    with sessions.begin() as session:
        ended = next(job for job in JobRepository(session).held() if job.owner == "b")
        JobRepository(session).finish(Claim(ended.id, 1, "me"), JobState.FAILED, "intake")
    assert list(owners()) == ["b"]
    assert list(taken(sessions)) == []  # what is left is a's


def test_workers_at_once_keep_an_owners_limit(sessions: Sessions, add_job: AddJob) -> None:
    for _ in range(12):
        give(sessions, add_job(), owner="a")
    limit(sessions, "a", 3)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: take(sessions), range(6)))
    assert sum(claim is not None for claim in found) == 3


def test_only_workers_that_are_alive_are_counted_on(sessions: Sessions) -> None:
    with sessions.begin() as session:
        for name, device in (("a", "cpu"), ("b", "gpu"), ("c", "cpu")):
            JobRepository(session).note_worker(name, device, "", timedelta(hours=1))
        session.connection().exec_driver_sql("UPDATE workers SET seen_at = '2026-01-01 00:00:00' WHERE name = 'b'")
    with sessions() as session:
        assert JobRepository(session).devices() == ["cpu", "cpu"]

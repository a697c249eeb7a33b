"""What an owner uses against what it may use, also when several requests ask at once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import job_rows
import pytest
import servers
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.errors import JobQuotaError, StorageQuotaError
from service.jobs.owners import Account, Limits, OwnerRepository, Usage, check_stored, ensure_owner
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import JobRepository, now
from service.jobs.states import JobState
from service.settings import Settings

Sessions = sessionmaker[Session]

pytestmark = pytest.mark.parametrize("storage", servers.DATABASES, indirect=True)


def files(job_id: str, *sizes: int) -> list[ArtifactRecord]:
    return [
        ArtifactRecord(job_id=job_id, name=f"{number}", key="k", format="x", size=size, sha256="0" * 64)
        for number, size in enumerate(sizes)
    ]


@pytest.fixture
def put(sessions: Sessions) -> Callable[..., str]:
    numbers = iter(range(1000))

    def add(owner: str | None, *sizes: int) -> str:
        job_id = f"{next(numbers):024d}"
        with sessions.begin() as session:
            JobRepository(session).add(
                JobRecord(
                    id=job_id,
                    owner=owner,
                    state=JobState.QUEUED,
                    config={"weight_bits": 2, "activation_bits": 2},
                    created_at=now(),
                    attempt=0,
                    artifacts=files(job_id, *sizes),
                )
            )
        return job_id

    return add


def test_each_owner_uses_its_own(sessions: Sessions, settings: Settings, put: Callable[..., str]) -> None:
    put("ada", 10, 20)
    job_rows.claim(sessions, put("ada", 3_000_000_000))
    put(None, 7)
    with sessions() as session:
        used = {owner: Account(session, settings, owner).usage() for owner in ("ada", "bob", None)}
    assert used == {"ada": Usage(1, 1, 3_000_000_030), "bob": Usage(0, 0, 0), None: Usage(1, 0, 7)}


def test_own_limits_go_before_those_of_the_settings(sessions: Sessions, settings: Settings) -> None:
    settings = settings.model_copy(update={"max_jobs_queued": 5, "max_stored_bytes": 50, "max_jobs_running": None})
    with sessions.begin() as session:
        ensure_owner(session, "ada")
        ensure_owner(session, "ada")
        OwnerRepository(session).set_limits("ada", max_jobs_queued=0, max_jobs_running=2)
        assert Account(session, settings, "ada").limits() == Limits(0, 2, 50, settings.max_upload_bytes)
        assert Account(session, settings, "bob").limits() == Limits(5, None, 50, settings.max_upload_bytes)


def test_a_refusal_says_limit_and_use(sessions: Sessions, settings: Settings, put: Callable[..., str]) -> None:
    put("ada", 40)
    for limits, size, error, members in (
        ({"max_jobs_queued": 1}, 0, JobQuotaError, {"limit": 1, "used": 1}),
        ({"max_stored_bytes": 100}, 61, StorageQuotaError, {"limit": 100, "used": 40}),
    ):
        limited = settings.model_copy(update=limits)
        with sessions.begin() as session:
            Account(session, limited, "bob").check_job(size)
            with pytest.raises(error) as caught:
                Account(session, limited, "ada").check_job(size)
        assert caught.value.members == members
        assert all(str(number) in caught.value.detail for number in members.values())
    assert check_stored(Limits(1, None, 100, 100), Usage(0, 0, 40), 60) is None


def test_requests_at_once_do_not_slip_past_a_limit_together(
    sessions: Sessions, settings: Settings, put: Callable[..., str]
) -> None:
    limited = settings.model_copy(update={"max_jobs_queued": 3})
    put("ada")

    def submit(number: int) -> bool:
        with sessions.begin() as session:
            try:
                Account(session, limited, "ada").check_job(0)
            except JobQuotaError:
                return False
            columns: dict[str, Any] = {"id": f"x{number}", "owner": "ada", "state": JobState.QUEUED}
            JobRepository(session).add(JobRecord(**columns, config={}, created_at=now(), attempt=0))
            return True

    with sessions.begin() as session:
        ensure_owner(session, "ada")
    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(submit, range(12))) == 2


def test_adopting_leaves_the_owned_alone(sessions: Sessions, put: Callable[..., str]) -> None:
    nobodys, hers = put(None), put("ada")
    with sessions.begin() as session:
        assert OwnerRepository(session).adopt("bob") == 1
    with sessions() as session:
        assert JobRepository(session).get(nobodys).owner == "bob"
        assert JobRepository(session).get(hers).owner == "ada"

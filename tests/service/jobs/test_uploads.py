"""Uploads between those who use them and those who delete them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from servers import DATABASES
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.errors import UploadInUseError, UploadNotFoundError
from service.jobs.records import ArtifactRecord, JobRecord
from service.jobs.repository import JobRepository, now
from service.jobs.states import JobState
from service.jobs.uploads import UploadRepository, adopt, delete_unused, expired
from service.settings import Settings

pytestmark = pytest.mark.parametrize("storage", DATABASES, indirect=True)

Sessions = sessionmaker[Session]
NAME = "a" * 64


def complete(sessions: Sessions, settings: Settings, owner: str | None = None) -> None:
    with sessions.begin() as session:
        uploads = UploadRepository(session, settings, owner)
        upload = uploads.begin(NAME, 3)
        assert uploads.advance(upload, 3, "uploads/x/0")
        assert uploads.complete(uploads.get(NAME), "uploads/x/whole")


def put_in_job(session: Session, key: str | None) -> None:
    record = ArtifactRecord(job_id="job", name="model", key=key, format="onnx", size=3, sha256=NAME)
    job = JobRecord(id="job", state=JobState.QUEUED, config={}, created_at=now(), attempt=0, artifacts=[record])
    JobRepository(session).add(job)


def test_a_job_that_comes_first_keeps_its_upload(settings: Settings, sessions: Sessions) -> None:
    """The deletion began before the job was put in, and sees it all the same."""
    complete(sessions, settings)
    outcome: list[bool] = []
    with sessions() as reader:
        (seen,) = expired(reader, now(), 10)

    def delete() -> None:
        with sessions.begin() as session:
            outcome.append(delete_unused(session, seen))

    deleting = threading.Thread(target=delete)
    with sessions.begin() as session:
        upload = UploadRepository(session, settings, None).use(NAME)
        assert upload is not None
        put_in_job(session, upload.key)
        deleting.start()
        deleting.join(0.3)
        assert outcome == []  # it waits
    deleting.join()
    assert outcome == [False]
    with sessions() as session:
        assert UploadRepository(session, settings, None).get(NAME).key == "uploads/x/whole"
        assert list(expired(session, now(), 10)) == []
    with sessions.begin() as session, pytest.raises(UploadInUseError):
        UploadRepository(session, settings, None).delete(NAME)


def test_one_that_was_touched_meanwhile_has_not_expired(settings: Settings, sessions: Sessions) -> None:
    """Its job is being checked and not there yet."""
    complete(sessions, settings)
    with sessions() as reader:
        (seen,) = expired(reader, now(), 10)
    with sessions.begin() as session:
        UploadRepository(session, settings, None).use(NAME)
    with sessions.begin() as session:
        assert not delete_unused(session, seen)


def test_a_deletion_that_comes_first_leaves_nothing_to_name(settings: Settings, sessions: Sessions) -> None:
    complete(sessions, settings)
    outcome: list[bool] = []

    def submit() -> None:
        with sessions.begin() as session:
            outcome.append(UploadRepository(session, settings, None).use(NAME) is None)

    submitting = threading.Thread(target=submit)
    with sessions.begin() as session:
        UploadRepository(session, settings, None).delete(NAME)
        submitting.start()
        submitting.join(0.3)
        assert outcome == []
    submitting.join()
    assert outcome == [True]


def test_one_that_was_begun_anew_is_another(settings: Settings, sessions: Sessions) -> None:
    """Who still has the old one in hand can neither add to the new one nor finish or delete it."""
    with sessions.begin() as session:
        old = UploadRepository(session, settings, None).begin(NAME, 3)
    with sessions.begin() as session:
        UploadRepository(session, settings, None).delete(NAME)
    with sessions.begin() as session:
        new = UploadRepository(session, settings, None).begin(NAME, 3)
    assert new.place != old.place
    with sessions.begin() as session:
        uploads = UploadRepository(session, settings, None)
        assert not uploads.advance(old, 3, "uploads/old/0")
        assert not uploads.complete(old, "uploads/old/whole")
        assert not uploads.give_up(old)
        assert not delete_unused(session, old)
        assert uploads.get(NAME).offset == 0


def test_owners_have_their_own(settings: Settings, sessions: Sessions, add_job: Callable[[], str]) -> None:
    add_job()
    complete(sessions, settings, "ada")
    for other in (None, "", "bob"):
        with sessions.begin() as session:
            uploads = UploadRepository(session, settings, other)
            assert uploads.use(NAME) is None
            with pytest.raises(UploadNotFoundError):
                uploads.get(NAME)


def test_nobody_s_can_be_adopted(settings: Settings, sessions: Sessions) -> None:
    """Those that are complete and those that are not; what the owner has already is left alone."""
    begun, twice = "b" * 64, "c" * 64
    complete(sessions, settings)
    with sessions.begin() as session:
        nobodys, hers = (UploadRepository(session, settings, owner) for owner in (None, "ada"))
        assert nobodys.advance(nobodys.begin(begun, 9), 4, "uploads/y/0")
        places = nobodys.begin(twice, 5).place, hers.begin(twice, 5).place
    with sessions.begin() as session:
        assert adopt(session, "ada") == 2
    with sessions.begin() as session:
        nobodys, hers = (UploadRepository(session, settings, owner) for owner in (None, "ada"))
        for name in (NAME, begun):
            with pytest.raises(UploadNotFoundError):
                nobodys.get(name)
        assert (nobodys.get(twice).place, hers.get(twice).place) == places
        used = hers.use(NAME)
        assert used is not None
        assert used.key == "uploads/x/whole"
        upload = hers.get(begun)
        assert (upload.owner, upload.offset) == ("ada", 4)
        assert hers.advance(upload, 5, "uploads/y/4")
        assert [(piece.start, piece.key) for piece in hers.pieces(upload)] == [(0, "uploads/y/0"), (4, "uploads/y/4")]
        assert adopt(session, "ada") == 0

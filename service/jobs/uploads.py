"""All SQL on resumable uploads: how far each is, who uses it, when it may go.

An upload belongs to one owner. Two owners who send the same file keep it twice, so that neither can learn from the
service's answers, or from their timing, that the other has it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, delete, exists, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.jobs.errors import ContentRangeError, UploadInUseError, UploadNotFoundError, UploadTooLargeError
from service.jobs.owners import Account
from service.jobs.records import ArtifactRecord, UploadPieceRecord, UploadRecord
from service.jobs.repository import now
from service.jobs.rows import changed, known
from service.settings import Settings


class UploadRepository:
    """One owner's uploads, within one session."""

    def __init__(self, session: Session, settings: Settings, owner: str | None) -> None:
        self._session, self._settings, self._owner = session, settings, owner

    def get(self, sha256: str) -> UploadRecord:
        """The upload of this digest.

        Raises:
            UploadNotFoundError: this owner has none.
        """
        upload = self._find(sha256)
        if upload is None:
            raise UploadNotFoundError(sha256)
        return upload

    def begin(self, sha256: str, size: int) -> UploadRecord:
        """The upload of this digest, made if need be.

        Raises:
            ContentRangeError: it was begun with another size.
            UploadTooLargeError: it is larger than this owner may send.
            StorageQuotaError: there is no room for it; a file takes its room from its first byte on.
        """
        upload = self._find(sha256)
        if upload is None:
            account = Account(self._session, self._settings, self._owner)
            most = account.limits().upload_bytes
            if size > most:
                raise UploadTooLargeError(
                    f"{size} bytes are more than the {most} this service takes.",
                    "Send a smaller one, or ask the operator for a higher limit.",
                )
            account.check_upload(size)
            at = now()
            try:
                with self._session.begin_nested():
                    upload = UploadRecord(
                        id=self._id(sha256),
                        owner=self._owner,
                        sha256=sha256,
                        place=secrets.token_hex(12),
                        size=size,
                        offset=0,
                        created_at=at,
                        touched_at=at,
                    )
                    self._session.add(upload)
            except IntegrityError:  # another request was first
                upload = self.get(sha256)
        if upload.size != size:
            raise ContentRangeError(
                f"The upload was begun with {upload.size} bytes, and is now said to have {size}.",
                "Send the size of the file; if the first was wrong, delete the upload and begin anew.",
            )
        return upload

    def advance(self, upload: UploadRecord, size: int, key: str) -> bool:
        """Add a piece of ``size`` bytes at the end; False if another request did so meanwhile, or it is gone."""
        here = (*_same(upload), UploadRecord.offset == upload.offset, UploadRecord.key.is_(None))
        moved = update(UploadRecord).where(*here).values(offset=upload.offset + size, touched_at=now())
        if not changed(self._session, moved):
            return False
        self._session.add(UploadPieceRecord(upload_id=upload.id, start=upload.offset, size=size, key=key))
        self._session.flush()
        return True

    def pieces(self, upload: UploadRecord) -> Sequence[UploadPieceRecord]:
        """The pieces of an upload that is not complete, in order."""
        query = select(UploadPieceRecord).where(UploadPieceRecord.upload_id == upload.id)
        return self._session.scalars(query.order_by(UploadPieceRecord.start)).all()

    def complete(self, upload: UploadRecord, key: str) -> bool:
        """Say where the whole file is, which ends its pieces; False if another request did so, or it is gone."""
        completed = update(UploadRecord).where(*_same(upload), UploadRecord.key.is_(None))
        if not changed(self._session, completed.values(key=key, touched_at=now())):
            return False
        self._session.execute(delete(UploadPieceRecord).where(UploadPieceRecord.upload_id == upload.id))
        return True

    def use(self, sha256: str) -> UploadRecord | None:
        """The complete upload of this digest, touched, and kept from being deleted until the transaction ends."""
        return self._session.scalar(
            update(UploadRecord)
            .where(UploadRecord.id == self._id(sha256), UploadRecord.key.is_not(None))
            .values(touched_at=now())
            .returning(UploadRecord)
            .execution_options(synchronize_session=False, populate_existing=True)
        )

    def give_up(self, upload: UploadRecord) -> bool:
        """Remove an upload that is not complete; whether it was there."""
        return changed(self._session, delete(UploadRecord).where(*_same(upload), UploadRecord.key.is_(None)))

    def delete(self, sha256: str) -> UploadRecord:
        """Remove an upload that no job uses.

        Raises:
            UploadNotFoundError: this owner has none.
            UploadInUseError: a job uses it.
        """
        upload = self.get(sha256)
        if not delete_unused(self._session, upload):
            raise UploadInUseError(f"The upload {sha256} is used by a job.", "Delete the jobs that use it first.")
        return upload

    def _find(self, sha256: str) -> UploadRecord | None:
        return self._session.get(UploadRecord, self._id(sha256), populate_existing=True)

    def _id(self, sha256: str) -> str:
        return _id_of(self._owner, sha256)


def adopt(session: Session, owner: str) -> int:
    """Give an owner the uploads that were sent while there were no keys; how many those are.

    Of what the owner has sent already, nobody's stays as it is, and expires once no job uses it.
    """
    nobodys = select(UploadRecord).where(UploadRecord.owner.is_(None)).with_for_update()
    adopted = 0
    for upload in session.scalars(nobodys).all():
        own_id = _id_of(owner, upload.sha256)
        if session.scalar(select(UploadRecord.id).where(UploadRecord.id == own_id)) is not None:
            continue
        own = UploadPieceRecord.upload_id == upload.id
        pieces = [
            {"upload_id": own_id, "start": piece.start, "size": piece.size, "key": piece.key}
            for piece in session.scalars(select(UploadPieceRecord).where(own))
        ]
        session.execute(delete(UploadPieceRecord).where(own).execution_options(synchronize_session=False))
        moved = update(UploadRecord).where(*_same(upload)).values(id=own_id, owner=owner)
        session.execute(moved.execution_options(synchronize_session=False))
        if pieces:
            session.execute(insert(UploadPieceRecord), pieces)
        session.expunge(upload)  # as it was
        adopted += 1
    return adopted


def expired(session: Session, before: datetime, limit: int) -> Sequence[UploadRecord]:
    """Uploads of all owners that were last touched before this time and are used by no job."""
    query = select(UploadRecord).where(UploadRecord.touched_at < before, ~_used())
    return session.scalars(query.order_by(UploadRecord.touched_at).limit(limit)).all()


def delete_unused(session: Session, upload: UploadRecord) -> bool:
    """Remove an upload as it was read, unless a job has come to use it; whether it was removed."""
    # A job that is being submitted changes the row, too (`use`). So it is either seen by the second statement, which
    # on PostgreSQL sees what was committed before it began, or finds the row gone.
    as_read = update(UploadRecord).where(*_same(upload), UploadRecord.touched_at == upload.touched_at)
    if not changed(session, as_read.values(touched_at=UploadRecord.touched_at)):
        return False
    return changed(session, delete(UploadRecord).where(*_same(upload), ~_used()))


def known_places(session: Session, places: Sequence[str]) -> set[str]:
    """Those of the folders that belong to an upload."""
    return known(session, UploadRecord.place, places)


def _id_of(owner: str | None, sha256: str) -> str:
    return hashlib.sha256(f"{owner or ''}\0{sha256}".encode()).hexdigest()[:32]


def _same(upload: UploadRecord) -> tuple[ColumnElement[bool], ...]:
    """Not one of the same digest that was begun after this was deleted."""
    return UploadRecord.id == upload.id, UploadRecord.place == upload.place


def _used() -> ColumnElement[bool]:
    return exists().where(ArtifactRecord.key == UploadRecord.key).correlate(UploadRecord)

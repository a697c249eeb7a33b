"""API keys: random tokens of which only the digest is kept; who holds one acts for its owner.

A key is ``aquant_ID_SECRET``. The id finds its row and may be shown; the secret has 256 random bits, so that a plain
SHA-256 cannot be searched for it, and a slow hash would only slow down every request.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import exists, or_, select, update
from sqlalchemy.orm import Session

from service.jobs.errors import KEY_REMEDY, KeyInvalidError
from service.jobs.owners import ensure_owner
from service.jobs.records import KeyRecord
from service.jobs.repository import now

Scope = Literal["jobs", "metrics"]
"""What a key is good for: everything an owner does, or reading the service's metrics and nothing else."""

PREFIX = "aquant"
"""How keys begin, so that people and scanners of repositories recognise one."""

_TOKEN = re.compile(rf"{PREFIX}_([0-9a-f]{{12}})_([A-Za-z0-9_-]{{43}})")

LAST_USED_SECONDS = 60
"""How exact the time of the last use is: a row is not written for every request."""


class KeyUnknownError(Exception):
    """No key has this id or name, or several have the name."""


class KeyRepository:
    """Keys, within one session; the caller owns the transaction."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def any(self) -> bool:
        """Whether keys are in use. Revoked ones count: revoking the last key opens nothing."""
        return bool(self._session.scalar(select(exists().select_from(KeyRecord))))

    def create(self, name: str, owner: str, scope: Scope, expires_at: datetime | None) -> tuple[KeyRecord, str]:
        """A new key: its row, and the key itself, which cannot be had again."""
        ensure_owner(self._session, owner)
        key_id = secrets.token_hex(6)
        token = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(32)}"
        key = KeyRecord(
            id=key_id,
            digest=_digest(token),
            name=name,
            owner=owner,
            scope=scope,
            created_at=now(),
            expires_at=expires_at,
        )
        self._session.add(key)
        self._session.flush()
        return key, token

    def all(self) -> Sequence[KeyRecord]:
        """Every key there ever was, the oldest first."""
        return self._session.scalars(select(KeyRecord).order_by(KeyRecord.created_at, KeyRecord.id)).all()

    def revoke(self, name_or_id: str) -> KeyRecord:
        """Make a key worthless from the next request on.

        Raises:
            KeyUnknownError: the keys not yet revoked do not have exactly one of this id or name.
        """
        found = self._session.scalars(
            select(KeyRecord).where(
                KeyRecord.revoked_at.is_(None), or_(KeyRecord.id == name_or_id, KeyRecord.name == name_or_id)
            )
        ).all()
        if len(found) != 1:
            few = "No key" if not found else f"{len(found)} keys ({', '.join(key.id for key in found)})"
            raise KeyUnknownError(
                f"{few} of the name or id {name_or_id!r} can be revoked. `aquant keys list` has the ids."
            )
        found[0].revoked_at = now()
        return found[0]

    def accept(self, token: str) -> KeyRecord:
        """The key that this token is, with the use noted.

        Raises:
            KeyInvalidError: it is none, or no longer.
        """
        match = _TOKEN.fullmatch(token)
        key = match and self._session.get(KeyRecord, match[1])
        if not key or not hmac.compare_digest(key.digest, _digest(token)):
            raise KeyInvalidError("The API key is not one of this service's.", KEY_REMEDY)
        at = now()
        # Told only to who has the secret.
        if key.revoked_at is not None:
            raise KeyInvalidError(f"The API key {key.id} was revoked.", KEY_REMEDY)
        if key.expires_at is not None and key.expires_at <= at:
            raise KeyInvalidError(f"The API key {key.id} expired at {key.expires_at:%Y-%m-%d %H:%M} UTC.", KEY_REMEDY)
        stale = at - timedelta(seconds=LAST_USED_SECONDS)
        if key.last_used_at is None or key.last_used_at < stale:
            self._session.execute(
                update(KeyRecord)
                .where(KeyRecord.id == key.id, or_(KeyRecord.last_used_at.is_(None), KeyRecord.last_used_at < stale))
                .values(last_used_at=at)
                .execution_options(synchronize_session=False)
            )
        return key


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()

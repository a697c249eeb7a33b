"""The life of a key: made, used, expired, revoked; and what of it the database knows."""

from __future__ import annotations

import hashlib
import re
from datetime import timedelta

import pytest
import servers
from sqlalchemy import Engine, text
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.errors import KeyInvalidError
from service.jobs.keys import LAST_USED_SECONDS, KeyRepository, KeyUnknownError
from service.jobs.records import KeyRecord
from service.jobs.repository import now

Sessions = sessionmaker[Session]

pytestmark = pytest.mark.parametrize("storage", servers.DATABASES, indirect=True)


def make(sessions: Sessions, name: str = "laptop", owner: str = "ada", **changes: object) -> tuple[KeyRecord, str]:
    with sessions.begin() as session:
        key, token = KeyRepository(session).create(name, owner, "jobs", None)
        for column, value in changes.items():
            setattr(key, column, value)
        return key, token


def accept(sessions: Sessions, token: str) -> KeyRecord:
    with sessions.begin() as session:
        return KeyRepository(session).accept(token)


def test_a_key_is_recognised_and_says_whose_it_is(sessions: Sessions) -> None:
    _, other = make(sessions, owner="bob")
    key, token = make(sessions)
    assert re.fullmatch(rf"aquant_{key.id}_[A-Za-z0-9_-]{{43}}", token)
    assert (accept(sessions, token).owner, accept(sessions, other).owner) == ("ada", "bob")


def test_the_database_has_a_digest_and_not_the_key(sessions: Sessions, engine: Engine) -> None:
    key, token = make(sessions)
    assert key.digest == hashlib.sha256(token.encode()).hexdigest()
    with engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM api_keys")).one()
    secret = token.rpartition(f"{key.id}_")[2]
    assert not any(secret in str(value) for value in row)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token[:-1] + ("A" if token[-1] != "A" else "B"),
        lambda token: token[:7] + ("0" if token[7] != "0" else "1") + token[8:],  # another id
        lambda token: token[:-1],
        lambda token: token + "A",
        lambda token: token.upper(),
        lambda token: token + "\0",
        lambda _: "",
        lambda _: "aquant__",
        lambda _: "\N{SNOWMAN}",
    ],
)
def test_a_key_with_another_character_is_none(sessions: Sessions, spoil: object) -> None:
    _, token = make(sessions)
    assert callable(spoil)
    with pytest.raises(KeyInvalidError, match="not one of this service's") as caught:
        accept(sessions, spoil(token))
    assert token[20:] not in str(caught.value)


def test_the_secret_of_one_key_does_not_open_another(sessions: Sessions) -> None:
    (ours, token), (theirs, _) = make(sessions), make(sessions, owner="bob")
    with pytest.raises(KeyInvalidError):
        accept(sessions, token.replace(ours.id, theirs.id))


def test_an_expired_key_is_refused_and_says_so(sessions: Sessions) -> None:
    _, token = make(sessions, expires_at=now() + timedelta(minutes=1))
    accept(sessions, token)
    _, token = make(sessions, expires_at=now() - timedelta(seconds=1))
    with pytest.raises(KeyInvalidError, match="expired at 20"):
        accept(sessions, token)


def test_a_revoked_key_is_refused_and_still_counts_as_one(sessions: Sessions) -> None:
    with sessions() as session:
        assert not KeyRepository(session).any()
    key, token = make(sessions)
    with sessions.begin() as session:
        assert KeyRepository(session).revoke("laptop").id == key.id
    with pytest.raises(KeyInvalidError, match="was revoked"):
        accept(sessions, token)
    with sessions() as session:
        assert KeyRepository(session).any()


def test_a_key_is_revoked_by_its_id_where_the_name_is_not_enough(sessions: Sessions) -> None:
    (first, token), (second, other) = make(sessions), make(sessions, owner="bob")
    with sessions.begin() as session:
        repository = KeyRepository(session)
        with pytest.raises(KeyUnknownError, match=rf"2 keys \((?=.*{first.id})(?=.*{second.id})"):
            repository.revoke("laptop")
        repository.revoke(second.id)
    accept(sessions, token)
    with pytest.raises(KeyInvalidError):
        accept(sessions, other)
    with sessions.begin() as session:
        repository = KeyRepository(session)
        repository.revoke("laptop")  # of the two, the one that is left
        with pytest.raises(KeyUnknownError, match="No key"):
            repository.revoke("laptop")


def test_the_last_use_is_noted_but_not_each(sessions: Sessions) -> None:
    key, token = make(sessions)
    assert key.last_used_at is None

    def used(back: float = 0) -> object:
        with sessions.begin() as session:
            record = session.get_one(KeyRecord, key.id)
            if back and record.last_used_at is not None:
                record.last_used_at -= timedelta(seconds=back)
            return record.last_used_at

    accept(sessions, token)
    first = used()
    assert first is not None
    accept(sessions, token)
    assert used() == first
    long_ago = used(back=LAST_USED_SECONDS + 1)
    accept(sessions, token)
    assert used() != long_ago

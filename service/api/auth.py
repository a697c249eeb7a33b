"""Who asks: every route but the public ones takes ``OwnerDep``, and with it whose jobs it may touch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from service.addresses import neighbourhood
from service.api.deps import Parts, PartsDep
from service.api.locality import SAFE_METHODS, check_keyless, check_own_page
from service.jobs.errors import KeyInvalidError, KeyMissingError, KeyScopeError, ServiceError
from service.jobs.idempotency import IdempotencyKeys
from service.jobs.keys import KeyRepository, Scope
from service.jobs.owners import Account
from service.jobs.repository import JobRepository
from service.jobs.uploads import UploadRepository
from service.settings import Settings

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    bearerFormat="aquant_...",
    description="An API key. Without any keys, the service answers its own machine only, and without one.",
)
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]

COOKIE, SECURE_COOKIE = "aquant-key", "__Host-aquant-key"
"""Where the page keeps a key; the second over https, where no other host of the domain can set it."""


@dataclass(frozen=True)
class Owner:
    """Whom a request acts for, and with it the only way its route has to the database.

    ``name`` is None for who comes without a key while there are none.
    """

    name: str | None
    _settings: Settings
    _sessions: sessionmaker[Session]

    @contextmanager
    def jobs(self) -> Iterator[JobRepository]:
        """The owner's jobs, in a transaction."""
        with self._sessions.begin() as session:
            yield JobRepository(session).of(self.name)

    @contextmanager
    def uploads(self) -> Iterator[UploadRepository]:
        """The owner's uploads, in a transaction."""
        with self._sessions.begin() as session:
            yield UploadRepository(session, self._settings, self.name)

    def has_used(self, idempotency_key: str) -> bool:
        """Whether this key stands for a job of the owner's."""
        with self._sessions() as session:
            return IdempotencyKeys(session, self._settings, self.name).has(idempotency_key)

    @contextmanager
    def account(self) -> Iterator[Account]:
        """What the owner uses and may use, in a transaction."""
        with self._sessions.begin() as session:
            yield Account(session, self._settings, self.name)


def bearer_of(request: Request) -> HTTPAuthorizationCredentials | None:
    """The key in the page's cookie; what only ``__Host-`` could have set goes first."""
    key = request.cookies.get(SECURE_COOKIE) or request.cookies.get(COOKIE)
    return None if key is None else HTTPAuthorizationCredentials(scheme="Cookie", credentials=key)


def admit_to_page(request: Request, parts: Parts, credentials: HTTPAuthorizationCredentials | None) -> str | None:
    """The owner that a request to the page acts for.

    Raises:
        ServiceError: it is not to be let in, or a page of another site sent it to change something.
    """
    if request.method not in SAFE_METHODS:
        check_own_page(request)
    return _admit(request, parts, credentials, "jobs")


def _visitor(request: Request, parts: PartsDep) -> Owner:
    return Owner(admit_to_page(request, parts, bearer_of(request)), parts.settings, parts.sessions)


def _owner(request: Request, parts: PartsDep, credentials: _Credentials) -> Owner:
    return Owner(_admit(request, parts, credentials, "jobs"), parts.settings, parts.sessions)


def _watcher(request: Request, parts: PartsDep, credentials: _Credentials) -> None:
    _admit(request, parts, credentials, "metrics")


def _is_trusted(request: Request, parts: PartsDep, credentials: _Credentials) -> bool:
    try:
        _admit(request, parts, credentials, None)
    except (ServiceError, SQLAlchemyError):
        return False
    return True


OwnerDep = Annotated[Owner, Depends(_owner)]
"""Whose jobs this request may touch.

Raises 401 without a good key, 403 for strangers where there are no keys, 429 for too many requests.
"""

VisitorDep = Annotated[Owner, Depends(_visitor)]
"""The same for the page, whose requests bring the key in a cookie, and no other routes': see docs/operations.md."""

WatcherDep = Depends(_watcher)
"""For routes that tell of the whole service: where there are keys, they take one that was made for that."""

TrustedDep = Annotated[bool, Depends(_is_trusted)]
"""For public routes: whether this request would have been let in."""


def _admit(
    request: Request, parts: Parts, credentials: HTTPAuthorizationCredentials | None, scope: Scope | None
) -> str | None:
    """The owner that a request acts for; ``scope`` is what its key has to be good for, if it matters."""
    read = request.method in SAFE_METHODS
    client = request.client.host if request.client is not None else "unknown"
    address = f"address {neighbourhood(client)}"
    with parts.sessions.begin() as session:
        keys = KeyRepository(session)
        key = refused = None
        try:
            if credentials is None:
                raise KeyMissingError
            key = keys.accept(credentials.credentials)
        except (KeyInvalidError, KeyMissingError) as error:
            refused = error if keys.any() else None  # without keys nobody is asked for one
    # The broker is asked when the connection has been given back.
    if key is None:
        parts.rates.count(address, read=read)  # guessing is not free
        if refused is not None:
            raise refused
        check_keyless(request, parts.settings)
        return None
    parts.rates.count(f"owner {key.owner}", read=read)
    if scope is not None and key.scope != scope:
        raise KeyScopeError(
            f"The API key {key.id} is for {key.scope}, this call is for {scope}.",
            "Use another key; the operator makes them with `aquant keys create`, with --metrics for metrics.",
        )
    return key.owner

"""Who asks: every route but the public ones takes ``OwnerDep``, and with it whose jobs it may touch."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.exc import SQLAlchemyError

from service.addresses import neighbourhood
from service.api.deps import Parts, PartsDep
from service.api.locality import SAFE_METHODS, check_keyless
from service.jobs.errors import KeyInvalidError, KeyMissingError, KeyScopeError, ServiceError
from service.jobs.keys import KeyRepository, Scope

_bearer = HTTPBearer(
    auto_error=False,
    scheme_name="key",
    bearerFormat="aquant_...",
    description="An API key. Without any keys, the service answers its own machine only, and without one.",
)
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


def _owner(request: Request, parts: PartsDep, credentials: _Credentials) -> str | None:
    return _admit(request, parts, credentials, "jobs")


def _watcher(request: Request, parts: PartsDep, credentials: _Credentials) -> None:
    _admit(request, parts, credentials, "metrics")


def _is_trusted(request: Request, parts: PartsDep, credentials: _Credentials) -> bool:
    try:
        _admit(request, parts, credentials, None)
    except (ServiceError, SQLAlchemyError):
        return False
    return True


OwnerDep = Annotated[str | None, Depends(_owner)]
"""Whose jobs this request may touch; None, those of nobody in particular, while there are no keys.

Raises 401 without a good key, 403 for strangers where there are no keys, 429 for too many requests.
"""

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
        try:
            if credentials is not None:
                key = keys.accept(credentials.credentials)
            elif keys.any():
                raise KeyMissingError
            else:
                key = None
        except (KeyInvalidError, KeyMissingError):
            parts.rates.count(address, read=read)  # guessing is not free
            raise
    if key is None:
        parts.rates.count(address, read=read)
        check_keyless(request, parts.settings)
        return None
    parts.rates.count(f"owner {key.owner}", read=read)
    if scope is not None and key.scope != scope:
        raise KeyScopeError(
            f"The API key {key.id} is for {key.scope}, this call is for {scope}.",
            "Use another key; the operator makes them with `aquant keys create`, with --metrics for metrics.",
        )
    return key.owner

"""Clients of the HTTP API, synchronous and asynchronous: typed, and in need of nothing but the base install.

What they do is written once, as exchanges that name each step and take none (``exchanges``, ``transfers``,
``event_stream``); ``Client`` and ``AsyncClient`` take the steps.
"""

from service.client.async_client import AsyncClient
from service.client.errors import (
    AddressMalformedError,
    DigestMismatchError,
    JobIdMalformedError,
    KeyMalformedError,
    ServiceProblemError,
    ServiceUnreachableError,
)
from service.client.event_stream import Event
from service.client.exchanges import DEFAULT_URL, KEY_VARIABLE
from service.client.sync_client import Client

__all__ = [
    "DEFAULT_URL",
    "KEY_VARIABLE",
    "AddressMalformedError",
    "AsyncClient",
    "Client",
    "DigestMismatchError",
    "Event",
    "JobIdMalformedError",
    "KeyMalformedError",
    "ServiceProblemError",
    "ServiceUnreachableError",
]

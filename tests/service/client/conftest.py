"""Both clients behind one face, and a service whose connections can be cut."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import httpx
import pytest
from cutting_proxy import CuttingProxy, cutting_proxy
from job_rows import finish, stored
from sqlalchemy.orm import Session, sessionmaker

from service.artifacts import Artifacts
from service.client import AsyncClient, Client
from service.client import patience as patience_module

Connect = Callable[..., Any]
"""Makes a client; an asynchronous one is waited for, so that one test serves both."""


class Waited:
    """An AsyncClient with the methods of a Client."""

    def __init__(self, client: AsyncClient) -> None:
        self._client, self._runner = client, asyncio.Runner()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        def call(*arguments: Any, **named: Any) -> Any:
            outcome = method(*arguments, **named)
            return self._drawn(outcome) if inspect.isasyncgen(outcome) else self._runner.run(outcome)

        return call

    def _drawn(self, items: AsyncGenerator[Any]) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(items)

        while True:
            try:
                yield self._runner.run(following())
            except StopAsyncIteration:
                return

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


@pytest.fixture(params=[Client, AsyncClient], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    clients: list[Any] = []

    def make(*arguments: Any, **named: Any) -> Any:
        client = request.param(*arguments, **named)
        clients.append(client if isinstance(client, Client) else Waited(client))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited, without waiting."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("service.client.sync_client.time.sleep", pauses.append)
    monkeypatch.setattr("service.client.async_client.asyncio.sleep", sleep)
    return pauses


@pytest.fixture
def proxy(web: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """Before the application."""
    monkeypatch.setattr(patience_module, "FIRST_PAUSE_SECONDS", 0.1)
    assert web.base_url.port is not None
    with cutting_proxy(web.base_url.port) as proxy:
        yield proxy


@pytest.fixture
def client(connect: Connect, proxy: CuttingProxy) -> Any:
    """A client that reaches the application by the proxy."""
    return connect(proxy.url)


@pytest.fixture
def succeeded(sessions: sessionmaker[Session], artifacts: Artifacts, add_job: Callable[[], str]) -> Callable[..., str]:
    """Makes a job that succeeded, with these files; its id."""

    def make(**files: bytes) -> str:
        job_id = add_job()
        finish(sessions, job_id, results=stored(artifacts, job_id, files))
        return job_id

    return make

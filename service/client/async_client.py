"""The asynchronous client, on asyncio."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import httpx

from aquant_core.config import QuantizationConfig
from service.client import transfers
from service.client.event_stream import Event, EventStream
from service.client.exchanges import (
    DEFAULT_URL,
    TIMEOUT_SECONDS,
    Call,
    Exchange,
    Exchanges,
    Pause,
    T,
    Watching,
    Work,
    address,
    authorization,
)
from service.client.patience import PATIENCE_SECONDS
from service.client.transfers import Transferred
from service.jobs.schemas import Health, JobDocument, JobPage, WebhookRequest
from service.jobs.states import Device, JobState


class AsyncClient:
    """What ``Client`` is, for asyncio: the same arguments, results and errors."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        patience: float = PATIENCE_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        headers = authorization(key)
        self._http = httpx.AsyncClient(
            base_url=address(url), headers=headers, timeout=TIMEOUT_SECONDS, transport=transport
        )
        self._exchanges = Exchanges(url, patience)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(
        self,
        model: str | Path,
        calibration: str | Path,
        config: QuantizationConfig | Mapping[str, Any],
        evaluation: str | Path | None = None,
        device: Device | None = None,
        *,
        reuse: bool = False,
        webhook: WebhookRequest | None = None,
        idempotency_key: str | None = None,
        transferred: Transferred | None = None,
    ) -> JobDocument:
        """Send a job; see ``Client.submit``."""
        key = idempotency_key or str(uuid.uuid4())
        return await self._run(
            transfers.submit(
                self._exchanges, model, calibration, config, evaluation, device, reuse, webhook, key, transferred
            )
        )

    async def upload(self, path: str | Path, transferred: Transferred | None = None) -> str:
        """Send a file, from where an earlier try was cut off; its sha256 in hex.

        Raises:
            DigestMismatchError: the file changed while it was being sent.
        """
        return await self._run(transfers.upload(self._exchanges, path, transferred))

    async def get(self, job_id: str) -> JobDocument:
        """A job as it stands."""
        return await self._run(self._exchanges.get(job_id))

    async def list(self, *, state: JobState | None = None, limit: int = 20, page: str | None = None) -> JobPage:
        """A page of jobs, newest first; ``page`` is the ``next`` of the page before."""
        return await self._run(self._exchanges.list(state, limit, page))

    async def watch(self, job_id: str, timeout: float | None = None) -> AsyncIterator[JobDocument]:
        """A job's document now and at every change seen, until it has finished.

        Raises:
            TimeoutError: it has not after ``timeout`` seconds.
        """
        watching = Watching(self._exchanges, job_id, timeout)
        while not watching.over:
            document = await self._run(watching.next())
            if document is not None:
                yield document

    async def wait(self, job_id: str, timeout: float | None = None) -> JobDocument:
        """The job's document once it has finished.

        Raises:
            TimeoutError: it has not after ``timeout`` seconds.
        """
        async for job in self.watch(job_id, timeout):
            last = job
        return last

    async def events(self, job_id: str, after: int = 0) -> AsyncIterator[Event]:
        """Everything that happened to a job after the event of that number, and then as it happens, to its end."""
        stream = EventStream(self._exchanges, job_id, after)
        while not stream.over:
            broken: httpx.TransportError | None = None
            pause: float | None = None
            try:
                async with self._open(stream.call()) as response:
                    if not response.is_success:
                        await response.aread()
                    pause = stream.pause_of(response)
                    if pause is None:
                        async for chunk in response.aiter_bytes():
                            for event in stream.feed(chunk):
                                yield event
            except httpx.TransportError as error:
                broken = error
            if not stream.over:
                await asyncio.sleep(stream.pause_after(broken) if pause is None else pause)

    async def report(self, job_id: str) -> dict[str, Any]:
        """The report of a job that succeeded."""
        return await self._run(self._exchanges.report(job_id))

    async def report_page(self, job_id: str) -> str:
        """The same as one self-contained HTML page."""
        return await self._run(self._exchanges.report_page(job_id))

    async def download(
        self,
        job_id: str,
        target: str | Path,
        what: Literal["checkpoint", "onnx"] = "checkpoint",
        transferred: Transferred | None = None,
    ) -> str:
        """Fetch the checkpoint of a job that succeeded, or its ONNX; see ``Client.download``."""
        return await self._run(transfers.download(self._exchanges, job_id, target, what, transferred))

    async def cancel(self, job_id: str) -> JobDocument:
        """Ask for a job to be stopped."""
        return await self._run(self._exchanges.cancel(job_id))

    async def delete(self, job_id: str) -> None:
        """Remove a job that is not running, with its files."""
        await self._run(self._exchanges.delete(job_id))

    async def health(self) -> Health:
        """Whether the service can work, and which part cannot."""
        return await self._run(self._exchanges.health())

    async def _run(self, exchange: Exchange[T]) -> T:
        """Take an exchange's steps to its end."""
        outcome: Any = None
        failure: Exception | None = None
        while True:
            try:
                step = exchange.send(outcome) if failure is None else exchange.throw(failure)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome, failure = None, None
            try:
                outcome = await self._take(step)
            except Exception as error:
                failure = error

    async def _take(self, step: Call | Pause | Work) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, Work):
            return await asyncio.to_thread(step.function)
        async with self._open(step) as response:
            if step.sink is None or not response.is_success:
                await response.aread()
                return response
            step.sink.begin(response)
            async for chunk in response.aiter_raw():
                step.sink.write(chunk)
            return response

    def _open(self, call: Call) -> AbstractAsyncContextManager[httpx.Response]:
        return self._http.stream(
            call.method,
            call.url,
            headers=call.headers,
            params=call.params,
            content=call.content,
            timeout=call.timeout,
        )

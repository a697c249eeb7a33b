"""The synchronous client."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
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


class Client:
    """The service at ``url``, with an API key where it asks for one: ``key``, or AQUANT_API_KEY.

    A request whose connection breaks, or that is refused for now (429, 503), is sent again: when ``Retry-After`` says,
    or after half a second and then twice as long each time, ``patience`` seconds of waiting in all. Every method raises
    ServiceProblemError where the service refuses and ServiceUnreachableError where it does not answer.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        patience: float = PATIENCE_SECONDS,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = authorization(key)
        self._http = httpx.Client(base_url=address(url), headers=headers, timeout=TIMEOUT_SECONDS, transport=transport)
        self._exchanges = Exchanges(url, patience)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(
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
        """Send a job. Files go up in pieces, those that the service has are not sent.

        It is made once, however often it has to be asked for; with your own ``idempotency_key`` also by another call.
        ``reuse`` takes a job that has done the same before. ``transferred`` is called with a file's name, its bytes
        that are there and its size.

        Raises:
            pydantic.ValidationError: the config is none; nothing has been sent.
            DigestMismatchError: a file changed while it was being sent.
        """
        key = idempotency_key or str(uuid.uuid4())
        return self._run(
            transfers.submit(
                self._exchanges, model, calibration, config, evaluation, device, reuse, webhook, key, transferred
            )
        )

    def upload(self, path: str | Path, transferred: Transferred | None = None) -> str:
        """Send a file, from where an earlier try was cut off; its sha256 in hex.

        Raises:
            DigestMismatchError: the file changed while it was being sent.
        """
        return self._run(transfers.upload(self._exchanges, path, transferred))

    def get(self, job_id: str) -> JobDocument:
        """A job as it stands."""
        return self._run(self._exchanges.get(job_id))

    def list(self, *, state: JobState | None = None, limit: int = 20, page: str | None = None) -> JobPage:
        """A page of jobs, newest first; ``page`` is the ``next`` of the page before."""
        return self._run(self._exchanges.list(state, limit, page))

    def watch(self, job_id: str, timeout: float | None = None) -> Iterator[JobDocument]:
        """A job's document now and at every change seen, until it has finished.

        Raises:
            TimeoutError: it has not after ``timeout`` seconds.
        """
        watching = Watching(self._exchanges, job_id, timeout)
        while not watching.over:
            document = self._run(watching.next())
            if document is not None:
                yield document

    def wait(self, job_id: str, timeout: float | None = None) -> JobDocument:
        """The job's document once it has finished.

        Raises:
            TimeoutError: it has not after ``timeout`` seconds.
        """
        *_, last = self.watch(job_id, timeout)
        return last

    def events(self, job_id: str, after: int = 0) -> Iterator[Event]:
        """Everything that happened to a job after the event of that number, and then as it happens, to its end."""
        stream = EventStream(self._exchanges, job_id, after)
        while not stream.over:
            broken: httpx.TransportError | None = None
            pause: float | None = None
            try:
                with self._open(stream.call()) as response:
                    if not response.is_success:
                        response.read()
                    pause = stream.pause_of(response)
                    if pause is None:
                        for chunk in response.iter_bytes():
                            yield from stream.feed(chunk)
            except httpx.TransportError as error:
                broken = error
            if not stream.over:
                time.sleep(stream.pause_after(broken) if pause is None else pause)

    def report(self, job_id: str) -> dict[str, Any]:
        """The report of a job that succeeded."""
        return self._run(self._exchanges.report(job_id))

    def report_page(self, job_id: str) -> str:
        """The same as one self-contained HTML page."""
        return self._run(self._exchanges.report_page(job_id))

    def download(
        self,
        job_id: str,
        target: str | Path,
        what: Literal["checkpoint", "onnx"] = "checkpoint",
        transferred: Transferred | None = None,
    ) -> str:
        """Fetch the checkpoint of a job that succeeded, or its ONNX, to ``target``; its sha256 in hex.

        What arrived before a connection broke for good stays beside ``target`` (TARGET.SHA256.partial), and the next
        call goes on from there.

        Raises:
            DigestMismatchError: the bytes are not those the service has; ``target`` is left as it was.
        """
        return self._run(transfers.download(self._exchanges, job_id, target, what, transferred))

    def cancel(self, job_id: str) -> JobDocument:
        """Ask for a job to be stopped."""
        return self._run(self._exchanges.cancel(job_id))

    def delete(self, job_id: str) -> None:
        """Remove a job that is not running, with its files."""
        self._run(self._exchanges.delete(job_id))

    def health(self) -> Health:
        """Whether the service can work, and which part cannot."""
        return self._run(self._exchanges.health())

    def _run(self, exchange: Exchange[T]) -> T:
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
                outcome = self._take(step)
            except Exception as error:
                failure = error

    def _take(self, step: Call | Pause | Work) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if isinstance(step, Work):
            return step.function()
        with self._open(step) as response:
            if step.sink is None or not response.is_success:
                response.read()
                return response
            step.sink.begin(response)
            for chunk in response.iter_raw():
                step.sink.write(chunk)
            return response

    def _open(self, call: Call) -> AbstractContextManager[httpx.Response]:
        return self._http.stream(
            call.method,
            call.url,
            headers=call.headers,
            params=call.params,
            content=call.content,
            timeout=call.timeout,
        )

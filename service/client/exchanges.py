"""What a client and the service say to each other, as generators: they yield a step and are sent its outcome.

No step is taken here, so the synchronous and the asynchronous client share all of it.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import httpx
from pydantic import RootModel

from service.client.errors import (
    AddressMalformedError,
    JobIdMalformedError,
    KeyMalformedError,
    ServiceProblemError,
    ServiceUnreachableError,
    checked,
    not_the_service,
    read,
)
from service.client.patience import PATIENCE_SECONDS, Patience
from service.jobs.schemas import JOB_ID, Health, JobDocument, JobPage, JobRequest
from service.jobs.states import JobState

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "AQUANT_API_KEY"
WAIT_SECONDS = 15.0
TIMEOUT_SECONDS = 60.0

T = TypeVar("T")


class Sink(Protocol):
    """Takes in an answer's body as it comes."""

    def begin(self, response: httpx.Response) -> None:
        """Look at the headers of an answer that has a body."""

    def write(self, chunk: bytes) -> None:
        """Take the next bytes."""


class _Report(RootModel[dict[str, Any]]):
    """A report, of whatever version."""


@dataclass(frozen=True)
class Call:
    """Send a request; its outcome is the response, read unless a sink takes it in, or httpx's TransportError."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] | None = None
    content: bytes | None = None
    timeout: float = TIMEOUT_SECONDS
    sink: Sink | None = None


@dataclass(frozen=True)
class Pause:
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Work:
    """Do what would hold up others: reading and hashing files. Its outcome is what the function returns."""

    function: Callable[[], Any]


Exchange = Generator[Call | Pause | Work, Any, T]


def authorization(key: str | None) -> dict[str, str]:
    """The header of an API key: this one, or that of the environment.

    Raises:
        KeyMalformedError: it has characters that no key has.
    """
    key = (key or os.environ.get(KEY_VARIABLE, "")).strip()
    if not all("!" <= character <= "~" for character in key):  # httpx would tell it whole
        raise KeyMalformedError(f"The API key (--key, or {KEY_VARIABLE}) has characters that no key has. Copy it anew.")
    return {"Authorization": f"Bearer {key}"} if key else {}


def address(url: str) -> str:
    """The address of a service, if it is one.

    Raises:
        AddressMalformedError: it is none.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise AddressMalformedError(
            f"{url!r} is no address of a service (--url, or AQUANT_URL). Write it as {DEFAULT_URL}."
        )
    return url


def job_path(job_id: str, below: str = "") -> str:
    """Where a job is, or what is below it.

    Raises:
        JobIdMalformedError: no job has such an id, and the path might lead elsewhere.
    """
    if not re.fullmatch(JOB_ID, job_id):
        raise JobIdMalformedError(
            f"{job_id!r} is no id of a job, which has 24 digits and letters from a to f. `aquant submit` prints it, "
            "`aquant list` lists them."
        )
    return f"/jobs/{job_id}{below}"


class Exchanges:
    """The exchanges with the service at ``url``, each with so many seconds of patience."""

    def __init__(self, url: str, patience: float = PATIENCE_SECONDS) -> None:
        self._url = url
        self._seconds = patience
        self._met = False

    def patience(self) -> Patience:
        """That of a new request."""
        return Patience(self._seconds)

    def send(self, call: Call, patience: Patience | None = None) -> Exchange[httpx.Response]:
        """Send a request until it is answered or patience ends.

        Raises:
            ServiceProblemError, ServiceUnreachableError: see ``errors.checked``.
        """
        patience = patience or self.patience()
        while True:
            try:
                response = yield call
            except httpx.TransportError as error:
                yield Pause(self.pause_after(error, patience))
                continue
            pause = self.pause_of(response, patience)
            if pause is None:
                return checked(response)
            yield Pause(pause)

    def pause_of(self, response: httpx.Response, patience: Patience) -> float | None:
        """Seconds until the request is sent again; None if the answer is to be taken."""
        self._met = True
        return patience.after(response)

    def pause_after(self, error: httpx.TransportError, patience: Patience) -> float:
        """Seconds until the request whose connection broke is sent again.

        Raises:
            ServiceUnreachableError: patience is at its end, or nobody was ever there.
        """
        never_there = isinstance(error, httpx.ConnectError) and not self._met
        pause = None if never_there else patience.after_loss()
        if pause is None:
            raise ServiceUnreachableError(
                f"The service at {self._url} does not answer ({type(error).__name__}: {error}). "
                "Start it with `aquant up`, or name another with --url or AQUANT_URL."
            ) from error
        return pause

    def create(self, request: JobRequest, idempotency_key: str) -> Exchange[JobDocument]:
        """Ask for a job whose files have been uploaded; the key makes sure that it is one."""
        content = request.model_dump_json(exclude_unset=True).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": idempotency_key}
        response = yield from self.send(Call("POST", "/jobs", headers, content=content))
        return read(response, JobDocument)

    def get(self, job_id: str) -> Exchange[JobDocument]:
        """A job as it stands."""
        response = yield from self.send(Call("GET", job_path(job_id)))
        return read(response, JobDocument)

    def list(self, state: JobState | None, limit: int, page: str | None) -> Exchange[JobPage]:
        """A page of jobs."""
        params = {"limit": str(limit), **({} if state is None else {"state": str(state)})}
        response = yield from self.send(Call("GET", page) if page else Call("GET", "/jobs", params=params))
        return read(response, JobPage)

    def cancel(self, job_id: str) -> Exchange[JobDocument]:
        """Ask for a job to be stopped."""
        response = yield from self.send(Call("POST", job_path(job_id, "/cancel")))
        return read(response, JobDocument)

    def delete(self, job_id: str) -> Exchange[None]:
        """Remove a job; that it is gone when asked a second time is no error."""
        patience = self.patience()
        try:
            response = yield from self.send(Call("DELETE", job_path(job_id)), patience)
        except ServiceProblemError as error:
            if not (patience.lost and error.problem.code == "job_not_found"):
                raise
        else:
            if response.status_code != httpx.codes.NO_CONTENT:
                raise not_the_service(response, f"{response.status_code} to a deletion")

    def report(self, job_id: str) -> Exchange[dict[str, Any]]:
        """A job's report."""
        response = yield from self.send(Call("GET", job_path(job_id, "/report")))
        return read(response, _Report).root

    def report_page(self, job_id: str) -> Exchange[str]:
        """The same as a page."""
        response = yield from self.send(Call("GET", job_path(job_id, "/report"), {"Accept": "text/html"}))
        return response.text

    def health(self) -> Exchange[Health]:
        """Whether the service can work, as it says now: nothing is sent twice."""
        try:
            response = yield from self.send(Call("GET", "/health/ready"), Patience(0))
        except ServiceProblemError as error:
            if error.problem.code != "not_ready":
                raise
            said = error.problem.model_extra or {}
            return Health.model_validate({**said, "status": "unavailable"})
        return read(response, Health)


class Watching:
    """Following one job's document: what to ask next, and when it has taken too long."""

    def __init__(self, exchanges: Exchanges, job_id: str, timeout: float | None) -> None:
        self._exchanges, self._job_id, self._timeout = exchanges, job_id, timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._tag: str | None = None
        self._last: JobDocument | None = None

    @property
    def over(self) -> bool:
        """Whether the job has finished."""
        return self._last is not None and self._last.finished

    def next(self) -> Exchange[JobDocument | None]:
        """The document, at once the first time and then when it has changed; None if it has not for a while.

        Raises:
            TimeoutError: the job has not finished in time.
        """
        left = WAIT_SECONDS if self._deadline is None else self._deadline - time.monotonic()
        if self._last is not None and left <= 0:
            raise TimeoutError(f"Job {self._job_id} is still {self._last.state} after {self._timeout:g} seconds.")
        headers, params = {}, {}
        if self._tag is not None:
            headers, params = {"If-None-Match": self._tag}, {"wait": f"{min(WAIT_SECONDS, left):.3f}"}
        response = yield from self._exchanges.send(Call("GET", job_path(self._job_id), headers, params))
        if response.status_code == httpx.codes.NOT_MODIFIED:
            return None
        self._last = read(response, JobDocument)
        self._tag = response.headers.get("etag")
        if self._tag is None:  # it could not be asked to wait for a change
            raise not_the_service(response, "a job without its ETag")
        return self._last

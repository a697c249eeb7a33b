"""A client of the HTTP API: typed, synchronous, and in need of nothing but the base install."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import httpx

from aquant_core.config import QuantizationConfig
from service.jobs.schemas import Health, JobDocument, JobPage, Problem
from service.jobs.states import Device, JobState

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "AQUANT_API_KEY"
WAIT_SECONDS = 15
PATIENCE_SECONDS = 60
"""How long a GET waits in all where the service says that there were too many requests."""


class ServiceProblemError(Exception):
    """The service refused, with a problem document."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.detail} {problem.remedy}")
        self.problem = problem


class ServiceUnreachableError(Exception):
    """Nothing answers at the service's address, or not as the service would."""


class KeyMalformedError(ValueError):
    """The API key given is none."""


class DigestMismatchError(Exception):
    """What arrived is not what the service says it sent."""


class Client:
    """The service at ``url``, with an API key where it asks for one: ``key``, or AQUANT_API_KEY."""

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        key: str | None = None,
        timeout: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        key = (key or os.environ.get(KEY_VARIABLE, "")).strip()
        if not all("!" <= character <= "~" for character in key):  # httpx would tell it whole
            raise KeyMalformedError(
                f"The API key (--key, or {KEY_VARIABLE}) has characters that no key has. Copy it anew."
            )
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(
        self,
        model: Path,
        calibration: Path,
        config: QuantizationConfig | Mapping[str, Any],
        evaluation: Path | None = None,
        device: Device | None = None,
    ) -> JobDocument:
        """Send a job; files are streamed."""
        if not isinstance(config, QuantizationConfig):
            config = QuantizationConfig.model_validate(config)
        paths = {"model": model, "calibration": calibration, "evaluation": evaluation}
        with contextlib.ExitStack() as stack:
            # The config first: if it is refused, no upload was in vain.
            files: list[tuple[str, tuple[str | None, str | BinaryIO, str]]] = [
                ("config", (None, config.model_dump_json(exclude_unset=True), "application/json"))
            ]
            if device is not None:
                files.append(("device", (None, device, "text/plain")))
            for name, path in paths.items():
                if path is not None:
                    file = stack.enter_context(path.open("rb"))
                    files.append((name, (path.name, file, "application/octet-stream")))
            response = self._send("POST", "/jobs", files=files, timeout=httpx.Timeout(60.0, write=600.0, read=600.0))
        return JobDocument.model_validate_json(response.content)

    def get(self, job_id: str) -> JobDocument:
        """A job as it stands."""
        return JobDocument.model_validate_json(self._send("GET", f"/jobs/{job_id}").content)

    def list(self, *, state: JobState | None = None, limit: int = 20, page: str | None = None) -> JobPage:
        """A page of jobs, newest first; ``page`` is the ``next`` of the page before."""
        params = {"limit": str(limit), **({} if state is None else {"state": str(state)})}
        response = self._send("GET", page) if page else self._send("GET", "/jobs", params=params)
        return JobPage.model_validate_json(response.content)

    def watch(self, job_id: str) -> Iterator[JobDocument]:
        """A job's document now and at every change seen, until it has finished."""
        tag: str | None = None
        while True:
            headers: dict[str, str] = {} if tag is None else {"If-None-Match": tag}
            params: dict[str, str] = {} if tag is None else {"wait": str(WAIT_SECONDS)}
            response = self._send("GET", f"/jobs/{job_id}", headers=headers, params=params)
            if response.status_code == httpx.codes.NOT_MODIFIED:
                continue
            tag = response.headers["etag"]
            document = JobDocument.model_validate_json(response.content)
            yield document
            if document.finished:
                return

    def wait(self, job_id: str, timeout: float | None = None) -> JobDocument:
        """The job's document once it has finished.

        Raises:
            TimeoutError: it has not after ``timeout`` seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = WAIT_SECONDS if deadline is None else min(WAIT_SECONDS, deadline - time.monotonic())
            params = {"wait": str(max(left, 0.0))}
            document = JobDocument.model_validate_json(self._send("GET", f"/jobs/{job_id}", params=params).content)
            if document.finished:
                return document
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError(f"Job {job_id} is still {document.state} after {timeout} seconds.")

    def report(self, job_id: str) -> dict[str, Any]:
        """The report of a job that succeeded."""
        document: dict[str, Any] = self._send("GET", f"/jobs/{job_id}/report").json()
        return document

    def report_page(self, job_id: str) -> str:
        """The same as one self-contained HTML page."""
        return self._send("GET", f"/jobs/{job_id}/report", headers={"Accept": "text/html"}).text

    def download(self, job_id: str, target: Path, what: Literal["checkpoint", "onnx"] = "checkpoint") -> str:
        """Fetch the checkpoint of a job that succeeded, or its ONNX, to ``target``; its sha256 in hex.

        Raises:
            DigestMismatchError: the bytes are not those the service has; ``target`` is left as it was.
        """
        digest = hashlib.sha256()
        part = target.with_name(target.name + ".part")
        try:
            with self._stream(f"/jobs/{job_id}/{what}") as response, part.open("wb") as file:
                expected = response.headers["etag"].strip('"')
                for chunk in response.iter_bytes():
                    digest.update(chunk)
                    file.write(chunk)
            if digest.hexdigest() != expected:
                raise DigestMismatchError(
                    f"The {what} of job {job_id} arrived with the sha256 {digest.hexdigest()}, "
                    f"not {expected}. Download it again."
                )
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return digest.hexdigest()

    def cancel(self, job_id: str) -> JobDocument:
        """Ask for a job to be stopped."""
        return JobDocument.model_validate_json(self._send("POST", f"/jobs/{job_id}/cancel").content)

    def delete(self, job_id: str) -> None:
        """Remove a job that is not running, with its files."""
        self._send("DELETE", f"/jobs/{job_id}")

    def health(self) -> Health:
        """Whether the service can work."""
        return Health.model_validate_json(self._send("GET", "/health/ready").content)

    def _send(self, method: str, url: str, **options: Any) -> httpx.Response:
        patience = PATIENCE_SECONDS if method == "GET" else 0
        while True:
            try:
                response = self._http.request(method, url, **options)
            except httpx.TransportError as error:
                raise self._unreachable(error) from error
            pause = _pause(response)
            if pause is None or pause > patience:
                return _checked(response)
            time.sleep(pause)
            patience -= pause

    @contextlib.contextmanager
    def _stream(self, url: str) -> Iterator[httpx.Response]:
        try:
            with self._http.stream("GET", url) as response:
                if response.is_error:
                    response.read()
                yield _checked(response)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.TransportError) -> ServiceUnreachableError:
        return ServiceUnreachableError(
            f"The service at {self._http.base_url} does not answer ({type(error).__name__}: {error}). "
            "Start it with `aquant up`, or name another with --url or AQUANT_URL."
        )


def _pause(response: httpx.Response) -> int | None:
    """Seconds after which a request that was one too many may be sent again."""
    after = response.headers.get("retry-after", "")
    return max(1, int(after)) if response.status_code == httpx.codes.TOO_MANY_REQUESTS and after.isdecimal() else None


def _checked(response: httpx.Response) -> httpx.Response:
    if not response.is_error:
        return response
    if response.headers.get("content-type", "").startswith("application/problem+json"):
        raise ServiceProblemError(Problem.model_validate_json(response.content))
    raise ServiceUnreachableError(
        f"{response.url} answered {response.status_code} without a problem document; is it an AQuant service?"
    )

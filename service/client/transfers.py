"""Files up and down: in pieces, resumed where a connection broke, and checked against their sha256."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import httpx

from aquant_core.config import QuantizationConfig
from service.client.errors import DigestMismatchError, ServiceProblemError, ServiceUnreachableError, checked, read
from service.client.exchanges import TIMEOUT_SECONDS, Call, Exchange, Exchanges, Pause, Work, job_path
from service.jobs.schemas import JobDocument, JobRequest, UploadDocument, WebhookRequest
from service.jobs.states import Device

PIECE_BYTES = 16 * 1024 * 1024
JOINING_SECONDS = 600.0
"""How long the answer to an upload's last piece may take: the service reads the whole file."""

Transferred = Callable[[str, int, int | None], None]
"""Is told what is being transferred, the bytes of it that are there, and how many there will be."""

_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def submit(
    exchanges: Exchanges,
    model: str | Path,
    calibration: str | Path,
    config: QuantizationConfig | Mapping[str, Any],
    evaluation: str | Path | None,
    device: Device | None,
    reuse: bool,
    webhook: WebhookRequest | None,
    idempotency_key: str,
    transferred: Transferred | None,
) -> Exchange[JobDocument]:
    """Upload the files that the service does not have, then ask for the job."""
    if not isinstance(config, QuantizationConfig):
        config = QuantizationConfig.model_validate(config)  # if it is refused, no upload was in vain
    given = {"model": model, "calibration": calibration, "evaluation": evaluation}
    paths = {name: Path(path) for name, path in given.items() if path is not None}
    references: dict[str, str] = {}
    for name, path in paths.items():
        references[name] = f"sha256:{(yield from upload(exchanges, path, transferred))}"
    filenames = {name: path.name for name, path in paths.items()}
    asked = {"filenames": filenames, "config": config, "device": device, "reuse": reuse or None, "webhook": webhook}
    said = {name: value for name, value in asked.items() if value is not None}
    request = JobRequest.model_validate({**references, **said})
    return (yield from exchanges.create(request, idempotency_key))


def upload(exchanges: Exchanges, path: str | Path, transferred: Transferred | None = None) -> Exchange[str]:
    """Send a file, from where an earlier try of it was cut off; its sha256.

    Raises:
        DigestMismatchError: the file changed meanwhile.
    """
    path = Path(path)
    sha256, size = yield Work(functools.partial(_digest_of, path))
    url = f"/uploads/{sha256}"
    offset, complete = yield from _standing(exchanges, url)
    patience = exchanges.patience()
    while not complete:
        if transferred is not None:
            transferred(path.name, offset, size)
        try:
            response = yield (yield from _piece(path, url, offset, size))
        except httpx.TransportError as error:
            pause: float | None = exchanges.pause_after(error, patience)
        else:
            pause = exchanges.pause_of(response, patience)
        before = offset
        if pause is not None:
            yield Pause(pause)
            offset, complete = yield from _standing(exchanges, url)
        elif response.status_code == httpx.codes.CONFLICT:  # another request has added to it, or it was deleted
            offset, complete = yield from _standing(exchanges, url)
            if offset == before:
                checked(response)
        else:
            standing = _uploaded(checked(response))
            offset, complete = standing.offset, standing.complete
        if offset > before:
            patience = exchanges.patience()
    if transferred is not None:
        transferred(path.name, size, size)
    return str(sha256)


def _standing(exchanges: Exchanges, url: str) -> Exchange[tuple[int, bool]]:
    """How far an upload is. By GET and not HEAD, whose refusals could not say why."""
    try:
        response = yield from exchanges.send(Call("GET", url))
    except ServiceProblemError as error:
        if error.problem.code == "upload_not_found":
            return 0, False
        raise
    upload = _uploaded(response)
    return upload.offset, upload.complete


def _piece(path: Path, url: str, offset: int, size: int) -> Exchange[Call]:
    """The request with the file's bytes from ``offset`` on; without any if all are there."""
    content = yield Work(lambda: _read(path, offset, min(PIECE_BYTES, size - offset)))
    if len(content) < min(PIECE_BYTES, size - offset):
        raise DigestMismatchError(f"{path} became shorter while it was being sent. Send it again once it is finished.")
    bounds = f"{offset}-{offset + len(content) - 1}" if content else "*"
    # A file of no bytes goes without a range: the service has words for it.
    headers = {"Content-Range": f"bytes {bounds}/{size}"} if size else {}
    timeout = JOINING_SECONDS if offset + len(content) == size else TIMEOUT_SECONDS
    return Call("PUT", url, headers, content=content, timeout=timeout)


def _uploaded(response: httpx.Response) -> UploadDocument:
    return read(response, UploadDocument)


def _digest_of(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


def _read(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)


def download(
    exchanges: Exchanges,
    job_id: str,
    target: str | Path,
    what: Literal["checkpoint", "onnx"],
    transferred: Transferred | None = None,
) -> Exchange[str]:
    """Fetch a job's file to ``target``, from where an earlier try was cut off; its sha256 in hex.

    What has arrived lies beside ``target``, in TARGET.SHA256.partial, until it is whole and checked.

    Raises:
        DigestMismatchError: the bytes are not those that the service has; ``target`` is left as it was.
    """
    patience = exchanges.patience()
    arriving = _Arriving(Path(target), transferred)
    while True:
        yield Work(arriving.take_stock)
        before = arriving.size
        try:
            response = yield Call("GET", job_path(job_id, f"/{what}"), arriving.headers(), sink=arriving)
        except httpx.TransportError as error:
            if arriving.size > before:
                patience = exchanges.patience()
            yield Pause(exchanges.pause_after(error, patience))
            continue
        finally:
            arriving.close()
        pause = exchanges.pause_of(response, patience)
        if pause is not None:
            yield Pause(pause)
        elif response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            yield Work(arriving.discard)
        else:
            break
    if response.status_code != httpx.codes.NOT_MODIFIED:
        checked(response)
    return str((yield Work(lambda: arriving.finish(f"The {what} of job {job_id}"))))


class _Arriving:
    """A file that arrives, in one piece or several."""

    def __init__(self, target: Path, transferred: Transferred | None) -> None:
        self._target, self._transferred = target, transferred
        self._digest = hashlib.sha256()
        self._sha256: str | None = None
        self._announced: str | None = None
        self._file: Any = None
        self._total: int | None = None
        self.size = 0

    @property
    def _partial(self) -> Path:
        return self._target.with_name(f"{self._target.name}.{self._sha256}.partial")

    def take_stock(self) -> None:
        """Look for what an earlier try has left; of several, which tells of several files, the latest."""
        if self._sha256 is None:
            left = {
                path: path.name.removeprefix(self._target.name + ".").removesuffix(".partial")
                for path in self._target.parent.glob("*.partial")
                if path.name.startswith(self._target.name + ".")
            }
            found = [path for path, name in left.items() if _SHA256.fullmatch(name)]
            if found:
                self._sha256 = left[max(found, key=lambda path: path.stat().st_mtime_ns)]
        self._digest, self.size = hashlib.sha256(), 0
        if self._sha256 is not None and self._partial.exists():
            with self._partial.open("rb") as file:
                self._digest = hashlib.file_digest(file, "sha256")
                self.size = file.tell()

    def headers(self) -> dict[str, str]:
        """What to ask for: the rest; nothing if all is there; else the whole."""
        headers = {"Accept-Encoding": "identity"}
        if self._sha256 is not None and self._digest.hexdigest() == self._sha256:
            headers["If-None-Match"] = f'"{self._sha256}"'
        elif self._sha256 is not None and self.size:
            headers |= {"Range": f"bytes={self.size}-", "If-Range": f'"{self._sha256}"'}
        return headers

    def begin(self, response: httpx.Response) -> None:
        """Open the file where the body belongs."""
        sha256 = response.headers.get("etag", "").strip('"')
        if not _SHA256.fullmatch(sha256):
            raise ServiceUnreachableError(
                f"{response.url} answered without the file's digest; is it an AQuant service?"
            )
        self._announced = response.headers.get("repr-digest")
        start = 0
        if response.status_code == httpx.codes.PARTIAL_CONTENT:
            match = _CONTENT_RANGE.match(response.headers.get("content-range", ""))
            start = int(match.group(1)) if match else -1
            if start != self.size or sha256 != self._sha256:
                raise ServiceUnreachableError(
                    f"{response.url} sent another range of the file than was asked for; is it an AQuant service?"
                )
        elif self._sha256 not in (None, sha256):
            self._partial.unlink(missing_ok=True)  # of what was here before
        if start == 0:
            self._digest, self.size = hashlib.sha256(), 0
        self._sha256 = sha256
        length = response.headers.get("content-length", "")
        self._total = start + int(length) if length.isdecimal() else None
        self._file = self._partial.open("ab" if start else "wb")

    def write(self, chunk: bytes) -> None:
        """Add to the file."""
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)
        if self._transferred is not None:
            self._transferred(self._target.name, self.size, self._total)

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Begin again: what an earlier try has left is longer than the file."""
        self._partial.unlink(missing_ok=True)
        self._sha256 = None

    def finish(self, name: str) -> str:
        """Check what is there and put it in its place; its sha256."""
        sha256 = self._digest.hexdigest()
        announced = f"sha-256=:{base64.b64encode(self._digest.digest()).decode()}:"
        if sha256 != self._sha256 or self._announced not in (None, announced):
            self._partial.unlink()
            raise DigestMismatchError(
                f"{name} arrived with the sha256 {sha256}, not {self._sha256} (Repr-Digest: {self._announced}). "
                "Download it again."
            )
        self._partial.replace(self._target)
        return sha256

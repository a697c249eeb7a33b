"""A job's server-sent events: reading them, and going on after the last one when the connection breaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from service.client.errors import checked
from service.client.exchanges import Call, Exchanges, job_path
from service.jobs.schemas import JobEvent, JobProgress
from service.jobs.states import FINISHED

SILENCE_SECONDS = 60.0
"""After so long without a byte the connection is taken for broken: the service says something every 15 s."""


@dataclass(frozen=True)
class Event:
    """What happened to a job: ``state``, ``stage``, ``block``, ``progress`` (has no number), ``deleted`` (nor data)."""

    kind: str
    data: JobEvent | JobProgress | None
    number: int | None = None


class EventStream:
    """One job's events over as many connections as it takes; what a connection brings is fed in as it comes."""

    def __init__(self, exchanges: Exchanges, job_id: str, after: int) -> None:
        self._exchanges, self._job_id = exchanges, job_id
        self._number = after
        self._patience = exchanges.patience()
        self._fields: dict[str, str] = {}
        self._rest = b""
        self.over = False

    def call(self) -> Call:
        """The request for what has not been seen."""
        self._fields, self._rest = {}, b""
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": str(self._number)} if self._number else {})}
        return Call("GET", job_path(self._job_id, "/events"), headers, timeout=SILENCE_SECONDS)

    def pause_of(self, response: httpx.Response) -> float | None:
        """Seconds until it is worth asking again; None if the answer is to be read.

        Raises:
            ServiceProblemError, ServiceUnreachableError: see ``errors.checked``.
        """
        pause = self._exchanges.pause_of(response, self._patience)
        if pause is None:
            checked(response)
            self.over = response.status_code == httpx.codes.NO_CONTENT
        return pause

    def pause_after(self, error: httpx.TransportError | None) -> float:
        """Seconds until the next connection, after one that broke or ended early.

        Raises:
            ServiceUnreachableError: patience is at its end.
        """
        return self._exchanges.pause_after(error or httpx.ReadError("the event stream ended early"), self._patience)

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take the next bytes; the events that they complete, of the kinds known here."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            name, _, value = line.removesuffix(b"\r").decode().partition(":")
            value = value.removeprefix(" ")
            if name == "data" and "data" in self._fields:
                self._fields["data"] += f"\n{value}"
            elif name:
                self._fields[name] = value
            elif line in (b"", b"\r"):  # else a comment
                fields, self._fields = self._fields, {}
                event = _event(fields)
                if event is not None:
                    self._patience = self._exchanges.patience()
                    self._number = event.number or self._number
                    ended = isinstance(event.data, JobEvent) and event.data.state in FINISHED
                    self.over = ended or event.kind == "deleted"
                    yield event


def _event(fields: dict[str, str]) -> Event | None:
    kind = fields.get("event")
    number = int(fields["id"]) if "id" in fields else None
    document: Any = json.loads(fields.get("data", "{}"))
    if kind in ("state", "stage", "block"):
        return Event(kind, JobEvent.model_validate(document), number)
    if kind == "progress":
        return Event(kind, JobProgress.model_validate(document), number)
    return Event(kind, None, number) if kind == "deleted" else None

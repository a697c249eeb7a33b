"""A job's event stream: nothing is missed, also by who was away, and waiting costs neither thread nor connection."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI
from httpx import Client
from job_rows import MINUTE, claim
from servers import DATABASES, PAIRS
from sqlalchemy import delete
from sqlalchemy.orm import Session, sessionmaker

import service.api.events
from service.jobs.events import Happening
from service.jobs.records import JobRecord
from service.jobs.repository import Claim, JobRepository
from service.jobs.schemas import JobProgress, Problem
from service.jobs.states import JobState

every_database = pytest.mark.parametrize("storage", DATABASES, indirect=True)
in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

BLOCK = {"method": "aquant", "block": 1, "blocks": 2, "loss": 0.25, "attempt": 1}


@dataclass(frozen=True)
class Event:
    kind: str
    data: dict[str, Any]
    number: int | None


def read(lines: Iterator[str]) -> Iterator[Event]:
    """Events as a browser would see them; comments as such."""
    fields: dict[str, str] = {}
    for line in lines:
        if line.startswith(":"):
            yield Event("comment", {}, None)
        elif line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            if "event" in fields:
                number = int(fields["id"]) if "id" in fields else None
                yield Event(fields["event"], json.loads(fields["data"]), number)
            fields = {}


class Stream:
    def __init__(self, web: Client, job_id: str, after: int | None = None) -> None:
        headers = {} if after is None else {"Last-Event-ID": str(after)}
        self._context = web.stream("GET", f"/jobs/{job_id}/events", headers=headers)
        self.response = self._context.__enter__()
        self._events = read(self.response.iter_lines())

    def next(self, kind: str | None = None) -> Event:
        return next(event for event in self._events if kind in (None, event.kind))

    def rest(self) -> list[Event]:
        return list(self._events)

    def close(self) -> None:
        self._context.__exit__(None, None, None)


def go_on(sessions: sessionmaker[Session], held: Claim, stage: str, *happenings: Happening, **progress: Any) -> None:
    with sessions.begin() as session:
        document = {"loss": None, **progress}
        assert JobRepository(session).renew(held, MINUTE, stage, document, happenings) == JobState.RUNNING


def run(sessions: sessionmaker[Session], job_id: str) -> None:
    """A job's life: a worker that dies, another that finds an error."""
    held = claim(sessions, job_id)
    go_on(sessions, held, "capture", Happening("stage", {"stage": "capture", "attempt": 1}))
    go_on(sessions, held, "reconstruct", Happening("block", BLOCK), block=2, blocks=2, loss=0.5)
    with sessions.begin() as session:
        JobRepository(session).give_back(held, 3, {})
    held = claim(sessions, job_id)
    error = Problem.of_job("worker_lost", "It is gone.", "Try again.").model_dump()
    with sessions.begin() as session:
        JobRepository(session).finish(held, JobState.FAILED, "save", error)


LIFE = ["state queued", "state running", "stage capture", "block 1", "state queued", "state running", "state failed"]


def told(events: list[Event]) -> list[str]:
    names = {"state": "state", "stage": "stage", "block": "block"}
    return [f"{event.kind} {event.data[names[event.kind]]}" for event in events if event.number is not None]


@every_database
def test_a_stream_tells_a_whole_life(web: Client, add_job: Callable[[], str], sessions: sessionmaker[Session]) -> None:
    job_id = add_job()
    with closing(Stream(web, job_id)) as stream:
        assert stream.response.headers["content-type"].startswith("text/event-stream")
        first = stream.next()
        run(sessions, job_id)
        events = [first, *stream.rest()]
    assert told(events) == LIFE
    assert [event.number for event in events if event.number is not None] == [1, 2, 3, 4, 5, 6, 7]
    block = next(event.data for event in events if event.kind == "block")
    assert block | {"at": ""} == BLOCK | {"at": ""}
    assert events[-1].data["error"]["code"] == "worker_lost"
    assert events[-1].data["attempt"] == 2


@every_database
def test_who_was_away_is_told_what_was_missed(
    web: Client, add_job: Callable[[], str], sessions: sessionmaker[Session]
) -> None:
    job_id = add_job()
    run(sessions, job_id)
    for after in range(7):
        with closing(Stream(web, job_id, after)) as stream:
            assert told(stream.rest()) == LIFE[after:]


@in_a_folder
def test_who_knows_the_end_is_not_to_come_again(
    web: Client, add_job: Callable[[], str], sessions: sessionmaker[Session]
) -> None:
    job_id = add_job()
    run(sessions, job_id)
    answer = web.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "7"})
    assert (answer.status_code, answer.content) == (204, b"")
    for wrong in ("x", "-1", str(2**31)):
        assert web.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": wrong}).status_code == 422
    assert web.get("/jobs/none/events").json()["code"] == "job_not_found"


@in_a_folder
def test_more_than_fits_into_one_look(
    web: Client, add_job: Callable[[], str], sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.api.events, "AT_A_TIME", 3)
    job_id = add_job()
    run(sessions, job_id)
    with closing(Stream(web, job_id)) as stream:
        assert told(stream.rest()) == LIFE


@in_a_folder
def test_progress_is_told_as_it_goes(web: Client, add_job: Callable[[], str], sessions: sessionmaker[Session]) -> None:
    job_id = add_job()
    held = claim(sessions, job_id)
    with closing(Stream(web, job_id)) as stream:
        for iteration in (1, 2):
            go_on(sessions, held, "reconstruct", block=1, blocks=2, iteration=iteration, loss=1 / iteration)
            event = stream.next("progress")
            assert event.number is None  # it need not be told again
            assert JobProgress.model_validate(event.data).iteration == iteration


@in_a_folder
def test_a_stream_says_when_its_job_is_deleted(
    web: Client, add_job: Callable[[], str], sessions: sessionmaker[Session]
) -> None:
    job_id = add_job()
    with closing(Stream(web, job_id)) as stream:
        stream.next("state")
        assert web.delete(f"/jobs/{job_id}").status_code == 204
        assert [event.kind for event in stream.rest()] == ["deleted"]
    with sessions.begin() as session:
        session.execute(delete(JobRecord))  # with its events, or the foreign key would refuse


@in_a_folder
def test_an_idle_stream_shows_that_it_is_alive(
    web: Client, add_job: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.api.events, "HEARTBEAT_SECONDS", 0.05)
    with closing(Stream(web, add_job())) as stream:
        for _ in range(3):
            stream.next("comment")


@every_database
def test_waiting_takes_neither_threads_nor_connections(
    web: Client, application: FastAPI, add_job: Callable[[], str], sessions: sessionmaker[Session]
) -> None:
    """Far more clients than the API has threads (40) or connections (15) wait, and it still answers."""
    job_id = add_job()
    tag = web.get(f"/jobs/{job_id}").headers["etag"]
    streams = [Stream(web, job_id) for _ in range(30)]
    answers: list[str] = []

    def poll() -> None:
        with Client(base_url=web.base_url, timeout=60) as client:
            answer = client.get(f"/jobs/{job_id}", headers={"If-None-Match": tag}, params={"wait": 20})
        answers.append(answer.json()["state"])

    pollers = [threading.Thread(target=poll) for _ in range(30)]
    for poller in pollers:
        poller.start()
    for stream in streams:
        stream.next("state")
    assert web.get(f"/jobs/{job_id}").json()["state"] == "queued"
    engine = application.state.parts.sessions.kw["bind"]
    while engine.pool.checkedout() != 0:  # but for the moments in which one looks
        threading.Event().wait(0.01)
    assert answers == []
    claim(sessions, job_id)
    for stream in streams:
        assert stream.next("state").data["state"] == "running"
        stream.close()
    for poller in pollers:
        poller.join()
    assert answers == ["running"] * 30

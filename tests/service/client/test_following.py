"""Following a job: its document, its events, and connections that break meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cutting_proxy import Cut, CuttingProxy
from job_rows import MINUTE, claim
from servers import PAIRS
from sqlalchemy.orm import Session, sessionmaker

from service.client import Event, ServiceProblemError
from service.client.event_stream import EventStream
from service.client.exchanges import Exchanges
from service.jobs.events import Happening
from service.jobs.repository import JobRepository
from service.jobs.schemas import JobEvent, JobProgress
from service.jobs.states import JobState

in_a_folder = pytest.mark.parametrize("storage", PAIRS[:1], indirect=True)

Sessions = sessionmaker[Session]


def begin(sessions: Sessions, job_id: str) -> Callable[[], None]:
    """A worker takes the job and learns a block; what is returned lets it end."""
    held = claim(sessions, job_id)
    happenings = [
        Happening("stage", {"stage": "reconstruct", "attempt": 1}),
        Happening("block", {"method": "aquant", "block": 1, "blocks": 2, "loss": 0.25, "attempt": 1}),
    ]
    with sessions.begin() as session:
        progress = {"block": 2, "blocks": 2, "loss": 0.5}
        JobRepository(session).renew(held, MINUTE, "reconstruct", progress, happenings)

    def end() -> None:
        with sessions.begin() as session:
            JobRepository(session).finish(held, JobState.SUCCEEDED, "save")

    return end


@in_a_folder
def test_a_job_is_watched_to_its_end(client: Any, proxy: CuttingProxy, sessions: Sessions, add_job: Any) -> None:
    job_id = add_job()
    documents = client.watch(job_id)
    assert next(documents).state == "queued"
    end = begin(sessions, job_id)
    running = next(documents)
    assert (running.state, running.progress.block) == ("running", 2)
    proxy.cuts.append(Cut("down", b"GET /jobs"))
    end()
    assert [job.state for job in documents] == ["succeeded"]
    assert proxy.cuts == []
    assert client.wait(job_id).state == "succeeded"


@in_a_folder
def test_who_waits_is_told_that_others_wait_no_longer(
    client: Any, sessions: Sessions, add_job: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing happens to the job itself, so it is told when a request has waited for so long."""
    monkeypatch.setattr("service.client.exchanges.WAIT_SECONDS", 0.5)
    first, second = add_job(), add_job()
    documents = client.watch(second)
    assert next(documents).queue_position == 1
    claim(sessions, first)
    assert next(documents).queue_position == 0


@in_a_folder
def test_watching_ends_in_time(client: Any, add_job: Any) -> None:
    job_id = add_job()
    with pytest.raises(TimeoutError, match=r"still queued after 0\.3 seconds"):
        client.wait(job_id, 0.3)
    seen = client.watch(job_id, 0)
    assert next(seen).state == "queued"  # at least what it is now
    with pytest.raises(TimeoutError):
        next(seen)


@in_a_folder
def test_no_event_is_missed_or_told_twice(client: Any, proxy: CuttingProxy, sessions: Sessions, add_job: Any) -> None:
    job_id = add_job()
    begin(sessions, job_id)()
    whole = list(client.events(job_id))
    told = [(event.kind, event.number) for event in whole if event.number is not None]
    assert told == [("state", 1), ("state", 2), ("stage", 3), ("block", 4), ("state", 5)]
    assert isinstance(whole[-1].data, JobEvent)
    assert whole[-1].data.state == "succeeded"
    proxy.cuts += [Cut("down", b"/events", after) for after in (700, 300, 0)]
    assert [event for event in client.events(job_id) if event.number is not None] == whole
    assert proxy.cuts == []
    assert [event.number for event in client.events(job_id, after=3)] == [4, 5]
    assert list(client.events(job_id, after=5)) == []


@in_a_folder
def test_events_come_as_they_happen(client: Any, sessions: Sessions, add_job: Any) -> None:
    job_id = add_job()
    events = client.events(job_id)
    assert next(events).data.state == "queued"
    end = begin(sessions, job_id)
    assert [next(events).kind for _ in range(3)] == ["state", "stage", "block"]
    progress = next(events)
    assert isinstance(progress.data, JobProgress)
    assert (progress.data.block, progress.number) == (2, None)
    end()
    assert [event.data.state for event in events if event.kind == "state"] == ["succeeded"]


@in_a_folder
def test_events_of_no_job_are_a_problem(client: Any) -> None:
    with pytest.raises(ServiceProblemError) as caught:
        list(client.events("0" * 24))
    assert caught.value.problem.code == "job_not_found"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_a_stream_is_read_however_it_is_cut_up(size: int) -> None:
    text = (
        'retry: 1000\n\n: comment\n\nevent: news\ndata: {"of": "a later version"}\nid: 1\n\n'
        'event:progress\r\ndata: {"block": 1,\r\ndata: "loss": 0.5}\r\n\r\n'
        'event: stage\ndata: {"at": "2026-01-31T12:00:00Z", "attempt": 1, "stage": "\u2028é"}\nid: 7\n\n'
        "event: deleted\ndata: {}\n\nevent: half"
    ).encode()
    stream = EventStream(Exchanges("http://service"), "0" * 24, 0)
    stream.call()
    events = [event for at in range(0, len(text), size) for event in stream.feed(text[at : at + size])]
    assert [(event.kind, event.number) for event in events] == [("progress", None), ("stage", 7), ("deleted", None)]
    assert events[0] == Event("progress", JobProgress(block=1, loss=0.5))
    assert isinstance(events[1].data, JobEvent)
    assert events[1].data.stage == "\u2028é"
    assert stream.over
    assert stream.call().headers["Last-Event-ID"] == "7"


@in_a_folder
def test_lists_and_states(client: Any, web: httpx.Client, add_job: Any) -> None:
    ids = [add_job() for _ in range(3)]
    first = client.list(limit=2)
    rest = client.list(page=first.next)
    assert {job.id for job in first.jobs + rest.jobs} == set(ids)
    assert rest.next is None
    assert client.cancel(ids[0]).state == "cancelled"
    assert [job.id for job in client.list(state=JobState.CANCELLED).jobs] == [ids[0]]
    client.delete(ids[0])
    assert web.get(f"/jobs/{ids[0]}").status_code == 404
    assert client.health().workers_alive == 0

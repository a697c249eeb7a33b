"""Tallies add up, whoever writes them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy.orm import Session, sessionmaker

from service.jobs.tallies import BOUNDS, Tallies


def test_an_observation_falls_into_its_bucket(sessions: sessionmaker[Session]) -> None:
    with sessions.begin() as session:
        for seconds in (0.0, 1.0, 1.1, 86400.0, 86401.0):
            Tallies(session).add("job", seconds, "aquant", "failed")
        Tallies(session).add("job", 7.0, "qdrop", "failed")
    with sessions() as session:
        first, second = sorted(Tallies(session).all(), key=lambda series: series.method)
    assert first.counts == [2, 1, *[0] * (len(BOUNDS) - 3), 1, 1]
    assert (first.count, first.seconds) == (5, 172803.1)
    assert list(first.buckets())[-2:] == [("86400.0", 4), ("+Inf", 5)]
    assert (second.method, second.state, second.count) == ("qdrop", "failed", 1)


def test_writers_at_the_same_time_lose_nothing(sessions: sessionmaker[Session]) -> None:
    def write(_: int) -> None:
        with sessions.begin() as session:
            Tallies(session).add("block", 2.0, "aquant")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(40)))
    with sessions() as session:
        (series,) = Tallies(session).all()
    assert (series.count, series.seconds) == (40, 80.0)


def test_a_row_that_another_process_puts_in_meanwhile_is_used(
    sessions: sessionmaker[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    with sessions.begin() as session:
        Tallies(session).add("retry")
    really, answers = Tallies._increase, iter([False])  # not there yet, says the first look
    monkeypatch.setattr(Tallies, "_increase", lambda *of: next(answers, None) is None and really(*of))
    with sessions.begin() as session:
        Tallies(session).add("retry")
    with sessions() as session:
        (series,) = Tallies(session).all()
    assert series.count == 2


def test_what_is_rolled_back_is_not_counted(sessions: sessionmaker[Session]) -> None:
    with sessions() as session:
        Tallies(session).add("retry")
        session.rollback()
        assert Tallies(session).all() == []

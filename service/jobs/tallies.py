"""Counters and histograms kept in the database, which go on when jobs are deleted and processes end.

They are written by whoever brings the event about, in the same transaction where there is one: the end of a job and
a further attempt by the UPDATE that moves its state, a block by its worker. So each is counted once, no process has
to be asked for its own, and any API process can tell them all.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.jobs.records import TallyRecord
from service.jobs.rows import changed

What = Literal["job", "block", "retry"]

BOUNDS = (1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 43200.0, 86400.0)
"""Upper bounds of the buckets in seconds: blocks take seconds to an hour, jobs minutes to a day."""
ENDLESS = "+Inf"


@dataclass
class Series:
    """One histogram; a counter is one of which only the count is told."""

    what: What
    method: str
    state: str
    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """The number of observations."""
        return sum(self.counts)

    def buckets(self) -> Iterator[tuple[str, int]]:
        """Each upper bound, and how many observations are not above it."""
        return zip([*map(str, BOUNDS), ENDLESS], accumulate(self.counts), strict=True)


class Tallies:
    """The tallies, within one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def add(self, what: What, seconds: float = 0.0, method: str = "", state: str = "") -> None:
        """Count one observation."""
        place = bisect.bisect_left(BOUNDS, seconds)
        key = {
            "what": what,
            "method": method,
            "state": state,
            "bucket": str(BOUNDS[place]) if place < len(BOUNDS) else ENDLESS,
        }
        if self._increase(key, seconds):
            return
        try:
            with self._session.begin_nested():
                self._session.add(TallyRecord(**key, count=1, seconds=seconds))
        except IntegrityError:  # another process was first
            self._increase(key, seconds)

    def all(self) -> list[Series]:
        """Every series there is."""
        found: dict[tuple[str, str, str], Series] = {}
        for row in self._session.scalars(select(TallyRecord)):
            what: What = row.what  # type: ignore[assignment]
            series = found.setdefault((what, row.method, row.state), Series(what, row.method, row.state))
            series.counts[bisect.bisect_left(BOUNDS, float(row.bucket))] += row.count
            series.seconds += row.seconds
        return list(found.values())

    def _increase(self, key: dict[str, str], seconds: float) -> bool:
        more = {"count": TallyRecord.count + 1, "seconds": TallyRecord.seconds + seconds}
        return changed(self._session, update(TallyRecord).filter_by(**key).values(more))

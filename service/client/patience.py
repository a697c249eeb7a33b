"""Whether a request is sent again, and after how long."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx

PATIENCE_SECONDS = 60.0
FIRST_PAUSE_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 8.0

REFUSED_FOR_NOW = frozenset({httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE})
GATEWAY_ALONE = frozenset({httpx.codes.BAD_GATEWAY, httpx.codes.SERVICE_UNAVAILABLE, httpx.codes.GATEWAY_TIMEOUT})
"""What a proxy says while the service behind it starts again."""


class Patience:
    """What one request may wait in all, pauses only; every request that a client sends may be sent twice."""

    def __init__(self, seconds: float = PATIENCE_SECONDS) -> None:
        self._left = seconds
        self._next = FIRST_PAUSE_SECONDS
        self.lost = False
        """Whether an answer was lost, so that what was asked may have been done."""

    def after(self, response: httpx.Response) -> float | None:
        """Seconds until the request is sent again; None if the answer is to be taken."""
        if response.status_code in REFUSED_FOR_NOW and "retry-after" in response.headers:
            asked = _retry_after(response.headers["retry-after"], datetime.now(UTC))
            return None if asked is None else self._take(asked)
        problem = response.headers.get("content-type", "").startswith("application/problem+json")
        return self.after_loss() if response.status_code in GATEWAY_ALONE and not problem else None

    def after_loss(self) -> float | None:
        """The same for a connection that broke: each time twice as long."""
        self.lost = True
        pause, self._next = self._next, min(2 * self._next, LONGEST_PAUSE_SECONDS)
        return self._take(pause)

    def _take(self, pause: float) -> float | None:
        if pause > self._left:
            return None
        self._left -= pause
        return pause


def _retry_after(value: str, now: datetime) -> float | None:
    """Seconds that the field asks for, at least one; None if it cannot be read."""
    if value.strip().isdecimal():
        return max(1.0, float(value))
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return None
    if until.tzinfo is None:  # -0000: UTC, of which nothing more is known
        until = until.replace(tzinfo=UTC)
    return max(1.0, math.ceil((until - now).total_seconds()))

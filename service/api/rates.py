"""How many requests a minute an owner may make, counted at the broker for all API processes together."""

from __future__ import annotations

import logging
import math
import time

from limits import RateLimitItemPerMinute
from limits.errors import StorageError
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import FixedWindowRateLimiter

from service.jobs.errors import RateLimitedError
from service.settings import Settings

log = logging.getLogger(__name__)

BROKER_SECONDS = 0.5
"""How long a request waits for the broker to count it."""
AWAY_SECONDS = 5.0
"""How long a broker that did not answer is not asked again."""


class Rates:
    """Counts requests; while the broker does not answer, each process counts its own, and nobody is kept out."""

    def __init__(self, settings: Settings) -> None:
        assert settings.broker_url is not None  # the queue has seen to it
        self._shared = RedisStorage(
            # redis:// or rediss://; the same protocol, but this client is one that `limits` supports.
            "valkey" + settings.broker_url.removeprefix("redis"),
            wrap_exceptions=True,
            key_prefix=f"{settings.queue_name}:rates",
            socket_timeout=BROKER_SECONDS,
            socket_connect_timeout=BROKER_SECONDS,
        )
        self._at_broker, self._here = FixedWindowRateLimiter(self._shared), FixedWindowRateLimiter(MemoryStorage())
        self._away_until = 0.0
        self._limits = {
            kind: RateLimitItemPerMinute(most, namespace=kind)
            for kind, most in (("reads", settings.reads_per_minute), ("writes", settings.writes_per_minute))
            if most
        }

    def count(self, who: str, *, read: bool) -> None:
        """Count a request of ``who``.

        Raises:
            RateLimitedError: it is one too many in this minute.
        """
        kind = "reads" if read else "writes"
        limit = self._limits.get(kind)
        if limit is None:
            return
        try:
            if time.monotonic() < self._away_until:
                self._count(self._here, limit, who, kind)
            else:
                self._count(self._at_broker, limit, who, kind)
        except StorageError as error:
            log.warning("requests are counted in this process, the broker does not answer: %s", error)
            self._away_until = time.monotonic() + AWAY_SECONDS
            self._count(self._here, limit, who, kind)

    def close(self) -> None:
        """Give the connections back."""
        self._shared.storage.close()

    @staticmethod
    def _count(counter: FixedWindowRateLimiter, limit: RateLimitItemPerMinute, who: str, kind: str) -> None:
        if counter.hit(limit, who):
            return
        reset, _ = counter.get_window_stats(limit, who)
        seconds = max(1, math.ceil(reset - time.time()))
        raise RateLimitedError(
            f"More than {limit.amount} {kind} within a minute.",
            f"Go on in {seconds} seconds, and then slower; to follow a job, ask with ?wait=20 instead of often.",
            limit=limit.amount,
            used=limit.amount,
            retry_after=seconds,
        )

"""Heartbeat of the actors: finds one that no longer answers while they work. Driver."""

import time
from collections.abc import Callable
from typing import Any

import ray

_PERIOD_S = 1.0
_MAX_PINGS = 64
"""Pings that a check sends at most, to the actors in turn: each takes the driver 0.3 ms, a third of its time for 1,000.

With more actors than that, the ping that finds one silent may be sent some seconds later.
"""
_MAX_GAP_S = 2.0
"""If two checks are further apart, the driver itself was busy or the machine asleep: that does not count as silence."""


class Heartbeat:
    """Heartbeat that pings the actors in turn, once a second each if there are few, and measures how long it takes."""

    def __init__(
        self,
        actors: list[Any],
        *,
        limit_s: float,
        stopped_limit_s: float | None = None,
        is_stopped: Callable[[int], bool] = lambda rank: False,
    ) -> None:
        """Set the limits.

        Args:
            actors: One actor per rank.
            limit_s: Time without an answer after which an actor counts as silent; 0 turns the heartbeat off.
            stopped_limit_s: Limit for a rank whose process is known to be stopped rather than busy; None: `limit_s`.
            is_stopped: Tells whether a rank's process is stopped.
        """
        self._actors = actors
        self.limit_s = limit_s
        self._stopped_limit_s = stopped_limit_s or limit_s
        self._is_stopped = is_stopped
        self._pings: dict[Any, int] = {}
        """Rank by pending ping."""
        self._silence_s: dict[int, float] = {}
        """Time without an answer by rank; only of ranks with a pending ping."""
        self._next_rank = 0
        self._checked_at = time.monotonic()

    def find_silent_rank(self) -> tuple[int, float] | None:
        """Return the rank that has been silent for longest with the limit it has passed, or None.

        A call that comes too soon after the last one does nothing.
        """
        now = time.monotonic()
        elapsed_s = now - self._checked_at
        if self.limit_s == 0 or elapsed_s < _PERIOD_S:
            return None
        self._checked_at = now
        pings = list(self._pings)
        answered, _ = ray.wait(pings, num_returns=len(pings), timeout=0) if pings else ([], [])
        for ping in answered:
            # An error counts as an answer: the stream of reports raises it.
            del self._silence_s[self._pings.pop(ping)]
        for rank in self._silence_s:
            self._silence_s[rank] += min(elapsed_s, _MAX_GAP_S)
        self._send_pings()
        for rank in sorted(self._silence_s, key=lambda rank: (-self._silence_s[rank], rank)):
            if self._silence_s[rank] >= self.limit_s:
                return rank, self.limit_s
            if self._silence_s[rank] >= self._stopped_limit_s and self._is_stopped(rank):
                return rank, self._stopped_limit_s
        return None

    def _send_pings(self) -> None:
        """Ping the actors whose turn it is, unless their last ping is still pending."""
        num_actors = len(self._actors)
        for _ in range(min(num_actors, _MAX_PINGS)):
            rank, self._next_rank = self._next_rank, (self._next_rank + 1) % num_actors
            if rank not in self._silence_s:
                self._silence_s[rank] = 0.0
                self._pings[self._actors[rank].ping.remote()] = rank

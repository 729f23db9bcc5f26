"""Heartbeat of the actors: finds one that no longer answers while they work. Driver."""

import time
from collections.abc import Callable
from typing import Any

import ray

_PERIOD_S = 1.0
_MAX_GAP_S = 2.0
"""If two checks are further apart, the driver itself was busy or the machine asleep: that does not count as silence."""


class Heartbeat:
    """Heartbeat that keeps one ping pending on each actor and measures for how long."""

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
        self._silence_s = [0.0] * len(actors)
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
            del self._pings[ping]
        unanswered = set(self._pings.values())
        for rank, actor in enumerate(self._actors):
            if rank in unanswered:
                self._silence_s[rank] += min(elapsed_s, _MAX_GAP_S)
            else:
                self._silence_s[rank] = 0.0
                self._pings[actor.ping.remote()] = rank
        for rank in sorted(range(len(self._actors)), key=lambda rank: -self._silence_s[rank]):
            if self._silence_s[rank] >= self.limit_s:
                return rank, self.limit_s
            if self._silence_s[rank] >= self._stopped_limit_s and self._is_stopped(rank):
                return rank, self._stopped_limit_s
        return None

"""Watch: pings the actors while they work and tells which of them has fallen silent. Driver."""

import time
from collections.abc import Callable
from typing import Any

import ray

_PERIOD_S = 1.0
_MAX_GAP_S = 2.0
"""Longer between two looks, the driver itself was busy, or asleep with the whole machine: that is nobody's silence."""


class Heartbeat:
    """A pending ping of each actor and for how long it has been so."""

    def __init__(
        self,
        actors: list[Any],
        *,
        limit_s: float,
        stopped_limit_s: float | None = None,
        is_stopped: Callable[[int], bool] = lambda rank: False,
    ) -> None:
        """`limit_s`: 0 turns it off. `stopped_limit_s`: for a rank whose process is known to stand still, rather than
        to be busy."""
        self._actors = actors
        self.limit_s = limit_s
        self._stopped_limit_s = stopped_limit_s or limit_s
        self._is_stopped = is_stopped
        self._pings: dict[Any, int] = {}
        self._silence_s = [0.0] * len(actors)
        self._looked_at = time.monotonic()

    def silent_rank(self) -> tuple[int, float] | None:
        """The rank that has been silent for longest, once that is too long, and the limit that it has passed. Does
        nothing if called too soon."""
        now = time.monotonic()
        elapsed_s = now - self._looked_at
        if self.limit_s == 0 or elapsed_s < _PERIOD_S:
            return None
        self._looked_at = now
        pings = list(self._pings)
        answered, _ = ray.wait(pings, num_returns=len(pings), timeout=0) if pings else ([], [])
        for ping in answered:
            # With an error too: a death is told by the stream of reports.
            del self._pings[ping]
        waiting = set(self._pings.values())
        for rank, actor in enumerate(self._actors):
            if rank in waiting:
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

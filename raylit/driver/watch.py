"""Watch: pings the actors while they work and tells which of them has fallen silent. Driver."""

import time
from typing import Any

import ray

_PERIOD_S = 1.0
_MAX_GAP_S = 2.0
"""Longer between two looks, the driver itself was busy, or asleep with the whole machine: that is nobody's silence."""


class Watch:
    """A pending ping of each actor and for how long it has been so."""

    def __init__(self, actors: list[Any], *, limit_s: float) -> None:
        """`limit_s`: 0 turns it off."""
        self._actors = actors
        self.limit_s = limit_s
        self._pings: dict[Any, int] = {}
        self._silence_s = [0.0] * len(actors)
        self._looked_at = time.monotonic()

    def silent_rank(self) -> int | None:
        """The rank that has been silent for longest, once that is too long. Does nothing if called too soon."""
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
        longest_s = max(self._silence_s)
        return self._silence_s.index(longest_s) if longest_s >= self.limit_s else None

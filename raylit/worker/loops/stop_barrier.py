"""Brake: ends a loop at the same step on every rank, at no cost to the steps before it. Worker."""

import math
import threading


class StopBarrier:
    """Held from another thread, the loop waits at its next border until it is told how far to go.

    No rank passes the border that it reports when it is held, so the furthest of these is one that every rank can still
    stop at. The loop itself only compares two numbers.
    """

    def __init__(self) -> None:
        self.num_done = 0
        """Steps, or evaluation batches, of the command under way. Written by the loop."""
        self.limit = math.inf
        self._is_released = threading.Event()
        self._is_released.set()

    @property
    def is_on(self) -> bool:
        return self.limit != math.inf

    def reset(self) -> None:
        """Before a command starts."""
        self.num_done, self.limit = 0, math.inf

    def hold(self) -> int:
        """Have the loop wait; the border that it will not pass."""
        self._is_released.clear()
        self.limit = -1
        return self.num_done + 1  # the step that has begun before the limit was set

    def release(self, limit: int) -> None:
        self.limit = limit
        self._is_released.set()

    def may_continue(self) -> bool:
        """Asked by the loop at a border where `num_done` has reached the limit; waits while it is held."""
        self._is_released.wait()
        return self.num_done < self.limit

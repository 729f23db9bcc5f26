"""Stop barrier: ends a loop at the same step on every rank, at no cost to the steps before."""

import math
import threading


class StopBarrier:
    """Barrier that another thread arms and at which the loop waits between two steps for its limit.

    No rank starts a step beyond the one that it returns from `hold`, so the furthest of these is a step at which every
    rank can still stop. Until then the loop only compares two numbers.
    """

    def __init__(self) -> None:
        self.num_done = 0
        """Optimizer steps, or evaluation batches, of the current command. Written by the loop."""
        self.limit = math.inf
        self._is_released = threading.Event()
        self._is_released.set()

    @property
    def is_on(self) -> bool:
        """True once the barrier has been armed in the current command."""
        return self.limit != math.inf

    def reset(self) -> None:
        """Disarm the barrier; called before a command starts."""
        self.num_done, self.limit = 0, math.inf

    def hold(self) -> int:
        """Arm the barrier and return the number of steps that this rank will not exceed while it waits."""
        self._is_released.clear()
        self.limit = -1
        return self.num_done + 1  # a step may have begun before the limit was set

    def release(self, limit: int) -> None:
        """Let the loop continue up to `limit` steps."""
        self.limit = limit
        self._is_released.set()

    def may_continue(self) -> bool:
        """Wait while the barrier is armed, then return whether the loop may run another step.

        The loop calls it once `num_done` has reached `limit`.
        """
        self._is_released.wait()
        return self.num_done < self.limit

"""Clock of the interval between two logging steps, whose readings travel with the interval's metrics. Worker."""

from collections.abc import Sequence
from time import perf_counter

from raylit.protocol.messages import Measured, RankTimes


class IntervalClock:
    """Clock of one rank: steps add to it in passing, and it is read at logging steps only.

    In a step of data parallelism the ranks wait for each other in the backward pass, inside of which the gradients are
    reduced. All times are those of the host, which on a GPU launches kernels and does not wait for them.
    """

    def __init__(self) -> None:
        self.backward_s = 0.0
        """Seconds of backward passes in this interval; written by automatic optimization."""
        self._began_at = 0.0
        self._data_wait_s = 0.0

    def restart(self, *, data_wait_s: float) -> None:
        """Begin an interval at the command's data wait so far."""
        self.backward_s = 0.0
        self._data_wait_s = data_wait_s
        self._began_at = perf_counter()

    def read(self, *, data_wait_s: float) -> list[float]:
        """Return this rank's numbers for `build_report`."""
        return [perf_counter() - self._began_at, data_wait_s - self._data_wait_s, self.backward_s]

    @staticmethod
    def build_report(rows: Sequence[Sequence[float]]) -> Measured:
        """Return the report of all ranks' numbers, one row for each rank."""
        return Measured(
            ranks=tuple(
                RankTimes(elapsed_s=elapsed_s, data_wait_s=data_wait_s, backward_s=backward_s)
                for elapsed_s, data_wait_s, backward_s in rows
            )
        )

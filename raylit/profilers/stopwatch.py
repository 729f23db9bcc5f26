"""Stopwatch and PeakMemory: the times of actions, and a process's peak memory. Driver and workers."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TypeVar

from raylit.accelerators import Accelerator
from raylit.protocol.messages import Action

_Item = TypeVar("_Item")
_END = object()


class Stopwatch:
    """Host time of one thread by action. An action inside another one takes its time from that one."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self._clock = clock
        self._totals: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._under_way: list[str] = []
        self._begun_s = self._last_s = clock()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stopwatch was created."""
        return self._clock() - self._begun_s

    def start(self, name: str) -> None:
        """Begin an action."""
        self._account()
        self._under_way.append(name)

    def stop(self, name: str) -> None:
        """End an action and count one call.

        Raises:
            ValueError: if it has not been started.
        """
        if name not in self._under_way:
            raise ValueError(f"Stopping {name!r}, which was never started")
        self._account()
        position = len(self._under_way) - 1 - self._under_way[::-1].index(name)
        del self._under_way[position]
        self._counts[name] = self._counts.get(name, 0) + 1

    def actions(self) -> tuple[Action, ...]:
        """Return the actions in the order in which they first took time, unfinished ones up to now."""
        self._account()
        return tuple(
            Action(name=name, num_calls=self._counts.get(name, 0), total_s=total)
            for name, total in self._totals.items()
        )

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the block as an action."""
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def time_items(self, name: str, items: Iterator[_Item]) -> Iterator[_Item]:
        """Yield the items, and measure the time of getting each."""
        while True:
            with self.measure(name):
                item = next(items, _END)
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def _account(self) -> None:
        now_s = self._clock()
        if self._under_way:
            name = self._under_way[-1]
            self._totals[name] = self._totals.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s


class PeakMemory:
    """Peak memory of this process, and of the device's allocator. Data loaders' processes are not included."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        accelerator.reset_peak_memory()
        # If the kernel refuses, the peak is that since the process's start.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> tuple[tuple[str, int], ...]:
        """Return names of kinds of memory with their peaks in bytes."""
        peaks = [("resident", _read_peak_resident_bytes())]
        if (num_bytes := self._accelerator.peak_memory_bytes()) is not None:
            peaks.append((f"on {self._accelerator.device()}", num_bytes))
        return tuple(peaks)


def _read_peak_resident_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

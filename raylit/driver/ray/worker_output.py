"""Output of the workers, printed in the driver once for ranks that print the same. Driver."""

import sys
import time
from collections import deque
from dataclasses import dataclass

from raylit.protocol.messages import Printed

_GATHER_S = 0.25
"""Ranks that print the same line within this time are printed together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    stream: str
    text: str
    arrived_at: float


class WorkerOutput:
    """Queue of the lines of all ranks, in each rank's order; a single worker's lines are printed at once."""

    def __init__(self, *, num_workers: int) -> None:
        self._queues: list[deque[_Line]] = [deque() for _ in range(num_workers)]

    def add(self, rank: int, report: Printed) -> None:
        now = time.monotonic()
        self._queues[rank].extend(_Line(stream=stream, text=text, arrived_at=now) for stream, text in report.lines)
        if len(self._queues) == 1:
            self.print_due()

    def print_due(self, *, is_end: bool = False) -> None:
        """Print the lines that all ranks have printed, or that have waited long enough; at the end all of them."""
        for name, text in self._take_due(is_end=is_end or len(self._queues) == 1):
            # Looked up each time: a progress bar replaces these streams in order to stay below the output.
            stream = sys.stdout if name == "stdout" else sys.stderr
            stream.write(text + "\n")
            stream.flush()

    def _take_due(self, *, is_end: bool) -> list[tuple[str, str]]:
        due = []
        while heads := [(queue[0].arrived_at, rank) for rank, queue in enumerate(self._queues) if queue]:
            arrived_at, first = min(heads)
            line = self._queues[first][0]
            equal_lines = [self._find_equal(rank, line) for rank in range(len(self._queues))]
            ranks = [rank for rank, equal in enumerate(equal_lines) if equal is not None]
            if len(ranks) < len(equal_lines) and not is_end and time.monotonic() - arrived_at < _GATHER_S:
                break
            for rank, equal in enumerate(equal_lines):
                if equal is not None:
                    self._queues[rank].remove(equal)
            due.append((line.stream, self._format_ranks(ranks) + line.text))
        return due

    def _find_equal(self, rank: int, line: _Line) -> _Line | None:
        return next((it for it in self._queues[rank] if (it.stream, it.text) == (line.stream, line.text)), None)

    def _format_ranks(self, ranks: list[int]) -> str:
        if len(self._queues) == 1:
            return ""
        if len(ranks) == len(self._queues):
            return "[all ranks] "
        return f"[{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}] "

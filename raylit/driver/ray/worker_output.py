"""Printouts: what the workers print, shown in the driver once, with the ranks it comes from. Driver."""

import sys
import time
from collections import deque
from dataclasses import dataclass

from raylit.protocol.messages import Printed

_HOLD_S = 0.25
"""Ranks that print the same line within this time are shown together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    stream: str
    text: str
    came_at: float


class WorkerOutput:
    """Lines of all ranks, each rank's in its order. A single worker's go straight through."""

    def __init__(self, *, num_workers: int) -> None:
        self._waiting: list[deque[_Line]] = [deque() for _ in range(num_workers)]

    def take_in(self, rank: int, printed: Printed) -> None:
        now = time.monotonic()
        self._waiting[rank].extend(_Line(stream=stream, text=text, came_at=now) for stream, text in printed.lines)
        self.show_due()

    def show_due(self, *, is_end: bool = False) -> None:
        """Show what all ranks have printed or what has waited long enough; at the end all of it."""
        for name, text in self._due(is_end=is_end or len(self._waiting) == 1):
            # Looked up each time: a progress bar puts its own in place of these, to stay below.
            stream = sys.stdout if name == "stdout" else sys.stderr
            stream.write(text + "\n")
            stream.flush()

    def _due(self, *, is_end: bool) -> list[tuple[str, str]]:
        shown = []
        while heads := [(queue[0].came_at, rank) for rank, queue in enumerate(self._waiting) if queue]:
            came_at, first = min(heads)
            line = self._waiting[first][0]
            twins = [self._twin(rank, line) for rank in range(len(self._waiting))]
            ranks = [rank for rank, twin in enumerate(twins) if twin is not None]
            if len(ranks) < len(twins) and not is_end and time.monotonic() - came_at < _HOLD_S:
                break
            for rank, twin in enumerate(twins):
                if twin is not None:
                    self._waiting[rank].remove(twin)
            shown.append((line.stream, self._label(ranks) + line.text))
        return shown

    def _twin(self, rank: int, line: _Line) -> _Line | None:
        return next((it for it in self._waiting[rank] if (it.stream, it.text) == (line.stream, line.text)), None)

    def _label(self, ranks: list[int]) -> str:
        if len(self._waiting) == 1:
            return ""
        if len(ranks) == len(self._waiting):
            return "[all ranks] "
        return f"[{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}] "

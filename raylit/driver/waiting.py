"""Waiting: a wait with an end, and a line now and then that says what for. Driver."""

import sys
import time

_FIRST_LINE_S = 2.0
_BETWEEN_LINES_S = 10.0
_SLICE_S = 0.5


class Waiting:
    def __init__(self, *, timeout_s: float, first_line_s: float = _FIRST_LINE_S) -> None:
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._since = time.strftime("%H:%M:%S")
        self._next_line_s = first_line_s

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def slice_s(self) -> float:
        """How long to wait before looking around."""
        return max(0.01, min(_SLICE_S, self._timeout_s - self.waited_s))

    @property
    def is_over(self) -> bool:
        return self.waited_s >= self._timeout_s

    @property
    def is_line_due(self) -> bool:
        return self.waited_s >= self._next_line_s

    def say(self, missing: str) -> None:
        """A whole line on stderr, where a progress bar makes room for it."""
        self._next_line_s = self.waited_s + _BETWEEN_LINES_S
        text = f"raylit: waiting since {self._since} ({self.waited_s:.0f} s) for {missing}\n"
        sys.stderr.write(text)
        sys.stderr.flush()

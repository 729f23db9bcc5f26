"""LineStream: a terminal on which bars stand, for everybody who prints meanwhile. Driver only."""

import contextlib
import sys
from collections.abc import Iterator
from threading import RLock
from typing import Any, TextIO, cast


class LineStream:
    """Passes whole lines on to a terminal and moves the bars out of their way. The rest of a line waits for its end.

    Every thread may write: Ray brings what workers print in one of its own.
    """

    def __init__(self, terminal: TextIO, bars: TextIO) -> None:
        self._terminal = terminal
        self._bars = bars
        self._rest = ""
        self._lock = RLock()

    def write(self, text: str) -> int:
        with self._lock:
            lines, newline, self._rest = (self._rest + text).rpartition("\n")
            self._print(lines + newline)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def finish(self) -> None:
        """Write a line without an end as it is."""
        with self._lock:
            rest, self._rest = self._rest, ""
            self._print(rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)

    def _print(self, text: str) -> None:
        from tqdm import tqdm  # whoever opened a bar has imported it

        if text:
            with tqdm.external_write_mode(file=self._bars):
                self._terminal.write(text)
                self._terminal.flush()


@contextlib.contextmanager
def status_line(text: str) -> Iterator[None]:
    """A line at the bottom of the terminal, for as long as something takes; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    with lines_above_bars() as stream:
        bar = tqdm(bar_format=text, file=stream, leave=False, dynamic_ncols=True)
        try:
            yield
        finally:
            bar.close()


@contextlib.contextmanager
def lines_above_bars() -> Iterator[TextIO]:
    """The stream for bars, stderr; what is printed to a terminal meanwhile goes above them."""
    with contextlib.ExitStack() as stack:
        bars = sys.stderr
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            if stream.isatty():
                lines = LineStream(stream, bars)
                stack.callback(lines.finish)
                stack.enter_context(redirect(cast(TextIO, lines)))
        yield bars

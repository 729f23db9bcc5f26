"""Lines that a worker process prints, captured for the driver."""

import contextlib
import io
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal, TextIO, cast

from raylit.protocol.messages import Printed

_MAX_LINES = 2_000
"""Lines kept between two fetches, ten a second: a print never waits for the driver; further lines are only counted."""
_MAX_LINE_CHARS = 100_000

StreamName = Literal["stdout", "stderr"]


class StdoutCapture:
    """Replaces sys.stdout and sys.stderr from its creation to the end of the process.

    Output of C code, and of processes that are not forks of this one, is not captured.
    """

    def __init__(self, *, on_lines: Callable[[], None]) -> None:
        """Replace the streams.

        Args:
            on_lines: Called in the thread that prints when there is something to `take`.
        """
        self._on_lines = on_lines
        self._lines: list[tuple[StreamName, str]] = []
        self._num_dropped = 0
        # Reentrant: a destructor may print during another print.
        self._lock = threading.RLock()
        self._streams = (_Stream(sys.stdout, "stdout", self._put), _Stream(sys.stderr, "stderr", self._put))
        sys.stdout, sys.stderr = cast(tuple[TextIO, TextIO], self._streams)

    def take(self) -> Printed | None:
        """Return the lines since the last call, or None."""
        with self._lock:
            lines, self._lines = self._lines, []
            num_dropped, self._num_dropped = self._num_dropped, 0
        if num_dropped:
            lines.append(("stderr", f"[{num_dropped} more lines were printed too fast to be shown]"))
        return Printed(lines=tuple(lines)) if lines else None

    def finish_lines(self) -> None:
        """End the lines that have no end yet."""
        for stream in self._streams:
            stream.finish()

    def _put(self, name: StreamName, lines: list[str]) -> None:
        with self._lock:
            is_first = not self._lines
            space = _MAX_LINES - len(self._lines)
            self._lines += [(name, line[:_MAX_LINE_CHARS]) for line in lines[:space]]
            self._num_dropped += max(0, len(lines) - space)
        if is_first:
            self._on_lines()


class _Stream(io.TextIOBase):
    """Replacement of one stream: captures text and delegates everything else to the original."""

    def __init__(self, original: TextIO, name: StreamName, put: Callable[[StreamName, list[str]], None]) -> None:
        self._original = original
        self._name = name
        self._put = put
        self._rest = ""
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._fork_pipe = _Pipe(lambda line: put(name, [line]))

    def write(self, text: str) -> int:
        with self._lock:
            *lines, rest = (self._rest + text).split("\n")
            # A progress bar redraws its line after a carriage return: only its last text counts.
            self._rest = rest.rpartition("\r")[2] if len(rest) < _MAX_LINE_CHARS else ""
            lines = [line.rstrip("\r").rpartition("\r")[2] for line in lines]
            if len(rest) >= _MAX_LINE_CHARS:
                lines.append(rest)
        if lines and os.getpid() == self._pid:
            self._put(self._name, lines)
        elif lines:
            self._fork_pipe.write("".join(f"{line}\n" for line in lines))
        return len(text)

    def writable(self) -> bool:
        return True

    def finish(self) -> None:
        if self._rest:
            self.write("\n")

    def fileno(self) -> int:
        return self._original.fileno()

    def flush(self) -> None: ...

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    @property
    def buffer(self) -> Any:
        return self._original.buffer


class _Pipe:
    """Pipe from forks of this process, such as a DataLoader's workers, where its threads and event loop do not run."""

    def __init__(self, put: Callable[[str], None]) -> None:
        self._put = put
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)  # a full pipe loses lines but never blocks data loading
        threading.Thread(target=self._read, args=[reader], name="asyncio_raylit_output", daemon=True).start()

    def write(self, text: str) -> None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._writer, text.encode("utf-8", "replace"))

    def _read(self, reader: int) -> None:
        with open(reader, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._put(line.rstrip("\n"))

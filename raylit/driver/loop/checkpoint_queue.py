"""Checkpoint saves: one at a time, in a thread of the driver, while training continues. Driver."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from raylit.callbacks.base import DriverCallback, Run
from raylit.checkpoint import format
from raylit.checkpoint.index import Publication
from raylit.driver.loop.log_writer import FlushResult, LogWriter
from raylit.errors import CheckpointError
from raylit.protocol.messages import Report, Save, Saved

_RETRY_AFTER_S = (0.5, 2.0)
"""Pauses before a retry: a store may be unreachable for a moment, or another program may free space on the disk."""
_FLUSH_TIMEOUT_S = 10.0
_WAKE_S = 0.2
"""Polling interval of a wait for the thread, short enough to handle a signal."""
_LASTING_ERRORS = (NotADirectoryError, IsADirectoryError, PermissionError)


class CheckpointWriter(Protocol):
    """Writer of a pending checkpoint; its methods are called in the save thread."""

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """Set what is missing before the first `write`, and again before each further one.

        Args:
            others: The state that each rank other than rank 0 has of its own.
            callbacks: The states of the driver's callbacks.
        """
        ...

    def write(self, path: str) -> None:
        """Write the checkpoint to a path or a URL, completely or not at all.

        Raises:
            CheckpointError: The write failed.
            CheckpointWriterLost: The write failed and a retry cannot succeed.
        """
        ...

    def release(self) -> None:
        """Free the pending checkpoint; no further call follows."""
        ...


class FlushLogsFirst:
    """CheckpointWriter that first waits until the loggers have saved what was logged before the checkpoint.

    It stores the loggers' positions in the checkpoint. After `_FLUSH_TIMEOUT_S` it writes without them.
    """

    def __init__(self, writer: CheckpointWriter, flush_result: FlushResult) -> None:
        self._writer = writer
        self._flush_result = flush_result

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        positions = self._flush_result.wait(_FLUSH_TIMEOUT_S)
        self._writer.complete(
            others, {**callbacks, format.LOGS: format.to_plain_values(positions, "positions of the loggers")}
        )

    def write(self, path: str) -> None:
        self._writer.write(path)

    def release(self) -> None:
        self._writer.release()


class CheckpointWriterLost(CheckpointError):
    """Error: the process with the pending checkpoint is gone; the run's own error says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRequest:
    """Request for one checkpoint file."""

    path: str
    callback: DriverCallback | None
    publication: Publication | None
    is_weights_only: bool
    callbacks: dict[str, Any]
    """The states of the driver's callbacks, in plain values."""

    def command(self, *, is_copying: bool, seed: int) -> Save:
        """Return the command by which the workers take a snapshot; `seed` is that of the sample order."""
        driver_part = {} if self.is_weights_only else {"callbacks": self.callbacks, "seed": seed}
        return Save(is_weights_only=self.is_weights_only, is_copying=is_copying, driver_part=driver_part)

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the files that this request creates."""
        return (self.path,) if self.publication is None else (self.path, self.publication.last)


class CheckpointQueue:
    """Queue of the run's saves; call its methods in the coordinator's thread only.

    A thread writes the pending checkpoint of the workers, once for each request made at the same step, and before the
    workers may start the next save.
    """

    def __init__(self, run: Run, log_writer: LogWriter) -> None:
        self._run = run
        self._log_writer = log_writer
        self._thread: _SaveThread | None = None
        self._is_current = False
        """True while the workers have run no command since the pending checkpoint was created."""
        self._newest = ""
        self._last_error: CheckpointError | None = None

    def start(self, request: SaveRequest, writer: CheckpointWriter, reports: Iterable[Report]) -> None:
        """Start to write what the ranks have reported as saved; the previous save must have finished."""
        assert self._thread is None
        saved = sorted((it for it in reports if isinstance(it, Saved) and it.rank > 0), key=lambda it: it.rank)
        others = [report.of_rank for report in saved]
        self._thread = _SaveThread(request, writer, others)
        self._is_current = True
        self._thread.start()

    def try_join(self, request: SaveRequest) -> bool:
        """Add the request to the save under way if the workers have run nothing since; return True if added."""
        thread = self._thread
        is_same = self._is_current and thread is not None and thread.is_weights_only == request.is_weights_only
        return is_same and thread is not None and thread.try_add(request)

    def note_command(self) -> None:
        """Note that the workers run another command."""
        self._is_current = False

    @property
    def is_under_way(self) -> bool:
        return self._thread is not None

    @property
    def is_earlier_under_way(self) -> bool:
        """True if a save from an earlier step is under way."""
        return self._thread is not None and not self._is_current

    def is_writing(self, path: str) -> bool:
        """Return True if a save under way creates this file, which may not exist yet."""
        return self._thread is not None and any(path in request.paths for request in self._thread.requests)

    def finish(self) -> None:
        """Wait for the save under way and report its end."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_WAKE_S)
        self.settle()

    def settle(self) -> None:
        """Report the saves that have ended: first to the callback that requested each one, then to the loggers."""
        thread = self._thread
        if thread is None:
            return
        if not thread.is_alive():
            self._thread = None
        while thread.finished:
            request, error = thread.finished.popleft()
            if isinstance(error, CheckpointError):
                self.note_failed(request.callback, request.path, error)
                continue
            if error is not None:
                raise error
            self._newest, self._last_error = request.path, None
            if request.callback is not None:
                request.callback.on_save_end(self._run, request.path, None)
                self._log_writer.after_save_checkpoint(request.callback)

    def note_failed(self, callback: DriverCallback | None, path: str, error: CheckpointError) -> None:
        """Report a save that has failed or could not start; warn once until a save succeeds again."""
        if callback is not None:
            callback.on_save_end(self._run, path, error)
        if self._last_error is None and not isinstance(error, CheckpointWriterLost):
            before = f"the newest checkpoint is {self._newest}" if self._newest else "there is no checkpoint yet"
            warnings.warn(f"{error}. Training goes on and the next save is tried again; {before}", stacklevel=2)
        self._last_error = error

    def raise_last(self) -> None:
        """Raise CheckpointError if the run's last save has failed."""
        if self._last_error is not None:
            raise CheckpointError(
                f"the last save of the run has failed: {self._last_error}. The training has ended well, and the model "
                "has its weights: trainer.save_checkpoint(path) writes them elsewhere"
            ) from self._last_error


class _SaveThread(threading.Thread):
    def __init__(self, request: SaveRequest, writer: CheckpointWriter, others: list[dict[str, Any]]) -> None:
        super().__init__(name="raylit-save", daemon=True)
        self.is_weights_only = request.is_weights_only
        self.requests = [request]
        self.finished: deque[tuple[SaveRequest, BaseException | None]] = deque()
        """Requests that have ended, each with its error; `CheckpointQueue.settle` removes them."""
        self._num_finished = 0
        self._writer = writer
        self._others = others
        self._lock = threading.Lock()
        self._is_closed = False

    def try_add(self, request: SaveRequest) -> bool:
        """Add a request; return False if the pending checkpoint has been released already."""
        with self._lock:
            if not self._is_closed:
                self.requests.append(request)
            return not self._is_closed

    def run(self) -> None:
        try:
            while (request := self._next()) is not None:
                self.finished.append((request, self._carry_out(request)))
                self._num_finished += 1
        finally:
            self._writer.release()

    def _next(self) -> SaveRequest | None:
        with self._lock:
            self._is_closed = self._num_finished == len(self.requests)
            return None if self._is_closed else self.requests[self._num_finished]

    def _carry_out(self, request: SaveRequest) -> BaseException | None:
        steps: list[Callable[[SaveRequest], None]] = [self._write, self._publish]
        for pause_s in (*_RETRY_AFTER_S, None):
            if (error := _run_steps(steps, request)) is None or pause_s is None or not _can_retry(error):
                break
            time.sleep(pause_s)
        return error

    def _write(self, request: SaveRequest) -> None:
        self._writer.complete(self._others, request.callbacks)
        self._writer.write(request.path)

    def _publish(self, request: SaveRequest) -> None:
        if request.publication is not None:
            request.publication.carry_out()


def _run_steps(steps: list[Callable[[SaveRequest], None]], request: SaveRequest) -> BaseException | None:
    """Run the remaining steps and return the first error; the coordinator's thread reports or raises it."""
    try:
        while steps:
            steps[0](request)
            del steps[0]
    except BaseException as error:
        return error
    return None


def _can_retry(error: BaseException) -> bool:
    is_lasting = isinstance(error, CheckpointWriterLost) or isinstance(error.__cause__, _LASTING_ERRORS)
    return isinstance(error, CheckpointError) and not is_lasting

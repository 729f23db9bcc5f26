"""Saves: checkpoints on their way into files, one at a time, beside the training. Driver."""

import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from raylit.callbacks.base import DriverCallback, Run
from raylit.checkpoint import format
from raylit.checkpoint.pending import Publication
from raylit.driver.loop.log_writer import FlushResult, LogWriter
from raylit.errors import CheckpointError
from raylit.protocol.messages import Report, Save, Saved

_RETRY_AFTER_S = (0.5, 2.0)
"""A store may be out of reach for a moment, or another program make room on the disk."""
_FLUSH_TIMEOUT_S = 10.0
_WAKE_S = 0.2
"""For whoever waits to see a signal."""
_NEVER_BETTER = (NotADirectoryError, IsADirectoryError, PermissionError)


class CheckpointHolder(Protocol):
    """Of a checkpoint that waits to be written. Called in a thread of its own."""

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        """First, and again before another `write`: what each rank but the first has alone, and the states of the
        driver's callbacks."""
        ...

    def write(self, path: str) -> None:
        """To a path or a URL, whole or not at all. CheckpointError: that did not work. HolderLost: nor will it."""
        ...

    def release(self) -> None:
        """It is not asked for again."""
        ...


class FlushLogsFirst:
    """A Holder whose checkpoint is written once the loggers have saved what came before it; it then says where they
    stood. A logger that takes too long is not waited for."""

    def __init__(self, holder: CheckpointHolder, flushed: FlushResult) -> None:
        self._holder = holder
        self._flushed = flushed

    def complete(self, others: list[dict[str, Any]], callbacks: dict[str, Any]) -> None:
        positions = self._flushed.wait(_FLUSH_TIMEOUT_S)
        self._holder.complete(
            others, {**callbacks, format.LOGS: format.to_plain_values(positions, "positions of the loggers")}
        )

    def write(self, path: str) -> None:
        self._holder.write(path)

    def release(self) -> None:
        self._holder.release()


class HolderLost(CheckpointError):
    """The process that held the checkpoint has gone; the run's own error says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveRequest:
    """What has been asked for."""

    path: str
    by: DriverCallback | None
    then: Publication | None
    is_weights_only: bool
    callbacks: dict[str, Any]
    """The states of the driver's callbacks, in plain values."""

    def command(self, *, is_copying: bool, seed: int) -> Save:
        """For the workers to take the state. `seed`: of the order of samples."""
        driver_part = {} if self.is_weights_only else {"callbacks": self.callbacks, "seed": seed}
        return Save(is_weights_only=self.is_weights_only, is_copying=is_copying, driver_part=driver_part)

    @property
    def paths(self) -> tuple[str, ...]:
        """Of the files that it makes."""
        return (self.path,) if self.then is None else (self.path, self.then.last)


class CheckpointQueue:
    """All methods are for the coordinator's own thread. What is held in the workers is written in another one: for
    everybody who asks at the same moment, and before the workers may go on to the next save."""

    def __init__(self, run: Run, log_writer: LogWriter) -> None:
        self._run = run
        self._log_writer = log_writer
        self._thread: _SaveThread | None = None
        self._is_of_now = False
        """The workers have done nothing since what the thread writes was taken."""
        self._newest = ""
        self._last_error: CheckpointError | None = None

    def start(self, order: SaveRequest, holder: CheckpointHolder, reports: Iterable[Report]) -> None:
        """Begin to write what the reports' ranks have saved; the one before it has been waited for."""
        assert self._thread is None
        saved = sorted((it for it in reports if isinstance(it, Saved) and it.rank > 0), key=lambda it: it.rank)
        others = [report.of_rank for report in saved]
        self._thread = _SaveThread(order, holder, others)
        self._is_of_now = True
        self._thread.start()

    def is_joined_by(self, order: SaveRequest) -> bool:
        """It is written, too, from what is held for one before it: the workers stand where they stood."""
        thread = self._thread
        is_same = self._is_of_now and thread is not None and thread.is_weights_only == order.is_weights_only
        return is_same and thread is not None and thread.is_taking(order)

    def note_command(self) -> None:
        """The workers go on."""
        self._is_of_now = False

    @property
    def is_under_way(self) -> bool:
        return self._thread is not None

    @property
    def is_earlier_under_way(self) -> bool:
        """One of another moment."""
        return self._thread is not None and not self._is_of_now

    def is_making(self, path: str) -> bool:
        """A file that may not be there yet."""
        return self._thread is not None and any(path in order.paths for order in self._thread.orders)

    def finish(self) -> None:
        """Wait for the one under way, and tell of its end."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_WAKE_S)
        self.settle()

    def settle(self) -> None:
        """Tell of the end of those that have ended: whoever has asked for it, then the loggers."""
        thread = self._thread
        if thread is None:
            return
        if not thread.is_alive():
            self._thread = None
        while thread.ended:
            order, error = thread.ended.popleft()
            if isinstance(error, CheckpointError):
                self.note_failed(order.by, order.path, error)
                continue
            if error is not None:
                raise error
            self._newest, self._last_error = order.path, None
            if order.by is not None:
                order.by.on_save_end(self._run, order.path, None)
                self._log_writer.after_save_checkpoint(order.by)

    def note_failed(self, by: DriverCallback | None, path: str, error: CheckpointError) -> None:
        """Tell of one that has failed, or could not even begin; the warning once until one works again."""
        if by is not None:
            by.on_save_end(self._run, path, error)
        if self._last_error is None and not isinstance(error, HolderLost):
            before = f"the newest checkpoint is {self._newest}" if self._newest else "there is no checkpoint yet"
            warnings.warn(f"{error}. Training goes on and the next save is tried again; {before}", stacklevel=2)
        self._last_error = error

    def raise_last(self) -> None:
        """CheckpointError: the run has ended well, but its last save has not."""
        if self._last_error is not None:
            raise CheckpointError(
                f"the last save of the run has failed: {self._last_error}. The training has ended well, and the model "
                "has its weights: trainer.save_checkpoint(path) writes them elsewhere"
            ) from self._last_error


class _SaveThread(threading.Thread):
    def __init__(self, order: SaveRequest, holder: CheckpointHolder, others: list[dict[str, Any]]) -> None:
        super().__init__(name="raylit-save", daemon=True)
        self.is_weights_only = order.is_weights_only
        self.orders = [order]
        self.ended: deque[tuple[SaveRequest, BaseException | None]] = deque()
        """With what has gone wrong; whoever tells of them takes them out."""
        self._num_ended = 0
        self._holder = holder
        self._others = others
        self._lock = threading.Lock()
        self._is_closed = False

    def is_taking(self, order: SaveRequest) -> bool:
        """False: it has let go of what it has written the others from."""
        with self._lock:
            if not self._is_closed:
                self.orders.append(order)
            return not self._is_closed

    def run(self) -> None:
        try:
            while (order := self._next()) is not None:
                self.ended.append((order, self._carried_out(order)))
                self._num_ended += 1
        finally:
            self._holder.release()

    def _next(self) -> SaveRequest | None:
        with self._lock:
            self._is_closed = self._num_ended == len(self.orders)
            return None if self._is_closed else self.orders[self._num_ended]

    def _carried_out(self, order: SaveRequest) -> BaseException | None:
        steps: list[Callable[[SaveRequest], None]] = [self._write, self._publish]
        for pause_s in (*_RETRY_AFTER_S, None):
            if (error := _error_of(steps, order)) is None or pause_s is None or not _may_get_better(error):
                break
            time.sleep(pause_s)
        return error

    def _write(self, order: SaveRequest) -> None:
        self._holder.complete(self._others, order.callbacks)
        self._holder.write(order.path)

    def _publish(self, order: SaveRequest) -> None:
        if order.then is not None:
            order.then.carry_out()


def _error_of(steps: list[Callable[[SaveRequest], None]], order: SaveRequest) -> BaseException | None:
    """Take the steps that are left. The error is told, or raised, where the run sees it."""
    try:
        while steps:
            steps[0](order)
            del steps[0]
    except BaseException as error:
        return error
    return None


def _may_get_better(error: BaseException) -> bool:
    is_lasting = isinstance(error, HolderLost) or isinstance(error.__cause__, _NEVER_BETTER)
    return isinstance(error, CheckpointError) and not is_lasting

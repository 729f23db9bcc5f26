"""Saves: checkpoints on their way into files, one at a time, beside the training. Driver."""

import threading
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from raylit.callbacks.base import DriverCallback, Run
from raylit.checkpoint.publication import Publication
from raylit.driver.log_writer import LogWriter
from raylit.errors import CheckpointError
from raylit.messages import Report, Saved

_RETRY_AFTER_S = (0.5, 2.0)
"""A store may be out of reach for a moment, or another program make room on the disk."""
_WAKE_S = 0.2
"""For whoever waits to see a signal."""
_NEVER_BETTER = (NotADirectoryError, IsADirectoryError, PermissionError)


class Holder(Protocol):
    """Of a checkpoint that waits to be written. Called in a thread of its own."""

    def complete(self, others: list[dict[str, Any]]) -> None:
        """First: what each rank but the first has alone."""
        ...

    def write(self, path: str) -> None:
        """To a path or a URL, whole or not at all. CheckpointError: that did not work. HolderLost: nor will it."""
        ...

    def release(self) -> None:
        """It is not asked for again."""
        ...


class HolderLost(CheckpointError):
    """The process that held the checkpoint has gone; the run's own error says how."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What has been asked for."""

    path: str
    by: DriverCallback | None
    then: Publication | None


class Saves:
    """All methods are for the coordinator's own thread; each save has another one."""

    def __init__(self, run: Run, log_writer: LogWriter) -> None:
        self._run = run
        self._log_writer = log_writer
        self._thread: _SaveThread | None = None
        self._newest = ""
        self._last_error: CheckpointError | None = None

    def start(self, order: Order, holder: Holder, reports: Iterable[Report]) -> None:
        """Begin to write what the reports' ranks have saved; the one before it has been waited for."""
        assert self._thread is None
        saved = sorted((it for it in reports if isinstance(it, Saved) and it.rank > 0), key=lambda it: it.rank)
        others = [report.of_rank for report in saved]
        self._thread = _SaveThread(order, holder, others)
        self._thread.start()

    @property
    def is_under_way(self) -> bool:
        return self._thread is not None

    def finish(self) -> None:
        """Wait for the one under way, and tell of its end."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_WAKE_S)
        self.settle()

    def settle(self) -> None:
        """Tell of the end of one that has ended: whoever has asked for it, then the loggers."""
        thread = self._thread
        if thread is None or thread.is_alive():
            return
        self._thread = None
        order, error = thread.order, thread.error
        if isinstance(error, CheckpointError):
            self.note_failed(order.by, order.path, error)
            return
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
    def __init__(self, order: Order, holder: Holder, others: list[dict[str, Any]]) -> None:
        super().__init__(name="raylit-save", daemon=True)
        self.order = order
        self.error: BaseException | None = None
        self._holder = holder
        self._others = others
        self._is_written = False

    def run(self) -> None:
        try:
            for pause_s in (*_RETRY_AFTER_S, None):
                self.error = self._tried()
                if self.error is None or pause_s is None or not _may_get_better(self.error):
                    break
                time.sleep(pause_s)
        finally:
            self._holder.release()

    def _tried(self) -> BaseException | None:
        try:
            if not self._is_written:
                self._holder.complete(self._others)
                self._holder.write(self.order.path)
                self._is_written = True
            if self.order.then is not None:
                self.order.then.carry_out()
        except BaseException as error:  # told, or raised, where the run sees it
            return error
        return None


def _may_get_better(error: BaseException) -> bool:
    is_lasting = isinstance(error, HolderLost) or isinstance(error.__cause__, _NEVER_BETTER)
    return isinstance(error, CheckpointError) and not is_lasting

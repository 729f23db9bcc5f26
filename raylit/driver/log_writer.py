"""LogWriter: what goes to the loggers, in order, beside the run: a slow logger holds nobody up. Driver."""

import pickle
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from raylit.errors import LoggingError
from raylit.loggers.base import Logger
from raylit.messages import LogCall

_MAX_WAITING_BYTES = 256 * 2**20
_MAX_WAITING_CALLS = 20_000
"""Beyond either the run waits for its loggers: nothing is dropped, and memory is not endless."""


class LogWriter:
    """Makes calls of loggers in a thread of its own, one after the other; `is_direct`: in the caller's, at once.

    A call that raises does not keep the later ones from being made; the first error is raised by `check` or `drain`.
    """

    def __init__(self, loggers: Sequence[Logger], *, is_direct: bool) -> None:
        self._loggers = loggers
        self._is_direct = is_direct
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._error: BaseException | None = None

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        for logger in self._loggers:
            self._put(partial(logger.log_metrics, dict(metrics), step=step))

    def log_start(self, module: Any, datamodule: Any) -> None:
        """Of a fit: hyper-parameters of both, and the graph."""
        params = dict(module.hparams) if module._hparams and module._is_logging_hparams else {}
        if datamodule is not None and datamodule._hparams and datamodule._is_logging_hparams:
            params.update(datamodule.hparams)
        if params:
            self.log_hyperparams(params)
        self.log_graph(module)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            self._put(partial(logger.log_hyperparams, params))

    def log_graph(self, model: Any) -> None:
        for logger in self._loggers:
            self._put(partial(logger.log_graph, model))

    def save(self) -> None:
        for logger in self._loggers:
            self._put(logger.save)

    def take(self, call: LogCall) -> None:
        """Make a call that a hook has made on a worker."""
        self._put(partial(self._make, call), num_bytes=len(call.arguments))

    def after_save_checkpoint(self, callback: Any) -> None:
        """At once, after all that waits: the files are there now."""
        listening = [it for it in self._loggers if _listens(it)]
        if listening:
            self.drain()
        for logger in listening:
            logger.after_save_checkpoint(callback)

    def check(self) -> None:
        """Raise the first error there was, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def drain(self) -> None:
        """Wait until all is written. Raises as `check` does."""
        with self._changed:
            while self._waiting:
                self._changed.wait()
        self.check()

    def finalize(self, status: str) -> None:
        """Write what waits, end the loggers and the thread. An error is a warning where the run has failed anyway."""
        for logger in self._loggers:
            self._put(partial(self._attempt, partial(logger.finalize, status)))
        try:
            self.drain()
        except Exception as error:
            if status == "success":
                raise
            warnings.warn(f"while the run ended otherwise, a logger failed: {error}", stacklevel=2)
        finally:
            with self._changed:
                self._is_closed = True
                self._changed.notify_all()

    def _put(self, call: Callable[[], None], *, num_bytes: int = 0) -> None:
        if self._is_direct:
            call()
            return
        with self._changed:
            while self._num_bytes > _MAX_WAITING_BYTES or len(self._waiting) > _MAX_WAITING_CALLS:
                self._changed.wait()
            self._waiting.append((call, num_bytes))
            self._num_bytes += num_bytes
            self._changed.notify_all()
        if self._thread is None:
            # A daemon, so that a second Ctrl-C ends a program whose logger hangs.
            self._thread = threading.Thread(target=self._work, name="raylit-loggers", daemon=True)
            self._thread.start()

    def _make(self, call: LogCall) -> None:
        *owners, method = call.path
        try:
            target: Any = self._loggers[call.logger]
            for name in owners:
                target = getattr(target, name)
            args, kwargs = pickle.loads(call.arguments)
            getattr(target, method)(*args, **kwargs)
        except Exception as error:
            raise LoggingError(
                f"logger.{'.'.join(call.path)}(...), called in {call.place}: {type(error).__name__}: {error}"
            ) from error

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            self._error = self._error or error

    # In the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._is_closed:
                        return
                    self._changed.wait()
                call, num_bytes = self._waiting[0]
            self._attempt(call)
            with self._changed:
                self._waiting.popleft()
                self._num_bytes -= num_bytes
                self._changed.notify_all()


def _listens(logger: Logger) -> bool:
    return type(logger).after_save_checkpoint is not Logger.after_save_checkpoint

"""Calls of loggers in order, in a thread of the driver. Driver.

A slow logger delays nothing, and a logger that fails does not end the run.
"""

import pickle
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any

from raylit.errors import LoggingError, RaylitError
from raylit.loggers.base import Logger
from raylit.protocol.messages import LogCall

_MAX_QUEUED_BYTES = 256 * 2**20
_MAX_QUEUED_CALLS = 20_000
"""Above either limit the run waits for its loggers: no call is dropped, and memory stays bounded."""
_DISABLE_AFTER_S = 60.0
"""A logger is disabled once its latest calls have all failed and taken longer than this together (its server is down).
"""
_WRONG_CALLS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, ImportError, RaylitError)
"""Errors that are mistakes in a program, whatever state the logger is in."""
_WRONG_VALUES = (ValueError, LookupError, ArithmeticError)
"""Errors that are mistakes in a program, unless the logger has failed before."""


class FlushResult:
    """Result of a flush: set once everything logged before it has been saved by the loggers."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._positions: dict[str, Any] = {}

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Return each logger's position by its index, or an empty dict after the timeout."""
        return dict(self._positions) if self._done.wait(timeout_s) else {}

    def note(self, index: int, logger: Logger) -> None:
        logger.save()
        if (position := logger.position()) is not None:
            self._positions[str(index)] = position

    def set_done(self) -> None:
        self._done.set()


class LogWriter:
    """Writer that calls the loggers one after the other in its own thread, or at once in the caller's if `is_direct`.

    After a call that raises, the later ones are still made. A logger that fails (a full disk, a missing directory, an
    unreachable server) causes one warning, and an error at the end of the run. The first error of another kind, such as
    a wrong call in a hook, is raised by `check` or `drain`.
    """

    def __init__(self, loggers: Sequence[Logger], *, is_direct: bool) -> None:
        self._loggers = loggers
        self._is_direct = is_direct
        self._queue: deque[tuple[Callable[[], None], int, int | None]] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._error: BaseException | None = None
        self._failures = [_Failures(logger) for logger in loggers]

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._queue_for_each(lambda logger: partial(logger.log_metrics, dict(metrics), step=step))

    def log_start(self, module: Any, datamodule: Any) -> None:
        """Log the hyper-parameters of module and datamodule, and the graph, at the start of a fit."""
        params: dict[str, Any] = module.find_logged_hparams()
        if datamodule is not None:
            params.update(datamodule.find_logged_hparams())
        if params:
            self.log_hyperparams(params)
        self.log_graph(module)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._queue_for_each(lambda logger: partial(logger.log_hyperparams, params))

    def log_graph(self, model: Any) -> None:
        self._queue_for_each(lambda logger: partial(logger.log_graph, model))

    def save(self) -> None:
        self._queue_for_each(lambda logger: logger.save)

    def flush(self) -> FlushResult:
        """Queue a save of everything logged so far, without waiting for it."""
        flush_result = FlushResult()
        for index, logger in enumerate(self._loggers):
            self._queue_one(partial(flush_result.note, index, logger), index=index)
        self._queue_one(flush_result.set_done)
        return flush_result

    def resume(self, *, step: int, positions: Mapping[str, Any]) -> None:
        """Position the loggers before anything is logged, in a run that resumes from a checkpoint.

        `step` is the checkpoint's step and `positions` are those of the loggers at that moment. What they have logged
        since then will be logged again.
        """
        for index, logger in enumerate(self._loggers):
            self._queue_one(partial(logger.resume, step, positions.get(str(index))), index=index)

    def queue_call(self, call: LogCall) -> None:
        """Queue a call that a hook has made on a worker."""
        self._queue_one(partial(self._make_call, call), num_bytes=len(call.arguments), index=call.logger)

    def after_save_checkpoint(self, callback: Any) -> None:
        """Call the loggers' `after_save_checkpoint` at once, after all queued calls: the files exist now."""
        overriding = [index for index, logger in enumerate(self._loggers) if _overrides_after_save(logger)]
        if overriding:
            self.drain()
        for index in overriding:
            self._try_call(partial(self._loggers[index].after_save_checkpoint, callback), index)
        self.check()

    def check(self) -> None:
        """Warn once of each logger that has failed, and raise the first error of another kind, once."""
        for failures in self._failures:
            failures.warn_once()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def drain(self) -> None:
        """Wait until all queued calls have been made. Raises as `check` does."""
        with self._changed:
            while self._queue:
                self._changed.wait()
        self.check()

    def finalize(self, status: str) -> None:
        """Make the queued calls, finalize the loggers and end the thread.

        If the run has failed, an error of a logger is only a warning.
        """
        for index, logger in enumerate(self._loggers):
            if self._is_direct:
                self._try_call(partial(logger.finalize, status), index)
            else:
                self._queue_one(partial(logger.finalize, status), index=index)
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

    def raise_failures(self) -> None:
        """Raise LoggingError if a logger has failed in a run that has ended well."""
        failed = [failures for failures in self._failures if failures.first is not None]
        if failed:
            raise LoggingError(
                f"{'. '.join(failures.describe() for failures in failed)}. The run itself has ended well: model, "
                "metrics and checkpoints are complete"
            ) from failed[0].first

    def _queue_for_each(self, make_call: Callable[[Logger], Callable[[], None]]) -> None:
        for index, logger in enumerate(self._loggers):
            self._queue_one(make_call(logger), index=index)

    def _queue_one(self, call: Callable[[], None], *, num_bytes: int = 0, index: int | None = None) -> None:
        """Queue a call; `index` is that of the logger it calls."""
        if self._is_direct:
            self._try_call(call, index)
            self.check()
            return
        with self._changed:
            while self._num_bytes > _MAX_QUEUED_BYTES or len(self._queue) > _MAX_QUEUED_CALLS:
                self._changed.wait()
            self._queue.append((call, num_bytes, index))
            self._num_bytes += num_bytes
            self._changed.notify_all()
        if self._thread is None:
            # A daemon, so that a second Ctrl-C ends a program whose logger hangs.
            self._thread = threading.Thread(target=self._run_thread, name="raylit-loggers", daemon=True)
            self._thread.start()

    def _make_call(self, call: LogCall) -> None:
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

    def _try_call(self, call: Callable[[], None], index: int | None) -> None:
        failures = None if index is None else self._failures[index]
        if failures is not None and failures.is_disabled:
            failures.count += 1
            return
        started_at = monotonic()
        try:
            call()
        except Exception as error:
            if failures is not None and failures.is_logger_failure(error):
                failures.note(error, took_s=monotonic() - started_at)
            else:
                self._error = self._error or error
        except BaseException as error:
            if self._is_direct:
                raise
            self._error = self._error or error
        else:
            if failures is not None:
                failures.failing_s = 0.0

    # Runs in the thread

    def _run_thread(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._is_closed:
                        return
                    self._changed.wait()
                call, num_bytes, index = self._queue[0]
            self._try_call(call, index)
            with self._changed:
                self._queue.popleft()
                self._num_bytes -= num_bytes
                self._changed.notify_all()


class _Failures:
    """Failures of one logger in a run."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self.first: Exception | None = None
        self.count = 0
        """Number of calls that have failed or were skipped."""
        self.failing_s = 0.0
        """Time taken by the latest calls, all of which have failed."""
        self._has_warned = False

    @property
    def is_disabled(self) -> bool:
        return self.failing_s > _DISABLE_AFTER_S

    def is_logger_failure(self, error: Exception) -> bool:
        """Return True if the logger has failed, False if the call was wrong."""
        is_hook_call = isinstance(error, LoggingError) and isinstance(error.__cause__, Exception)
        cause = error.__cause__ if is_hook_call else error
        if isinstance(cause, OSError):
            return True
        if isinstance(cause, _WRONG_CALLS):
            return False
        # A logger whose file was closed by an earlier failure raises errors of any type.
        return self.first is not None or not (is_hook_call or isinstance(cause, _WRONG_VALUES))

    def note(self, error: Exception, *, took_s: float) -> None:
        self.first = self.first or error
        self.count += 1
        self.failing_s += took_s

    def warn_once(self) -> None:
        if self.first is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(self._logger).__name__} has failed: {_describe(self.first)}. The run goes on, further failures "
                "of this logger are not reported, and a fit ends with an error",
                stacklevel=2,
            )

    def describe(self) -> str:
        assert self.first is not None
        times = "once" if self.count == 1 else f"{self.count} times"
        return (
            f"{type(self._logger).__name__} has failed {times} during the run, so that its log may lack entries, first "
            f"with {_describe(self.first)}"
        )


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, LoggingError) else f"{type(error).__name__}: {error}"


def _overrides_after_save(logger: Logger) -> bool:
    return type(logger).after_save_checkpoint is not Logger.after_save_checkpoint

"""LogWriter: what goes to the loggers, in order, beside the run: a slow logger holds nobody up, and one that fails does
not end the run. Driver."""

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

_MAX_WAITING_BYTES = 256 * 2**20
_MAX_WAITING_CALLS = 20_000
"""Beyond either the run waits for its loggers: nothing is dropped, and memory is not endless."""
_FUTILE_S = 60.0
"""A logger whose last calls have all failed and taken so long together, as its server is gone, is not called again."""
_WRONG_CALLS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, ImportError, RaylitError)
"""Mistakes in a program, whatever state the logger is in."""
_WRONG_VALUES = (ValueError, LookupError, ArithmeticError)
"""Mistakes in a program, unless the logger is broken already."""


class FlushResult:
    """Everything that was logged before a moment, once it is where others can read it."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self._positions: dict[str, Any] = {}

    def wait(self, timeout_s: float) -> dict[str, Any]:
        """Where each logger stood, by its index. Empty: that took too long."""
        return dict(self._positions) if self._done.wait(timeout_s) else {}

    def note(self, index: int, logger: Logger) -> None:
        logger.save()
        if (position := logger.position()) is not None:
            self._positions[str(index)] = position

    def set_done(self) -> None:
        self._done.set()


class LogWriter:
    """Makes calls of loggers in a thread of its own, one after the other; `is_direct`: in the caller's, at once.

    A call that raises does not keep the later ones from being made. Where the logger has failed (a full disk, a
    directory that is gone, a server out of reach), that is a warning, once for each logger, and an error at the end of
    the run. The first error of another kind, such as a wrong call in a hook, is raised by `check` or `drain`.
    """

    def __init__(self, loggers: Sequence[Logger], *, is_direct: bool) -> None:
        self._loggers = loggers
        self._is_direct = is_direct
        self._waiting: deque[tuple[Callable[[], None], int, int | None]] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._error: BaseException | None = None
        self._failures = [_Failures(logger) for logger in loggers]

    def log_metrics(self, metrics: Mapping[str, float], *, step: int) -> None:
        self._put_each(lambda logger: partial(logger.log_metrics, dict(metrics), step=step))

    def log_start(self, module: Any, datamodule: Any) -> None:
        """Of a fit: hyper-parameters of both, and the graph."""
        params: dict[str, Any] = module.find_logged_hparams()
        if datamodule is not None:
            params.update(datamodule.find_logged_hparams())
        if params:
            self.log_hyperparams(params)
        self.log_graph(module)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._put_each(lambda logger: partial(logger.log_hyperparams, params))

    def log_graph(self, model: Any) -> None:
        self._put_each(lambda logger: partial(logger.log_graph, model))

    def save(self) -> None:
        self._put_each(lambda logger: logger.save)

    def flush(self) -> FlushResult:
        """Save all that has been logged so far; does not wait for it."""
        flushed = FlushResult()
        for index, logger in enumerate(self._loggers):
            self._put(partial(flushed.note, index, logger), index=index)
        self._put(flushed.set_done)
        return flushed

    def resume(self, *, step: int, positions: Mapping[str, Any]) -> None:
        """Before anything is logged: the run goes on from a checkpoint, taken at this step when the loggers stood at
        these positions. What they have logged since then comes again."""
        for index, logger in enumerate(self._loggers):
            self._put(partial(logger.resume, step, positions.get(str(index))), index=index)

    def take(self, call: LogCall) -> None:
        """Make a call that a hook has made on a worker."""
        self._put(partial(self._make, call), num_bytes=len(call.arguments), index=call.logger)

    def after_save_checkpoint(self, callback: Any) -> None:
        """At once, after all that waits: the files are there now."""
        listening = [index for index, logger in enumerate(self._loggers) if _listens(logger)]
        if listening:
            self.drain()
        for index in listening:
            self._attempt(partial(self._loggers[index].after_save_checkpoint, callback), index)
        self.check()

    def check(self) -> None:
        """Warn of loggers that have failed, once of each. Raise the first error of another kind there was, once."""
        for failures in self._failures:
            failures.warn_once()
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
        for index, logger in enumerate(self._loggers):
            if self._is_direct:
                self._attempt(partial(logger.finalize, status), index)
            else:
                self._put(partial(logger.finalize, status), index=index)
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
        """LoggingError: the run has ended well, but a logger has failed in it."""
        failed = [failures for failures in self._failures if failures.first is not None]
        if failed:
            raise LoggingError(
                f"{'. '.join(failures.described() for failures in failed)}. The run itself has ended well: model, "
                "metrics and checkpoints are complete"
            ) from failed[0].first

    def _put_each(self, call_of: Callable[[Logger], Callable[[], None]]) -> None:
        for index, logger in enumerate(self._loggers):
            self._put(call_of(logger), index=index)

    def _put(self, call: Callable[[], None], *, num_bytes: int = 0, index: int | None = None) -> None:
        """`index`: of the logger that is called."""
        if self._is_direct:
            self._attempt(call, index)
            self.check()
            return
        with self._changed:
            while self._num_bytes > _MAX_WAITING_BYTES or len(self._waiting) > _MAX_WAITING_CALLS:
                self._changed.wait()
            self._waiting.append((call, num_bytes, index))
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

    def _attempt(self, call: Callable[[], None], index: int | None) -> None:
        failures = None if index is None else self._failures[index]
        if failures is not None and failures.is_given_up:
            failures.count += 1
            return
        started_at = monotonic()
        try:
            call()
        except Exception as error:
            if failures is not None and failures.is_of_logger(error):
                failures.note(error, took_s=monotonic() - started_at)
            else:
                self._error = self._error or error
        except BaseException as error:
            if self._is_direct:
                raise
            self._error = self._error or error
        else:
            if failures is not None:
                failures.futile_s = 0.0

    # In the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._is_closed:
                        return
                    self._changed.wait()
                call, num_bytes, index = self._waiting[0]
            self._attempt(call, index)
            with self._changed:
                self._waiting.popleft()
                self._num_bytes -= num_bytes
                self._changed.notify_all()


class _Failures:
    """Of one logger in a run."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self.first: Exception | None = None
        self.count = 0
        """Calls that have failed, or have not been made any more."""
        self.futile_s = 0.0
        """What the last calls have taken, all of which have failed."""
        self._has_warned = False

    @property
    def is_given_up(self) -> bool:
        return self.futile_s > _FUTILE_S

    def is_of_logger(self, error: Exception) -> bool:
        """The logger has failed; else the call was wrong."""
        is_of_hook = isinstance(error, LoggingError) and isinstance(error.__cause__, Exception)
        cause = error.__cause__ if is_of_hook else error
        if isinstance(cause, OSError):
            return True
        if isinstance(cause, _WRONG_CALLS):
            return False
        # A writer whose file is closed by an earlier failure raises this and that.
        return self.first is not None or not (is_of_hook or isinstance(cause, _WRONG_VALUES))

    def note(self, error: Exception, *, took_s: float) -> None:
        self.first = self.first or error
        self.count += 1
        self.futile_s += took_s

    def warn_once(self) -> None:
        if self.first is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{type(self._logger).__name__} has failed: {_in_words(self.first)}. The run goes on, further failures "
                "of this logger are not reported, and a fit ends with an error",
                stacklevel=2,
            )

    def described(self) -> str:
        assert self.first is not None
        times = "once" if self.count == 1 else f"{self.count} times"
        return (
            f"{type(self._logger).__name__} has failed {times} during the run, so that its log may lack entries, first "
            f"with {_in_words(self.first)}"
        )


def _in_words(error: Exception) -> str:
    return str(error) if isinstance(error, LoggingError) else f"{type(error).__name__}: {error}"


def _listens(logger: Logger) -> bool:
    return type(logger).after_save_checkpoint is not Logger.after_save_checkpoint

"""Handling of Ctrl-C, SIGTERM and SIGHUP in a run. Driver.

The first signal requests an orderly end; a second Ctrl-C ends the run at once.
"""

import functools
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

from raylit.compat.ray_core import load_exit_imports

SignalName = Literal["SIGINT", "SIGTERM", "SIGHUP"]

_NAMES: dict[int, SignalName] = {signal.SIGINT: "SIGINT", signal.SIGTERM: "SIGTERM"}
if hasattr(signal, "SIGHUP"):  # not on Windows
    _NAMES[signal.SIGHUP] = "SIGHUP"
_REPEAT_S = 0.3
"""A repeat within this time is ignored.

Programs such as `timeout` and job managers signal a process and its group, so that the signal arrives twice.
"""
_NOTICE: dict[SignalName, bytes] = {
    "SIGINT": b"\nraylit: Ctrl-C: the run ends after this step and is saved; once more ends it at once\n",
    "SIGTERM": b"\nraylit: SIGTERM: the run ends after this step and is saved\n",
    "SIGHUP": b"\nraylit: SIGHUP: the run ends after this step and is saved\n",
}
_NOTICE_STARTING = b"\nraylit: the run ends as soon as Ray has started; Ctrl-C once more ends it at once\n"


class SignalHandler:
    """Handler of these signals during a run, installed in the main thread for signals with their default handler.

    A handler of the user's own stays installed. While `is_deferring`, the first signal is only recorded and `on_first`
    is called, in the handler. Otherwise, and for a second Ctrl-C, the exception is raised in the main thread:
    KeyboardInterrupt, or SystemExit with the exit code that a shell shows for a process ended by that signal, so that
    `finally` and `atexit` still run.
    """

    def __init__(self, *, on_first: Callable[[], None]) -> None:
        self.is_deferring = False
        self.is_connecting = False
        """True while Ray starts: an exception in the middle of that can crash the process."""
        self.is_ending_at_once = False
        """True once a second Ctrl-C has arrived."""
        self._on_first = on_first
        self._first: signal.Signals | None = None
        self._first_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    @property
    def pending(self) -> SignalName | None:
        """The first signal that has arrived, or None."""
        return None if self._first is None else _NAMES[self._first]

    def install(self) -> None:
        """Install the handler; call it again after connecting to Ray, which installs its own."""
        load_exit_imports()
        if threading.current_thread() is not threading.main_thread():
            return
        _register_fork_hooks()
        for number in map(signal.Signals, _NAMES):
            current = signal.getsignal(number)
            if current != self._receive and _is_default_handler(current):
                self._before.setdefault(number, current)
                signal.signal(number, self._receive)

    def restore(self) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)

    def status_after(self, error: BaseException) -> Literal["interrupted", "success", "failed"]:
        """Return the run's status for the loggers after this exception.

        It also sets the exit code of a SystemExit that a signal has caused.
        """
        self._restore_exit_code(error)
        if self._first is not None or isinstance(error, KeyboardInterrupt):
            return "interrupted"
        # Ray ends a user's function normally with a SystemExit of code 0.
        return "success" if isinstance(error, SystemExit) and not error.code else "failed"

    def _restore_exit_code(self, error: BaseException) -> None:
        """Restore the exit code of a SystemExit that a signal has caused.

        Ray's calls lose the code of one that is raised in them, and Ray's own handler, installed while it connects,
        exits with 15.
        """
        is_from_ray_handler = self.is_connecting and isinstance(error, SystemExit) and error.code == signal.SIGTERM
        if is_from_ray_handler:
            self._first = signal.SIGTERM
        if isinstance(error, SystemExit) and self._first not in (None, signal.SIGINT) and not self.is_deferring:
            error.code = 128 + self._first

    def check(self) -> None:
        """Raise the exception of a signal that was only recorded."""
        if self._first is not None:
            raise _make_exception(self._first)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first, self._first_at = signal.Signals(number), time.monotonic()
            if self.is_connecting:
                _write_notice(_NOTICE_STARTING)
                return
            if self.is_deferring:
                _write_notice(_NOTICE[_NAMES[self._first]])
                self._on_first()
                return
        elif number != signal.SIGINT or time.monotonic() - self._first_at < _REPEAT_S:
            return
        else:
            self.is_ending_at_once = True
        raise _make_exception(signal.Signals(number))


class _ForkHooks(threading.local):
    """Fork hooks that restore the previous handlers in a process forked by a loader or the user: it has no run to end.

    Python drops signals for its own handlers that reach the new process before its hooks run, so that a SIGTERM from a
    parent that ends the process immediately would be lost. These signals are blocked until then, except SIGINT, which
    Python itself handles (and drops) without us as well.
    """

    def block_signals(self) -> None:
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _NAMES.keys() - {signal.SIGINT})

    def unblock_signals(self) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def restore_handlers(self) -> None:
        for handler in map(signal.getsignal, _NAMES):
            if isinstance(receiver := getattr(handler, "__self__", None), SignalHandler):
                receiver.restore()
        self.unblock_signals()


@functools.cache
def _register_fork_hooks() -> None:
    if hasattr(os, "register_at_fork"):  # not on Windows
        hooks = _ForkHooks()
        os.register_at_fork(
            before=hooks.block_signals,
            after_in_parent=hooks.unblock_signals,
            after_in_child=hooks.restore_handlers,
        )


def _write_notice(notice: bytes) -> None:
    """Write to stderr directly, as the signal may have interrupted a print.

    If the terminal is gone, stdout and stderr are redirected to /dev/null, so that later output does not end the run.
    """
    try:
        os.write(2, notice)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
        os.close(nowhere)


def _is_default_handler(handler: Any) -> bool:
    """Return True if Python or Ray has set this handler; Ray's own ends the process with exit code 15."""
    if handler in (signal.SIG_DFL, signal.default_int_handler):
        return True
    return str(getattr(handler, "__module__", "")).partition(".")[0] == "ray"


def _make_exception(number: signal.Signals) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)

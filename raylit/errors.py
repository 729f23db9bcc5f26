"""The exceptions of raylit, one tree, and tracebacks without raylit's own frames.

Exceptions are raised in the driver wherever it has the information, and never swallowed.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class RaylitError(Exception):
    """Base of all exceptions that raylit raises itself."""


class ConfigError(RaylitError, ValueError):
    """Error for an argument, or a combination of arguments, that cannot work. Raised before a worker starts."""


class UnknownArgumentError(ConfigError, TypeError):
    """Error for a keyword that the Trainer does not know. The message names the nearest one that it knows."""


class ModuleError(RaylitError, TypeError):
    """Error for a module, data module or loader that lacks something the run needs."""


class NotFiniteError(RaylitError, ValueError):
    """Error for a loss or weight that is nan or infinite, if the Trainer is configured to stop on that."""


class CheckpointError(RaylitError):
    """Error for a checkpoint that cannot be written, read or applied."""


class DamagedCheckpoint(CheckpointError):
    """Error for a checkpoint file that differs from what was written: truncated or changed."""


class ResourcesError(RaylitError):
    """Error for resources that the cluster does not have and cannot get."""


class WorkerDied(RaylitError):
    """Error for a worker process that ended unexpectedly: killed, crashed, or its host was lost.

    Args:
        rank: Rank of the worker.
        host: Its host.
        reason: Description of its end.
        advice: How far the run had come, and how to continue it.
    """

    def __init__(self, *, rank: int, host: str, reason: str, advice: str = "") -> None:
        super().__init__(f"worker of rank {rank} on host {host} died: {reason}" + (f". {advice}" if advice else ""))
        self.rank = rank
        self.host = host
        self.reason = reason
        self.advice = advice

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_worker_died, (self.rank, self.host, self.reason, self.advice)

    def advise(self, advice: str) -> None:
        """Add how far the run had come, and how to continue it."""
        self.advice = advice
        self.args = (f"{self}. {advice}",)


class LoggingError(RaylitError):
    """Error for a hook's wrong call on a logger, with the hook's line; or for a logger that failed during a fit.

    The latter is raised at the end of a fit that was otherwise successful.
    """


class WorkerFailed(RaylitError):
    """Error for an exception in a hook that cannot be sent to the driver itself; the message is its traceback."""


class RemoteTraceback(Exception):
    """Formatted traceback of an exception in a worker; the `__cause__` of the exception raised in the driver."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def _rebuild_worker_died(rank: int, host: str, reason: str, advice: str = "") -> WorkerDied:
    return WorkerDied(rank=rank, host=host, reason=reason, advice=advice)


_HIDDEN_FOLDERS = tuple(
    os.path.dirname(spec.origin) + os.sep
    for spec in map(importlib.util.find_spec, ("raylit", "ray"))
    if spec is not None and spec.origin is not None
)


def is_traceback_full() -> bool:
    """Return whether the user wants to see raylit's and Ray's frames as well (RAYLIT_FULL_TRACEBACK)."""
    return os.environ.get("RAYLIT_FULL_TRACEBACK", "0") not in ("", "0")


def is_frame_hidden(path: str) -> bool:
    """Return whether frames of this file, which belongs to raylit or Ray, are hidden."""
    return path.startswith(_HIDDEN_FOLDERS) and not is_traceback_full()


def shows_user_frames(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorate a function that users call: raylit's frames are removed from the tracebacks of its exceptions."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            error.__traceback__ = drop_hidden_frames(error.__traceback__)
            # A raise without arguments adds no frame, so this function's frame is hidden as well.
            raise

    return call


def drop_hidden_frames(frames: TracebackType | None) -> TracebackType | None:
    """Return a traceback without the frames of raylit and Ray."""
    result: TracebackType | None = None
    visible = []
    while frames is not None:
        if not is_frame_hidden(frames.tb_frame.f_code.co_filename):
            visible.append(frames)
        frames = frames.tb_next
    for frame in reversed(visible):
        frame.tb_next = result
        result = frame
    return result

"""The exceptions of raylit, one tree. Raised in the driver wherever the driver can know; never swallowed."""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, TypeVar

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


class RaylitError(Exception):
    """Base of everything that raylit raises on its own account."""


class ConfigError(RaylitError, ValueError):
    """An argument, or a combination of arguments, that cannot work. Raised before a worker starts."""


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword that the Trainer does not know. The message names the nearest one that it does."""


class ModuleError(RaylitError, TypeError):
    """A module, data module or loader that lacks something the asked-for run needs."""


class NotFiniteError(RaylitError, ValueError):
    """A loss or weight that is nan or infinite, where the Trainer was told to end on that."""


class CheckpointError(RaylitError):
    """A checkpoint that cannot be written, read or applied."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint file whose content is not what was written: cut short, or changed."""


class ResourcesError(RaylitError):
    """The cluster has not, and cannot get, what the run asks for."""


class WorkerDied(RaylitError):
    """A worker process ended without being asked to: killed, crashed, or its host was lost."""

    def __init__(self, *, rank: int, host: str, reason: str, advice: str = "") -> None:
        """`advice`: how far the run had come and how to continue it."""
        super().__init__(f"worker of rank {rank} on host {host} died: {reason}" + (f". {advice}" if advice else ""))
        self.rank = rank
        self.host = host
        self.reason = reason
        self.advice = advice

    def __reduce__(self) -> tuple[object, ...]:
        return _worker_died, (self.rank, self.host, self.reason, self.advice)

    def advise(self, advice: str) -> None:
        """Add how far the run had come and how to continue it."""
        self.advice = advice
        self.args = (f"{self}. {advice}",)


class LoggingError(RaylitError):
    """A call that a hook has made on a logger was wrong; says where the hook made it. Or, at the end of a fit that has
    ended well: a logger has failed during it."""


class WorkerFailed(RaylitError):
    """A hook raised an exception that cannot travel to the driver as itself; the message is its traceback."""


class RemoteTraceback(Exception):
    """The traceback of an exception as it stood in the worker; the `__cause__` of the one raised in the driver."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def _worker_died(rank: int, host: str, reason: str, advice: str = "") -> WorkerDied:
    return WorkerDied(rank=rank, host=host, reason=reason, advice=advice)


_HIDDEN = tuple(
    os.path.dirname(spec.origin) + os.sep
    for spec in map(importlib.util.find_spec, ("raylit", "ray"))
    if spec is not None and spec.origin is not None
)


def is_traceback_full() -> bool:
    """The user wants to see raylit's and Ray's frames as well."""
    return os.environ.get("RAYLIT_FULL_TRACEBACK", "0") not in ("", "0")


def is_frame_hidden(path: str) -> bool:
    """A file of raylit's or Ray's."""
    return path.startswith(_HIDDEN) and not is_traceback_full()


def shows_user_frames(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Decorates what users call: raylit's frames are taken out of the traceback of what it raises."""

    @functools.wraps(function)
    def call(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            error.__traceback__ = without_hidden(error.__traceback__)
            # A raise without arguments adds no frame to what is there, so that this one is hidden as well.
            raise

    return call


def without_hidden(frames: TracebackType | None) -> TracebackType | None:
    """A traceback's frames other than raylit's and Ray's."""
    kept: TracebackType | None = None
    shown = []
    while frames is not None:
        if not is_frame_hidden(frames.tb_frame.f_code.co_filename):
            shown.append(frames)
        frames = frames.tb_next
    for frame in reversed(shown):
        frame.tb_next = kept
        kept = frame
    return kept

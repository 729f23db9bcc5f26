"""Loggers on a worker: proxies whose calls are recorded and made in the driver."""

import functools
import inspect
import io
import pickle
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from raylit.compat.wandb_media import reduce_media
from raylit.errors import ConfigError
from raylit.loggers.base import Logger
from raylit.protocol.messages import LogCall


def snapshot(value: Any) -> bytes:
    """Pickle a value as it is now. Waits for the device if it has tensors there.

    Tensors are detached and on the CPU, matplotlib figures without their windows, wandb's media with their files.
    """
    file = io.BytesIO()
    _Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


class _Pickler(cloudpickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if (kind is Tensor or kind is nn.Parameter) and obj.layout is torch.strided and not obj.is_quantized:
            # Only the view's own numbers; torch would pickle its whole storage.
            dense = obj.detach().cpu().resolve_conj().resolve_neg().contiguous()
            numbers = dense.reshape(-1).view(torch.uint8).numpy()
            return _rebuild_tensor, (numbers, obj.dtype, tuple(obj.shape), kind is nn.Parameter)
        figures = sys.modules.get("matplotlib.figure")
        if figures is not None and isinstance(obj, figures.Figure):
            return _reduce_figure(obj)
        if (reduced := reduce_media(obj)) is not None:
            return reduced
        return super().reducer_override(obj)


def _rebuild_tensor(
    numbers: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...], is_parameter: bool
) -> Tensor:
    tensor = torch.from_numpy(numbers).view(dtype).reshape(shape)
    return nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _reduce_figure(figure: Any) -> Any:
    """Reduce a figure without its pyplot window, which would be opened where it is unpickled."""
    function, arguments, state, *_ = figure.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    return function, arguments, {name: part for name, part in state.items() if name != "_restore_to_pylab"}


_Emit = Callable[[tuple[str, ...], tuple[Any, ...], dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggerFacts:
    """Properties of a driver's logger that hooks on a worker can read."""

    index: int
    name: str | None
    version: int | str | None
    save_dir: str | None
    root_dir: str | None
    log_dir: str | None
    kinds: tuple[tuple[str, str], ...]
    """Module and name of the logger's class and of its base classes."""

    @classmethod
    def from_logger(cls, logger: Logger, index: int) -> "LoggerFacts":
        return cls(
            index=index,
            name=logger.name,
            version=logger.version,
            save_dir=logger.save_dir,
            root_dir=logger.root_dir,
            log_dir=logger.log_dir,
            kinds=tuple((kind.__module__, kind.__qualname__) for kind in type(logger).__mro__),
        )


def logger_views(
    loggers: Sequence[Logger | LoggerFacts], *, forward: Callable[[LogCall], None] | None, step: Callable[[], int]
) -> list[Any]:
    """Return `trainer.loggers` of a rank: the driver's loggers in its own process, else proxies.

    Proxies do nothing without `forward`.
    """
    return [
        LoggerView(logger, _build_sender(logger, forward, step)) if isinstance(logger, LoggerFacts) else logger
        for logger in loggers
    ]


class _RemoteProxy:
    """Proxy of an object in the driver: attributes return proxies, calls and assignments are sent to the driver."""

    __slots__ = ("_emit", "_path")
    _emit: _Emit | None
    _path: tuple[str, ...]

    def __init__(self, path: tuple[str, ...], emit: _Emit | None) -> None:
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_emit", emit)

    def __getattr__(self, name: str) -> "_RemoteProxy":
        if name.startswith("__"):  # special methods that libraries look up: arrays, copies, ...
            raise AttributeError(name)
        return _RemoteProxy((*self._path, name), self._emit)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if self._emit is not None:
            self._emit(self._path, args, kwargs)
        if self._path[-1] == "add_figure" and kwargs.get("close", args[3] if len(args) > 3 else True):
            _close_figures(kwargs.get("figure", args[1] if len(args) > 1 else None))

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._emit is not None:
            self._emit((*self._path, "__setitem__"), (key, value), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if self._emit is not None:
            self._emit((*self._path, "__setattr__"), (name, value), {})

    def __repr__(self) -> str:
        return f"<{'.'.join(('logger', *self._path))} in the driver>"

    def __deepcopy__(self, memo: dict[int, Any]) -> "_RemoteProxy":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _return_none, ()  # a proxy that a hook has stored is not sent back to the driver


class LoggerView(_RemoteProxy):
    """Proxy of a driver's logger for hooks on a worker.

    A call such as `self.logger.log_metrics(...)`, `self.logger.experiment.add_image(...)` or
    `experiment.summary["best"] = 1` is recorded with its arguments as they are now, and made in the driver shortly
    afterwards, in order. On ranks other than 0 nothing happens, so that a run logs once. A call returns None; only with
    `num_workers=0`, where this is the logger itself, does it return the logger's result. Paths among the arguments are
    paths on the driver's host. An error of the call ends the run and names the line of the call.
    """

    __slots__ = ("_facts",)
    _facts: LoggerFacts

    def __init__(self, facts: LoggerFacts, emit: _Emit | None) -> None:
        super().__init__((), emit)
        object.__setattr__(self, "_facts", facts)

    @property
    def name(self) -> str | None:
        return self._facts.name

    @property
    def version(self) -> int | str | None:
        return self._facts.version

    @property
    def save_dir(self) -> str | None:
        return self._facts.save_dir

    @property
    def root_dir(self) -> str | None:
        return self._facts.root_dir

    @property
    def log_dir(self) -> str | None:
        return self._facts.log_dir

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Class of the driver's logger, so that `isinstance` works.

        If it cannot be imported here, the first of its base classes that can.
        """
        for module, name in self._facts.kinds:
            try:
                return functools.reduce(getattr, name.split("."), sys.modules[module])
            except (AttributeError, KeyError):
                continue
        return LoggerView


def _build_sender(
    facts: LoggerFacts, forward: Callable[[LogCall], None] | None, step: Callable[[], int]
) -> _Emit | None:
    if forward is None:
        return None

    def emit(path: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caller = f"{_describe_line(inspect.currentframe(), above=2)} at step {step()}"
        try:
            arguments = snapshot((args, kwargs))
        except Exception as error:
            raise ConfigError(
                f"logger.{'.'.join(path)}(...): an argument cannot travel to the driver, where the logger is: {error}"
            ) from error
        forward(LogCall(logger=facts.index, path=path, arguments=arguments, place=caller))

    return emit


def _describe_line(frame: FrameType | None, *, above: int) -> str:
    """Name the line that the frame so many above this one stands at, for messages."""
    for _ in range(above):
        frame = None if frame is None else frame.f_back
    if frame is None:
        return "an unknown line"
    return f"{frame.f_code.co_filename}:{frame.f_lineno}, in {frame.f_code.co_name}"


def _close_figures(figures: Any) -> None:
    """Close figures after they were logged, as SummaryWriter does, in the process where they are open."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is not None:
        for figure in figures if isinstance(figures, list) else [figures]:
            pyplot.close(figure)


def _return_none() -> None:
    return None

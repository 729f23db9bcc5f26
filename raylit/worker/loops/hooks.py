"""Hooks that callbacks and the module override: finding them, their arguments, calling them."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from raylit.callbacks.base import Callback
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.profilers.base import Profiler, time_items


def num_positional(function: Callable[..., Any]) -> float:
    """Return the number of positional arguments that a bound method takes; infinite with `*args`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return float("inf")
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def accepts_argument(function: Callable[..., Any], name: str) -> bool:
    """Return whether the function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def adapt_to_batch_index(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the step itself or, where it takes a batch only, a function that drops the batch index."""
    if num_positional(step) >= 2:
        return step

    @wraps(step)
    def without_index(batch: Any, batch_idx: int) -> Any:
        return step(batch)

    return without_index


def is_overridden(name: str, owner: object, base: type) -> bool:
    """Return whether `owner` has a `name` other than that of `base`, in its class or on the instance."""
    method = getattr(owner, name, None)
    if method is None:
        return False
    return getattr(method, "__func__", method) is not getattr(base, name, None)


def call_with_stage(hook: Callable[..., Any], stage: str) -> None:
    """Call `setup` or `teardown`, defined with or without its stage argument."""
    if inspect.signature(hook).parameters:
        hook(stage)
    else:
        hook()


class Hooks:
    """Hooks of a run, called where they are overridden: first those of the callbacks, then the module's."""

    def __init__(
        self,
        *,
        view: TrainerView,
        module: LightningModule,
        callbacks: Sequence[Callback],
        profiler: Profiler | None = None,
    ) -> None:
        self._view = view
        self._module = module
        self._callbacks = callbacks
        self._profiler = profiler

    def list_calls(self, name: str) -> tuple[Callable[..., Any], ...]:
        """Return the overridden hooks of this name, to be called with the module's arguments; empty if none is."""
        calls: list[Callable[..., Any]] = [
            self._measure_hook(callback, name, partial(getattr(callback, name), self._view, self._module))
            for callback in self._callbacks
            if is_overridden(name, callback, Callback)
        ]
        if is_overridden(name, self._module, LightningModule):
            calls.append(self._measure_hook(self._module, name, getattr(self._module, name)))
        return tuple(calls)

    def call(self, name: str, *args: Any) -> None:
        """Call the overridden hooks of this name."""
        for hook in self.list_calls(name):
            hook(*args)

    def set_up(self, stage: str, datamodule: DataModule | None) -> None:
        """Call `setup` of the data module, the callbacks and the module, in this order."""
        if datamodule is not None:
            call_with_stage(self._measure_hook(datamodule, "setup", datamodule.setup), stage)
        for callback in self._callbacks:
            callback.setup(self._view, self._module, stage)
        call_with_stage(self._measure_hook(self._module, "setup", self._module.setup), stage)

    def tear_down(self, stage: str, datamodule: DataModule | None) -> None:
        """Call `teardown` of the data module, the callbacks and the module, in this order."""
        if datamodule is not None:
            call_with_stage(datamodule.teardown, stage)
        for callback in self._callbacks:
            callback.teardown(self._view, self._module, stage)
        call_with_stage(self._module.teardown, stage)

    def _measure_hook(self, owner: object, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Return the hook, measured by the profiler if there is one."""
        return hook if self._profiler is None else time_items(self._profiler, f"{type(owner).__name__}.{name}", hook)

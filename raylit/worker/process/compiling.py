"""Compilation of a module's parts for Trainer(compile=...), and warnings about repeated recompilation. Worker."""

import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from time import perf_counter
from types import FunctionType
from typing import Any

import torch
from torch import nn

from raylit.compat.torch_core import get_call, get_compiled_call, set_compiled_call
from raylit.compat.torch_dynamo import add_compilation_callbacks, list_compilations, remove_compilation_callbacks
from raylit.compat.torch_metrics import is_metric
from raylit.errors import ConfigError

_MIN_REPORTED = 3
"""Number of compilations of one function for one kind of reason from which they are reported."""


def compile_parts(module: nn.Module, options: dict[str, Any], *, host: str) -> list[nn.Module]:
    """Have the module's `forward` and its layers compiled at their first call, where the user has not compiled them.

    Returns the parts. A layer within a compiled `forward` becomes part of that.

    Raises:
        ConfigError: this host cannot compile.
    """
    _check_host(options, host=host)
    compiled = []
    for name, part in _iterate_parts(module):
        if get_compiled_call(part) is None:
            set_compiled_call(part, torch.compile(_build_traceable(name, part), **options))
            compiled.append(part)
    return compiled


class CompilationWatch:
    """Observer of what torch compiles in this process, until `close`."""

    def __init__(self) -> None:
        self.num_seen = 0
        """Number of compilations."""
        self.total_s = 0.0
        """Seconds of all compilations that have ended."""
        self._began_at = 0.0
        self._last = next(reversed(list_compilations()), None)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._reported: set[str] = set()
        add_compilation_callbacks(on_start=self._record, on_end=self._record_end)

    def check_use(self) -> None:
        """Warn after a run if nothing was compiled at all."""
        if self.num_seen == 0:
            warnings.warn(
                "compile=... has compiled nothing: no step calls the module itself (self(...)) or one of its layers as "
                "a whole; have the steps do so, or compile what they call, with .compile() in configure_model",
                stacklevel=2,
            )

    def close(self) -> None:
        remove_compilation_callbacks(on_start=self._record, on_end=self._record_end)

    def _record(self, args: Any) -> None:
        """Count compilations at the start of the next one, when torch has recorded them."""
        self.num_seen += 1
        self._began_at = perf_counter()
        new = []
        for metrics in reversed(list_compilations()):
            if metrics is self._last:
                break
            new.append(metrics)
        self._last = new[0] if new else self._last
        for metrics in reversed(new):
            if metrics.recompile_reason and metrics.co_name:
                place = f"{metrics.co_name} ({metrics.co_filename}:{metrics.co_firstlineno})"
                self._count(place, metrics.recompile_reason)

    def _record_end(self, args: Any) -> None:
        self.total_s += perf_counter() - self._began_at

    def _count(self, place: str, reason: str) -> None:
        """Count a recompilation and warn if there are many of a kind.

        `reason` is the guard that failed, after the number of the compilation that it belongs to.
        """
        guard = re.sub(r"\s+", " ", reason.splitlines()[0].partition(": ")[2].partition(" (HINT")[0]).strip()
        kind = place, re.sub(r"\d+", "N", guard)
        self._counts[kind] += 1
        if self._counts[kind] < _MIN_REPORTED or place in self._reported:
            return
        self._reported.add(place)
        warnings.warn(
            f"torch.compile has compiled {place} again and again, {self._counts[kind]} times because of: {guard}. Each "
            "time costs seconds, and after some it runs uncompiled. Where a size changes, pad, leave the last batch "
            "out (drop_last=True) or pass compile={'dynamic': True}; where a number changes, keep it in a tensor",
            stacklevel=2,
        )


def _check_host(options: dict[str, Any], *, host: str) -> None:
    backend = options.get("backend", "inductor")
    if not isinstance(backend, str) or options.get("disable"):
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise ConfigError(f"compile={options!r}: torch has no backend {backend!r} here; it has {', '.join(known)}")
    compiler = os.environ.get("CXX", "g++")
    if backend == "inductor" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile needs a C++ compiler, and host {host} has no {compiler!r}: install one (apt install g++), say "
            "which in the environment variable CXX, pass compile={'backend': 'aot_eager'} (which runs anywhere, and no "
            "faster than without), or leave compile out"
        )


def _iterate_parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts that are compiled, with their names.

    They are the module, if it has a `forward` of its own, and the layers with parameters, which can be called by
    themselves.
    """
    if type(module).forward is not nn.Module.forward:
        yield "forward", module
    yield from _iterate_layers(module)


def _iterate_layers(owner: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, layer in owner.named_children():
        if isinstance(layer, (nn.ModuleList, nn.ModuleDict)):
            yield from ((f"{name}_{inner}", part) for inner, part in _iterate_layers(layer))
        elif not is_metric(layer) and next(layer.parameters(), None) is not None:
            yield name, layer


def _build_traceable(name: str, part: nn.Module) -> Callable[..., Any]:
    """Return the function that torch.compile takes for a part's call.

    torch.compile compiles no function of torch's own files, such as nn.Sequential's `forward`, but does compile their
    callers. The caller made here has its own code object for each part, as torch counts compilations by code object and
    gives up after eight.
    """
    if not type(part).forward.__module__.startswith("torch."):
        return get_call(part)
    inner = get_call(part)

    def call(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    code = call.__code__.replace(co_name=name)
    return FunctionType(code, call.__globals__, name, call.__defaults__, call.__closure__)

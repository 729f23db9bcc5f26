"""Profilers, which measure a run's time and memory. They run in the workers; the driver collects their findings."""

from collections.abc import Callable

from raylit.errors import ConfigError
from raylit.profilers.advanced import AdvancedProfiler
from raylit.profilers.base import PassThroughProfiler, Profiler, SimpleProfiler
from raylit.profilers.torch import PyTorchProfiler

__all__ = [
    "AdvancedProfiler",
    "PassThroughProfiler",
    "Profiler",
    "PyTorchProfiler",
    "SimpleProfiler",
    "build_profiler",
]


_BY_NAME: dict[str, Callable[[], Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def build_profiler(*, profiler: str | bool | Profiler | None) -> Profiler | None:
    """Return the profiler of the Trainer's argument; None if nothing is to be measured.

    True means "simple", as in Lightning 0.9.

    Raises:
        ConfigError: if the name is unknown.
    """
    if profiler is None or profiler is False or type(profiler) is PassThroughProfiler:
        return None
    if isinstance(profiler, Profiler):
        return profiler
    name = "simple" if profiler is True else profiler
    if not isinstance(name, str) or name not in _BY_NAME:
        names = ", ".join(map(repr, _BY_NAME))
        raise ConfigError(f"profiler={profiler!r}: must be {names}, a Profiler or None")
    return _BY_NAME[name]()

"""Profile of the driver's own time, in a run with a profiler. Driver."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

from raylit.profilers.base import Stopwatch
from raylit.protocol.messages import Action, Profile

_Object = TypeVar("_Object")
_Item = TypeVar("_Item")


class DriverProfiler:
    """Profiler of the coordinator, from its construction on, and of the objects that it calls."""

    def __init__(self) -> None:
        self._stopwatch = Stopwatch()

    def measure(self, name: str) -> AbstractContextManager[None]:
        return self._stopwatch.measure(name)

    def time_items(self, name: str, items: Iterator[_Item]) -> Iterator[_Item]:
        return self._stopwatch.time_items(name, items)

    def time_methods_of(self, target: _Object, *, name: str | None = None) -> _Object:
        """Return a proxy of `target` that times its method calls, under `name` or the name of its class."""
        return cast(_Object, _TimedProxy(target, self._stopwatch, name or type(target).__name__))

    def append_own_profile(self, workers: Iterable[Profile]) -> list[Profile]:
        """Return the workers' profiles, the slowest first, followed by the driver's own."""
        return [*sorted(workers, key=lambda profile: profile.title, reverse=True), self.build_profile()]

    def build_profile(self) -> Profile:
        elapsed_s = self._stopwatch.elapsed_s
        actions = self._stopwatch.actions()
        rest = Action(
            name="decide", num_calls=0, total_s=max(0.0, elapsed_s - sum(action.total_s for action in actions))
        )
        return Profile(title="Driver", rank=None, elapsed_s=elapsed_s, actions=(*actions, rest))


class _TimedProxy:
    def __init__(self, target: object, stopwatch: Stopwatch, name: str) -> None:
        self._target = target
        self._name = name
        self._stopwatch = stopwatch

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._target)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_target"], name)
        return self._time_method(value) if callable(value) and hasattr(value, "__self__") else value

    def _time_method(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._stopwatch.measure(self._name):
                return method(*args, **kwargs)

        return call

"""Costs: what the driver's own time went into, in a run with a profiler. Driver."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

from raylit.profilers.stopwatch import Stopwatch
from raylit.protocol.messages import Action, Profile

_Object = TypeVar("_Object")
_Item = TypeVar("_Item")


class DriverProfiler:
    """Measures the coordinator, from its making on, and whom it calls."""

    def __init__(self) -> None:
        self._stopwatch = Stopwatch()

    def measured(self, name: str) -> AbstractContextManager[None]:
        return self._stopwatch.measure(name)

    def over(self, name: str, items: Iterator[_Item]) -> Iterator[_Item]:
        return self._stopwatch.time_items(name, items)

    def of(self, called: _Object, *, name: str | None = None) -> _Object:
        """Stands for an object whose methods are measured, under the name of its class unless another is given."""
        return cast(_Object, _Timed(called, self._stopwatch, name or type(called).__name__))

    def beside(self, workers: Iterable[Profile]) -> list[Profile]:
        """Those of the workers, the slowest first, and the driver's own."""
        return [*sorted(workers, key=lambda profile: profile.title, reverse=True), self.profile()]

    def profile(self) -> Profile:
        elapsed_s = self._stopwatch.elapsed_s
        actions = self._stopwatch.actions()
        rest = Action(name="decide", num_calls=0, total_s=max(0.0, elapsed_s - sum(one.total_s for one in actions)))
        return Profile(title="Driver", rank=None, elapsed_s=elapsed_s, actions=(*actions, rest))


class _Timed:
    def __init__(self, called: object, stopwatch: Stopwatch, name: str) -> None:
        self._called = called
        self._name = name
        self._stopwatch = stopwatch

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._called)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_called"], name)
        return self._timed(value) if callable(value) and hasattr(value, "__self__") else value

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self._stopwatch.measure(self._name):
                return method(*args, **kwargs)

        return measured

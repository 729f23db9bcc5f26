"""DummyLogger: takes everything and keeps nothing, where hooks log in a run that writes nothing. Both sides."""

from collections.abc import Mapping
from typing import Any

from raylit.loggers.base import Logger


class DummyLogger(Logger):
    """Stands in for the loggers of a `fast_dev_run`; every method and every call on `experiment` returns None."""

    @property
    def experiment(self) -> "_Nothing":
        return _Nothing()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):  # protocols that others ask for: copies, pickles, ...
            raise AttributeError(name)
        return _Nothing()


class _Nothing:
    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...

"""Which arguments a user's step takes. Worker."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any


def num_positional(function: Callable[..., Any]) -> float:
    """Positional arguments that a bound method takes; infinite with `*args`."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return float("inf")
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def takes(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def accepting_index(step: Callable[..., Any]) -> Callable[..., Any]:
    """The step itself, or, where it takes a batch only, one that drops the index."""
    if num_positional(step) >= 2:
        return step

    @wraps(step)
    def without_index(batch: Any, batch_idx: int) -> Any:
        return step(batch)

    return without_index

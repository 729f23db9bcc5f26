"""torchmetrics.functional, with the task of a classification inferred from the data. Driver and workers."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from raylit.metrics.task import attribute_of, needs_task, task_arguments


def __getattr__(name: str) -> Any:
    attribute = attribute_of("torchmetrics.functional", name)
    return _with_task(attribute) if callable(attribute) and needs_task(attribute) else attribute


def _with_task(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that the data determine task and number of classes or labels: `accuracy(y_hat, y)`."""

    @wraps(function)
    def compare(preds: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and "task" not in kwargs:
            kwargs.update(task_arguments(function.__name__, preds, target, kwargs))
        return function(preds, target, *args, **kwargs)

    return compare

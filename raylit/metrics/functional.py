"""torchmetrics.functional, with the task of a classification inferred from what is compared. Both sides."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from raylit.metrics.task import attribute_of, needs_task, task_arguments


def __getattr__(name: str) -> Any:
    found = attribute_of("torchmetrics.functional", name)
    return _with_task(found) if callable(found) and needs_task(found) else found


def _with_task(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fills in the task, and the number of classes or labels, where they are not given: `accuracy(y_hat, y)`."""

    @wraps(function)
    def compare(preds: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and "task" not in kwargs:
            kwargs.update(task_arguments(function.__name__, preds, target, kwargs))
        return function(preds, target, *args, **kwargs)

    return compare

"""torchmetrics under the page's name, with the task of a classification inferred where it can be. Both sides.

torchmetrics is imported when something of it is asked for.
"""

from functools import wraps
from typing import Any

from raylit.metrics import functional
from raylit.metrics.task import attribute_of, needs_task, task_of_arguments

__all__ = ["functional"]


def __getattr__(name: str) -> Any:
    found = attribute_of("torchmetrics", name)
    return _with_task(found) if isinstance(found, type) and needs_task(found.__new__) else found


def _with_task(kind: type) -> Any:
    """Makes the metric whose task its arguments tell: `Accuracy(num_classes=10)`."""

    @wraps(kind, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        if not args and "task" not in kwargs:
            kwargs["task"] = task_of_arguments(kind.__name__, kwargs)
        return kind(*args, **kwargs)

    return build

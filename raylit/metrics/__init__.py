"""torchmetrics under the name raylit.metrics, with the task of a classification inferred. Driver and workers.

torchmetrics is imported when one of its metrics is first used.
"""

from functools import wraps
from typing import Any

from raylit.metrics import functional
from raylit.metrics.task import attribute_of, needs_task, task_of_arguments

__all__ = ["functional"]


def __getattr__(name: str) -> Any:
    attribute = attribute_of("torchmetrics", name)
    return _with_task(attribute) if isinstance(attribute, type) and needs_task(attribute.__new__) else attribute


def _with_task(kind: type) -> Any:
    """Wrap a metric class so that its arguments determine the task: `Accuracy(num_classes=10)`."""

    @wraps(kind, updated=())
    def build(*args: Any, **kwargs: Any) -> Any:
        if not args and "task" not in kwargs:
            kwargs["task"] = task_of_arguments(kind.__name__, kwargs)
        return kind(*args, **kwargs)

    return build

"""Look-up of metrics in torchmetrics, and inference of a classification's task. Driver and workers."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from raylit.errors import ConfigError


def attribute_of(module_name: str, name: str) -> Any:
    """Return the attribute `name` of a module of torchmetrics.

    Raises:
        ModuleNotFoundError: with the command to install torchmetrics, if it is missing.
        AttributeError: if there is no such metric.
    """
    if name.startswith("__"):  # the import system looks up such names in every module
        raise AttributeError(name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"raylit.metrics has {name} from torchmetrics, which is not installed: pip install 'raylit[metrics]'"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise AttributeError(f"raylit.metrics is {module_name}, which has no {name!r}") from None


def needs_task(function: Callable[..., Any]) -> bool:
    """Return whether the function has a parameter `task` without a default."""
    try:
        task = inspect.signature(function).parameters.get("task")
    except (TypeError, ValueError):  # a built-in function
        return False
    return task is not None and task.default is inspect.Parameter.empty


def task_of_arguments(name: str, arguments: Mapping[str, Any]) -> str:
    """Return the task that a metric class's arguments imply.

    Raises:
        ConfigError: if neither `num_classes` nor `num_labels` is given.
    """
    if arguments.get("num_labels") is not None:
        return "multilabel"
    if arguments.get("num_classes") is not None:
        return "multiclass"
    raise ConfigError(
        f"metrics.{name}() without a task: pass num_classes=... (multiclass), num_labels=... (multilabel) or "
        "task='binary'"
    )


def task_arguments(name: str, preds: Tensor, target: Tensor, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return `task` with `num_classes` or `num_labels` for the shapes of the data.

    If `preds` has one dimension more than `target`, it contains class scores. With the same shape it contains
    probabilities or logits of one or several labels, or class indices.

    Raises:
        ConfigError: if the shapes do not fit together.
    """
    if arguments.get("num_labels") is not None:
        return {"task": "multilabel"}
    if arguments.get("num_classes") is not None:
        return {"task": "multiclass"}
    if preds.ndim == target.ndim + 1:
        return {"task": "multiclass", "num_classes": preds.shape[1]}
    if preds.shape != target.shape:
        raise ConfigError(
            f"metrics.functional.{name}: preds of shape {tuple(preds.shape)} and target of shape "
            f"{tuple(target.shape)}: of one shape, or preds with a dimension of classes more"
        )
    if preds.is_floating_point():
        return {"task": "binary"} if preds.ndim == 1 else {"task": "multilabel", "num_labels": preds.shape[1]}
    both = torch.cat([preds.reshape(-1), target.reshape(-1)])
    return {"task": "multiclass", "num_classes": max(2, int(both.max()) + 1 if both.numel() else 2)}

"""Arithmetic of logged values: reductions over batches and ranks. Worker."""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from torch import Tensor

from raylit.errors import ConfigError

Reduction = str | Callable[[Tensor], Tensor]
OBJECT = "object"
"""The reduction of a torchmetrics object, which reduces itself."""
FUNCTION = "function"
"""The reduction of an entry from a checkpoint until `self.log` passes the user's function again."""


_MISSING = object()


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
}
_SAME = {torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", min: "min", max: "max", sum: "sum"}


def resolve_reduction(name: str, reduce_fx: Any) -> Reduction:
    """Return `reduce_fx` as one of the reductions' names where it is one of them, else the user's function."""
    if isinstance(reduce_fx, str) and reduce_fx in ("mean", "avg", "sum", "min", "max"):
        return "mean" if reduce_fx == "avg" else reduce_fx
    if callable(reduce_fx):
        return _SAME.get(reduce_fx, reduce_fx)
    raise ConfigError(f"self.log({name!r}, reduce_fx={reduce_fx!r}): must be 'mean', 'sum', 'min', 'max' or a function")


def reduce_step(values: Tensor, reduction: Reduction) -> float:
    """Reduce one step's values of the ranks; a reduction function of the user's applies to an epoch only."""
    return float(REDUCTIONS[reduction](values) if reduction in ("sum", "min", "max") else values.mean())


def reduce_epoch(totals: Tensor, weights: Tensor, reduction: str) -> float:
    """Reduce the totals of the ranks that have one to the epoch's value."""
    if reduction == "mean":
        return float(totals.sum() / weights.sum())
    return float(REDUCTIONS[reduction](totals))


def interleave(values_of_ranks: Sequence[list[Any]]) -> list[Any]:
    """Interleave the values of all ranks in the order in which the ranks take turns with the batches."""
    turns = chain.from_iterable(zip_longest(*values_of_ranks, fillvalue=_MISSING))
    return [value for value in turns if value is not _MISSING]


def warn_of_missing_function(name: str) -> None:
    """Warn that the metric has no value for this epoch, as a checkpoint does not hold its function."""
    warnings.warn(
        f"the metric {name!r} has no value for this epoch: the run was resumed after the last batch that logs it, and "
        "a checkpoint does not hold the function that is its reduce_fx",
        stacklevel=2,
    )


def apply_reduction(reduction: Callable[[Tensor], Tensor], values: list[Any]) -> float:
    return float(reduction(torch.tensor(values)))


def stack_values(values: list[Any]) -> Tensor:
    """Stack scalars, on any device, into one float64 vector."""
    devices = {value.device for value in values if isinstance(value, Tensor)}
    if not devices:
        return torch.tensor(values, dtype=torch.float64)
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).reshape(()) for value in values])


def check_scalar(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ConfigError(f"self.log({name!r}): a tensor of shape {tuple(value.shape)}; must have one element")
        return
    try:
        float(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"self.log({name!r}, {value!r}): must be a number, a tensor with one element or a torchmetrics.Metric"
            f"{'; for a dict there is self.log_dict' if isinstance(value, dict) else ''}"
        ) from None


def fork_name(name: str, suffix: str) -> str:
    base, separator, loader = name.partition("/dataloader_idx_")
    return f"{base}_{suffix}{separator}{loader}"


def combine_totals(reduction: Reduction, total: Tensor, folded: Tensor) -> Tensor:
    total = total.to(folded.device)
    if reduction in ("mean", "sum"):
        return total + folded
    if isinstance(reduction, str):
        return torch.minimum(total, folded) if reduction == "min" else torch.maximum(total, folded)
    return torch.cat([total, folded])

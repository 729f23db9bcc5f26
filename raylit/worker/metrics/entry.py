"""Entry: one logged name, its values so far and how they are reduced over batches and ranks. Worker."""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylit.errors import ConfigError
from raylit.protocol.messages import Metric, Metrics

NUM_KEPT = 256
"""Values of an epoch's metric that are kept before they are added up; bounds memory, saves a torch call per step."""

Reduction = str | Callable[[Tensor], Tensor]
OBJECT = "object"
"""The reduction of a torchmetrics object, which knows itself how to reduce."""
FUNCTION = "function"
"""The reduction of what comes from a checkpoint, until the user's function is given again."""


_MISSING = object()


class Spec(NamedTuple):
    """What all ranks must agree on to read a name."""

    dataloader_idx: int
    reduction: Reduction
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool

    def joined(self, other: "Spec") -> "Spec":
        """Shown wherever either of them is."""
        reduction = other.reduction if self.reduction == FUNCTION else self.reduction
        is_logged = self.logger or other.logger
        return self._replace(reduction=reduction, prog_bar=self.prog_bar or other.prog_bar, logger=is_logged)

    def published(self, name: str, value: float, *, suffix: str) -> Metrics:
        """The names under which a value is seen: `x`, or `x_step` and `x_epoch` where both were asked for."""
        if not (self.on_step and self.on_epoch):
            return {name: Metric(value=value, prog_bar=self.prog_bar, logger=self.logger)}
        return {
            fork_entry(name, suffix): Metric(value=value, prog_bar=self.prog_bar, logger=self.logger),
            name: Metric(value=value, prog_bar=False, logger=False, is_alias=True),
        }

    def step_name(self, name: str) -> str:
        return fork_entry(name, "step") if self.on_epoch else name


class Entry:
    """One logged name."""

    __slots__ = (
        "asked", "is_fresh", "is_returned", "last", "loader", "name", "num_updates", "object", "on_epoch", "pieces",
        "rows", "segments", "spec", "total", "values", "weight", "weights",
    )  # fmt: skip

    def __init__(self, name: str, spec: Spec, asked: tuple[Any, ...] | None) -> None:
        self.name = name
        self.spec = spec
        self.on_epoch = spec.on_epoch
        self.asked = asked
        """The arguments of the first `self.log`, None for an entry that comes from a checkpoint."""
        self.is_returned = False
        """Comes from what a step returned; else from `self.log`."""
        self.last: Any = None
        self.is_fresh = False
        """`last` has not been reported yet."""
        self.rows: list[tuple[int, Any]] | None = None
        """In an evaluation, for `on_step`: each value with its batch's place in the data set."""
        self.object: Any = None
        """The torchmetrics object that was logged."""
        self.num_updates = 0
        """Of the object, when it was logged under this name for the last time."""
        self.loader = 0
        """The evaluation's loader in whose batches that was."""
        self.segments: dict[int, Any] = {}
        """The object's states from the batches of each loader that is through, where there are several."""
        self.pieces: tuple[Any, list[Any]] = (None, [])
        """A batch, and the values of its pieces so far."""
        self.values: list[Any] = []
        self.weights: list[Any] = []
        """Numbers, or tensors where the user gave one as the batch's size."""
        self.total: Any = None
        """Sum, minimum or maximum so far, float64 on the device; for a function of the user's all the values."""
        self.weight: Any = 0.0
        """Of a mean: the sum of the batches' sizes so far."""

    def widen(self, prog_bar: bool, logger: bool) -> None:
        """Show it there as well."""
        assert self.asked is not None
        self.asked = (self.asked[0] or prog_bar, self.asked[1] or logger, *self.asked[2:])
        self.spec = self.spec._replace(prog_bar=self.spec.prog_bar or prog_bar, logger=self.spec.logger or logger)

    def with_pieces(self, value: Any, batch: Any, reduce_fx: Any) -> Any:
        """The value of the batch with this piece of it, in the place of the one without."""
        if self.pieces[0] is not batch:
            self.start_pieces(value, batch)
            return value
        self.pieces[1].append(value)
        if self.on_epoch:
            self.values.pop()
            self.weights.pop()
        reduction = reduction_of(self.name, reduce_fx)
        together = stack_values(self.pieces[1])
        return _REDUCTIONS[reduction](together) if isinstance(reduction, str) else reduction(together)

    def start_pieces(self, value: Any, batch: Any) -> None:
        self.pieces = (batch, [value])
        if len(self.values) >= NUM_KEPT - 1:
            self.fold()  # now, as values of this batch may still be replaced

    def fold(self) -> None:
        """Add the kept values up, in float64 and without waiting for the device."""
        if not self.values:
            return
        reduction = self.spec.reduction
        values = self.stacked()
        if reduction == "mean":
            weights = stack_values(self.weights).to(values.device, non_blocking=True)
            # The value of an empty batch is often nan, and counts for nothing all the same.
            folded = torch.where(weights > 0, values * weights, 0.0).sum()
            has_tensors = any(isinstance(weight, Tensor) for weight in self.weights)
            self.weight = self.weight + (weights.sum() if has_tensors else sum(self.weights))
        elif isinstance(reduction, str):
            folded = _REDUCTIONS[reduction](values)
        else:
            folded = values
        self.total = folded if self.total is None else _combined(reduction, self.total, folded)
        self.values, self.weights = [], []

    def stacked(self) -> Tensor:
        try:
            return stack_values(self.values)
        except RuntimeError as error:
            shapes = {tuple(value.shape) for value in self.values if isinstance(value, Tensor)}
            raise ConfigError(f"self.log({self.name!r}) got tensors of shapes {shapes}: one element each") from error


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
}
_SAME = {torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", min: "min", max: "max", sum: "sum"}


def reduction_of(name: str, reduce_fx: Any) -> Reduction:
    """What `self.log` was given, as one of few words where it is one of them."""
    if isinstance(reduce_fx, str) and reduce_fx in ("mean", "avg", "sum", "min", "max"):
        return "mean" if reduce_fx == "avg" else reduce_fx
    if callable(reduce_fx):
        return _SAME.get(reduce_fx, reduce_fx)
    raise ConfigError(f"self.log({name!r}, reduce_fx={reduce_fx!r}): must be 'mean', 'sum', 'min', 'max' or a function")


def last_value(entry: Entry | None) -> tuple[Any, float]:
    return (0.0, 0.0) if entry is None or entry.last is None else (entry.last, 1.0)


def total_and_weight(entry: Entry | None) -> tuple[Any, Any]:
    """0.0 as the weight: this rank has nothing."""
    if entry is None or entry.total is None or entry.total.ndim > 0:
        return 0.0, 0.0
    return entry.total, entry.weight if entry.spec.reduction == "mean" else 1.0


def step_across(values: Tensor, reduction: Reduction) -> float:
    """One step's values of the ranks as one. A function of the user's is for the values of an epoch."""
    return float(_REDUCTIONS[reduction](values) if reduction in ("sum", "min", "max") else values.mean())


def epoch_across(totals: Tensor, weights: Tensor, reduction: str) -> float:
    """The epoch's value from the totals of the ranks that have one."""
    if reduction == "mean":
        return float(totals.sum() / weights.sum())
    return float(_REDUCTIONS[reduction](totals))


def kept_of(entry: Entry) -> dict[str, Any] | None:
    """Of a folded entry's epoch what a checkpoint keeps, in plain values; None: nothing yet."""
    if not entry.on_epoch or entry.total is None:
        return None
    reduction = entry.spec.reduction
    if isinstance(reduction, str) and reduction != FUNCTION:
        return {"spec": tuple(entry.spec), "total": float(entry.total), "weight": float(entry.weight)}
    return {"spec": tuple(entry.spec._replace(reduction=FUNCTION)), "values": entry.total.tolist()}


def entry_of(name: str, kept: dict[str, Any]) -> Entry:
    """The inverse of `kept_of`."""
    entry = Entry(name, Spec(*kept["spec"]), None)
    if "total" in kept:
        entry.total, entry.weight = torch.tensor(kept["total"], dtype=torch.float64), kept["weight"]
    elif "values" in kept:
        entry.total = torch.tensor(kept["values"], dtype=torch.float64)
    return entry


def sum_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """What MetricBuffer.state_dict gave on several ranks, as one rank's."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(chain.from_iterable(states)):
        ranked = [state[name] for state in states if name in state]
        merged[name] = dict(ranked[0])
        if "values" in ranked[0]:
            merged[name]["values"] = in_turns([kept["values"] for kept in ranked])
        elif "total" in ranked[0]:
            totals = torch.tensor([kept["total"] for kept in ranked], dtype=torch.float64)
            reduction = Spec(*ranked[0]["spec"]).reduction
            fold = torch.sum if reduction == "mean" else _REDUCTIONS[str(reduction)]
            merged[name].update(total=float(fold(totals)), weight=sum(kept["weight"] for kept in ranked))
    return merged


def in_turns(ranked: Sequence[list[Any]]) -> list[Any]:
    """The values of all ranks, which take turns as they did with the batches."""
    turns = chain.from_iterable(zip_longest(*ranked, fillvalue=_MISSING))
    return [value for value in turns if value is not _MISSING]


def warn_of_missing_function(name: str) -> None:
    warnings.warn(
        f"the metric {name!r} has no value for this epoch: the run was resumed after the last batch that logs it, and "
        "a checkpoint does not hold the function that is its reduce_fx",
        stacklevel=2,
    )


def apply_reduction(reduction: Callable[[Tensor], Tensor], values: list[Any]) -> float:
    return float(reduction(torch.tensor(values)))


def stack_values(values: list[Any]) -> Tensor:
    """Scalars, on any device, as one float64 vector."""
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


def fork_entry(name: str, suffix: str) -> str:
    base, separator, loader = name.partition("/dataloader_idx_")
    return f"{base}_{suffix}{separator}{loader}"


def _combined(reduction: Reduction, total: Tensor, folded: Tensor) -> Tensor:
    total = total.to(folded.device)
    if reduction in ("mean", "sum"):
        return total + folded
    if isinstance(reduction, str):
        return torch.minimum(total, folded) if reduction == "min" else torch.maximum(total, folded)
    return torch.cat([total, folded])

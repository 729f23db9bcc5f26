"""One logged name: its values so far and how they are reduced over batches and ranks."""

import warnings
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor

from raylit.errors import ConfigError
from raylit.protocol.messages import Metric, Metrics

MAX_KEPT_VALUES = 256
"""Values of an epoch's metric that are kept before they are summed; bounds memory, saves a torch call per step."""

Reduction = str | Callable[[Tensor], Tensor]
OBJECT = "object"
"""The reduction of a torchmetrics object, which reduces itself."""
FUNCTION = "function"
"""The reduction of an entry from a checkpoint until `self.log` passes the user's function again."""


_MISSING = object()


class MetricSpec(NamedTuple):
    """Properties of a logged name that all ranks must agree on to read it."""

    dataloader_idx: int
    reduction: Reduction
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool

    def merge(self, other: "MetricSpec") -> "MetricSpec":
        """Return a spec that is shown wherever either of the two is."""
        reduction = other.reduction if self.reduction == FUNCTION else self.reduction
        is_logged = self.logger or other.logger
        return self._replace(reduction=reduction, prog_bar=self.prog_bar or other.prog_bar, logger=is_logged)

    def publish(self, name: str, value: float, *, suffix: str) -> Metrics:
        """Return the names under which a value is shown: `x`, or `x_step` and `x_epoch` where both were requested."""
        if not (self.on_step and self.on_epoch):
            return {name: Metric(value=value, prog_bar=self.prog_bar, logger=self.logger)}
        return {
            fork_name(name, suffix): Metric(value=value, prog_bar=self.prog_bar, logger=self.logger),
            name: Metric(value=value, prog_bar=False, logger=False, is_alias=True),
        }

    def step_name(self, name: str) -> str:
        """Return the name of the value of one step."""
        return fork_name(name, "step") if self.on_epoch else name


class MetricEntry:
    """One logged name of a loop, with its values."""

    __slots__ = (
        "arguments", "is_fresh", "is_from_output", "last", "loader", "name", "num_updates", "object", "on_epoch",
        "pieces", "rows", "segments", "spec", "total", "values", "weight", "weights",
    )  # fmt: skip

    def __init__(self, name: str, spec: MetricSpec, arguments: tuple[Any, ...] | None) -> None:
        self.name = name
        self.spec = spec
        self.on_epoch = spec.on_epoch
        self.arguments = arguments
        """The arguments of the first `self.log`; None for an entry that comes from a checkpoint."""
        self.is_from_output = False
        """The value comes from a step's output; else from `self.log`."""
        self.last: Any = None
        self.is_fresh = False
        """True if `last` has not been reported yet."""
        self.rows: list[tuple[int, Any]] | None = None
        """In an evaluation, for `on_step`: each value with its batch's index in the data set."""
        self.object: Any = None
        """The torchmetrics object that was logged."""
        self.num_updates = 0
        """Updates of the object when it was last logged under this name."""
        self.loader = 0
        """Index of the evaluation's loader in whose batches it was last logged."""
        self.segments: dict[int, Any] = {}
        """With several loaders: the object's states from the batches of each finished loader."""
        self.pieces: tuple[Any, list[Any]] = (None, [])
        """A batch, and the values of its pieces so far."""
        self.values: list[Any] = []
        self.weights: list[Any] = []
        """Numbers, or tensors where the user passed a tensor as the batch size."""
        self.total: Any = None
        """Sum, minimum or maximum so far, float64 on the device; all values for a reduction function of the user's."""
        self.weight: Any = 0.0
        """For a mean: the sum of the batch sizes so far."""

    def widen(self, prog_bar: bool, logger: bool) -> None:
        """Show the value in the progress bar or the loggers as well."""
        assert self.arguments is not None
        self.arguments = (self.arguments[0] or prog_bar, self.arguments[1] or logger, *self.arguments[2:])
        self.spec = self.spec._replace(prog_bar=self.spec.prog_bar or prog_bar, logger=self.spec.logger or logger)

    def add_piece(self, value: Any, batch: Any, reduce_fx: Any) -> Any:
        """Add a piece's value and return the batch's value, which replaces the batch's value without this piece."""
        if self.pieces[0] is not batch:
            self.start_pieces(value, batch)
            return value
        self.pieces[1].append(value)
        if self.on_epoch:
            self.values.pop()
            self.weights.pop()
        reduction = resolve_reduction(self.name, reduce_fx)
        together = stack_values(self.pieces[1])
        return _REDUCTIONS[reduction](together) if isinstance(reduction, str) else reduction(together)

    def start_pieces(self, value: Any, batch: Any) -> None:
        """Start the pieces of another batch."""
        self.pieces = (batch, [value])
        if len(self.values) >= MAX_KEPT_VALUES - 1:
            self.fold()  # now, as later pieces may still replace this batch's value

    def fold(self) -> None:
        """Sum the kept values, in float64 and without waiting for the device."""
        if not self.values:
            return
        reduction = self.spec.reduction
        values = self.stack()
        if reduction == "mean":
            weights = stack_values(self.weights).to(values.device, non_blocking=True)
            # The value of an empty batch is often nan; its weight of 0 must still remove it.
            folded = torch.where(weights > 0, values * weights, 0.0).sum()
            has_tensors = any(isinstance(weight, Tensor) for weight in self.weights)
            self.weight = self.weight + (weights.sum() if has_tensors else sum(self.weights))
        elif isinstance(reduction, str):
            folded = _REDUCTIONS[reduction](values)
        else:
            folded = values
        self.total = folded if self.total is None else _combine_totals(reduction, self.total, folded)
        self.values, self.weights = [], []

    def stack(self) -> Tensor:
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


def resolve_reduction(name: str, reduce_fx: Any) -> Reduction:
    """Return `reduce_fx` as one of the reductions' names where it is one of them, else the user's function."""
    if isinstance(reduce_fx, str) and reduce_fx in ("mean", "avg", "sum", "min", "max"):
        return "mean" if reduce_fx == "avg" else reduce_fx
    if callable(reduce_fx):
        return _SAME.get(reduce_fx, reduce_fx)
    raise ConfigError(f"self.log({name!r}, reduce_fx={reduce_fx!r}): must be 'mean', 'sum', 'min', 'max' or a function")


def read_last_value(entry: MetricEntry | None) -> tuple[Any, float]:
    return (0.0, 0.0) if entry is None or entry.last is None else (entry.last, 1.0)


def read_total_and_weight(entry: MetricEntry | None) -> tuple[Any, Any]:
    """Return the entry's total and weight; a weight of 0.0 if this rank has no value."""
    if entry is None or entry.total is None or entry.total.ndim > 0:
        return 0.0, 0.0
    return entry.total, entry.weight if entry.spec.reduction == "mean" else 1.0


def reduce_step(values: Tensor, reduction: Reduction) -> float:
    """Reduce one step's values of the ranks; a reduction function of the user's applies to an epoch only."""
    return float(_REDUCTIONS[reduction](values) if reduction in ("sum", "min", "max") else values.mean())


def reduce_epoch(totals: Tensor, weights: Tensor, reduction: str) -> float:
    """Reduce the totals of the ranks that have one to the epoch's value."""
    if reduction == "mean":
        return float(totals.sum() / weights.sum())
    return float(_REDUCTIONS[reduction](totals))


def save_entry(entry: MetricEntry) -> dict[str, Any] | None:
    """Return what a checkpoint keeps of a folded entry, in plain values; None if it has no value yet."""
    if not entry.on_epoch or entry.total is None:
        return None
    reduction = entry.spec.reduction
    if isinstance(reduction, str) and reduction != FUNCTION:
        return {"spec": tuple(entry.spec), "total": float(entry.total), "weight": float(entry.weight)}
    return {"spec": tuple(entry.spec._replace(reduction=FUNCTION)), "values": entry.total.tolist()}


def load_entry(name: str, saved: dict[str, Any]) -> MetricEntry:
    """Return the entry that `save_entry` has stored."""
    entry = MetricEntry(name, MetricSpec(*saved["spec"]), None)
    if "total" in saved:
        entry.total, entry.weight = torch.tensor(saved["total"], dtype=torch.float64), saved["weight"]
    elif "values" in saved:
        entry.total = torch.tensor(saved["values"], dtype=torch.float64)
    return entry


def sum_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the states of several ranks' MetricBuffers into one rank's."""
    merged: dict[str, Any] = {}
    for name in dict.fromkeys(chain.from_iterable(states)):
        saved_entries = [state[name] for state in states if name in state]
        merged[name] = dict(saved_entries[0])
        if "values" in saved_entries[0]:
            merged[name]["values"] = interleave([saved["values"] for saved in saved_entries])
        elif "total" in saved_entries[0]:
            totals = torch.tensor([saved["total"] for saved in saved_entries], dtype=torch.float64)
            reduction = MetricSpec(*saved_entries[0]["spec"]).reduction
            fold = torch.sum if reduction == "mean" else _REDUCTIONS[str(reduction)]
            merged[name].update(total=float(fold(totals)), weight=sum(saved["weight"] for saved in saved_entries))
    return merged


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


def _combine_totals(reduction: Reduction, total: Tensor, folded: Tensor) -> Tensor:
    total = total.to(folded.device)
    if reduction in ("mean", "sum"):
        return total + folded
    if isinstance(reduction, str):
        return torch.minimum(total, folded) if reduction == "min" else torch.maximum(total, folded)
    return torch.cat([total, folded])

"""MetricBuffer: what `self.log` keeps on the device until an interval's end, and its reduction over ranks. Worker."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raylit.errors import ConfigError
from raylit.messages import Metric, Metrics
from raylit.worker.data import batch_size_of
from raylit.worker.peers import Peers

_NUM_KEPT = 256
"""Values of an epoch's metric that are kept before they are added up; bounds memory, saves a torch call per step."""

Reduction = str | Callable[[Tensor], Tensor]
_Spec = tuple[int, Reduction, bool, bool, bool, bool]
"""dataloader_idx, reduction, prog_bar, logger, on_step, on_epoch: what all ranks must agree on to read a name."""
_Layout = list[tuple[str, _Spec]]


class _Entry:
    """One logged name."""

    __slots__ = (
        "asked", "dataloader_idx", "last", "logger", "name", "on_epoch", "on_step", "prog_bar", "reduction", "total",
        "values", "weight", "weights",
    )  # fmt: skip

    def __init__(self, name: str, spec: _Spec, asked: tuple[Any, ...] | None) -> None:
        self.name = name
        self.asked = asked
        """The arguments of the first `self.log`, None for an entry that comes from a checkpoint."""
        self.dataloader_idx, self.reduction, self.prog_bar, self.logger, self.on_step, self.on_epoch = spec
        self.last: Any = None
        self.values: list[Any] = []
        self.weights: list[float] = []
        self.total: Any = None
        """Sum, minimum or maximum so far, float64 on the device; for a function of the user's all the values."""
        self.weight = 0.0

    @property
    def spec(self) -> _Spec:
        return self.dataloader_idx, self.reduction, self.prog_bar, self.logger, self.on_step, self.on_epoch

    def fold(self) -> None:
        """Add the kept values up, in float64 and without waiting for the device."""
        if not self.values:
            return
        values = _stacked(self.values)
        if self.reduction == "mean":
            weights = torch.tensor(self.weights, dtype=torch.float64).to(values.device, non_blocking=True)
            folded = (values * weights).sum()
        elif isinstance(self.reduction, str):
            folded = _REDUCTIONS[self.reduction](values)
        else:
            folded = values
        self.total = folded if self.total is None else _combined(self.reduction, self.total, folded)
        self.weight += sum(self.weights)
        self.values, self.weights = [], []


_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": torch.mean,
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
}
_SAME = {torch.mean: "mean", torch.sum: "sum", torch.min: "min", torch.max: "max", min: "min", max: "max", sum: "sum"}


class MetricBuffer:
    """The metrics of one loop. Reading is collective; logging is local and free of device syncs."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._entries: dict[str, _Entry] = {}
        self._step_layout: _Layout = []
        self.is_training_batch = False
        """Inside a training batch: `on_step` is the default; else `on_epoch` is."""
        self.is_muted = False
        """What is logged counts for nothing."""
        self.batch: Any = None
        """The batch under way; its size weighs the epoch's means."""
        self._sized_batch: Any = None
        self._size = 1
        self.dataloader_idx: int | None = None
        """Set where an evaluation has several loaders: names then get `/dataloader_idx_N`."""

    def log_step(self, name: str, value: Any) -> None:
        """A value of this step alone, for the loggers."""
        self.log(name, value, False, True, True, False, "mean", None, False)

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        batch_size: int | None,
        add_dataloader_idx: bool,
    ) -> None:
        """Keep a value. A tensor stays on its device."""
        if self.is_muted:
            return
        if self.dataloader_idx is not None and add_dataloader_idx:
            name = f"{name}/dataloader_idx_{self.dataloader_idx}"
        # A function may be made anew in every step; only its being one is compared.
        asked = (prog_bar, logger, on_step, on_epoch, reduce_fx if type(reduce_fx) is str else "function")
        entry = self._entries.get(name)
        if entry is None or entry.asked != asked:
            entry = self._declare(name, value, asked, reduce_fx)
        if isinstance(value, Tensor):
            value = value.detach()
        elif not isinstance(value, (int, float)):
            value = float(value)
        entry.last = value
        if entry.on_epoch:
            entry.values.append(value)
            entry.weights.append(float(batch_size or self._batch_size()))
            if len(entry.values) >= _NUM_KEPT:
                entry.fold()

    def _declare(self, name: str, value: Any, asked: tuple[Any, ...], reduce_fx: Any) -> _Entry:
        _check_scalar(name, value)
        known = self._entries.get(name)
        if known is not None and known.asked is None:
            known.asked = asked
            return known
        if known is not None:
            raise ConfigError(
                f"self.log({name!r}) is called with other arguments than before in the same loop: "
                f"{asked} after {known.asked} (prog_bar, logger, on_step, on_epoch, reduce_fx)"
            )
        prog_bar, logger, on_step, on_epoch, _ = asked
        spec = (
            self.dataloader_idx or 0,
            _reduction(name, reduce_fx),
            bool(prog_bar),
            True if logger is None else bool(logger),
            self.is_training_batch if on_step is None else bool(on_step),
            not self.is_training_batch if on_epoch is None else bool(on_epoch),
        )
        entry = self._entries[name] = _Entry(name, spec, asked)
        return entry

    def _batch_size(self) -> int:
        if self._sized_batch is not self.batch:
            self._sized_batch, self._size = self.batch, batch_size_of(self.batch)
        return self._size

    # Reading

    def latest(self, *, only_prog_bar: bool = False) -> dict[str, float]:
        """This rank's own last values, by the names that steps go by. Waits for the device."""
        entries = [entry for entry in self._entries.values() if entry.on_step and entry.last is not None]
        return {_step_name(entry): float(entry.last) for entry in entries if entry.prog_bar or not only_prog_bar}

    def read_step(self, *, stop_wish: bool = False) -> tuple[Metrics, bool]:
        """The last values of `on_step` metrics, reduced over the ranks that have one, and whether any rank wishes a
        stop. One collective; a second one when a rank logs a name for the first time."""
        entries = {name: entry for name, entry in self._entries.items() if entry.on_step}
        layout, rows, is_stop_wished = self._gather(entries, self._step_layout, _last_value, stop_wish)
        self._step_layout = layout
        metrics: Metrics = {}
        for index, (name, spec) in enumerate(layout):
            values, is_present = rows[:, 2 * index], rows[:, 2 * index + 1] > 0
            if is_present.any():
                metrics.update(_published(name, _across(values[is_present], spec[1]), spec, suffix="step"))
        return metrics, is_stop_wished

    def read_epoch(self) -> tuple[Metrics, dict[str, int]]:
        """The `on_epoch` metrics over all batches of all ranks, and the loader of each; empties the buffer.

        One collective, one more where the names have to be agreed on, one for each reduction that is a function.
        """
        entries = {name: entry for name, entry in self._entries.items() if entry.on_epoch}
        for entry in entries.values():
            entry.fold()
        layout, rows, _ = self._gather(entries, [], _total_and_weight, False)
        metrics: Metrics = {}
        loaders: dict[str, int] = {}
        for index, (name, spec) in enumerate(layout):
            totals, weights = rows[:, 2 * index], rows[:, 2 * index + 1]
            reduction = spec[1]
            if callable(reduction):
                value = self._applied(reduction, entries.get(name))
            elif reduction == "mean":
                value = float(totals.sum() / weights.sum())
            else:
                value = _across(totals[weights > 0], reduction)
            published = _published(name, value, spec, suffix="epoch")
            metrics.update(published)
            loaders.update(dict.fromkeys(published, spec[0]))
        self._entries = {name: entry for name, entry in self._entries.items() if not entry.on_epoch}
        return metrics, loaders

    def _applied(self, reduction: Callable[[Tensor], Tensor], entry: _Entry | None) -> float:
        own = entry.total.tolist() if entry is not None and entry.total is not None else []
        values = [value for values in self._peers.gather_objects(own) for value in values]
        return float(reduction(torch.tensor(values)))

    def _gather(
        self,
        entries: dict[str, _Entry],
        layout: _Layout,
        number_of: Callable[[_Entry | None], tuple[Any, float]],
        stop_wish: bool,
    ) -> tuple[_Layout, Tensor, bool]:
        """A row of (value, weight) pairs for each rank, in the order of a layout that all ranks agree on."""
        while True:
            known = {name for name, _ in layout}
            unknown = {name: entry.spec for name, entry in entries.items() if name not in known}
            pairs = [number_of(entries.get(name)) for name, _ in layout]
            own = [*(number for pair in pairs for number in pair), float(bool(unknown)), float(stop_wish)]
            rows = self._peers.gather_vector(_stacked(own).cpu())
            if not rows[:, -2].any():
                return layout, rows, bool(rows[:, -1].any())
            merged = dict(layout)
            for specs in self._peers.gather_objects(unknown):
                merged.update(specs)
            layout = sorted(merged.items(), key=lambda item: item[0])

    # In a checkpoint

    def state_dict(self) -> dict[str, Any]:
        """The unfinished epoch's sums, in plain values; metrics reduced by a function of the user's are left out."""
        state: dict[str, Any] = {}
        for name, entry in self._entries.items():
            entry.fold()
            if entry.on_epoch and entry.total is not None and isinstance(entry.reduction, str):
                state[name] = {"spec": entry.spec, "total": float(entry.total), "weight": entry.weight}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, kept in state.items():
            entry = self._entries[name] = _Entry(name, tuple(kept["spec"]), None)
            entry.total = torch.tensor(kept["total"], dtype=torch.float64)
            entry.weight = kept["weight"]


def _last_value(entry: _Entry | None) -> tuple[Any, float]:
    return (0.0, 0.0) if entry is None or entry.last is None else (entry.last, 1.0)


def _total_and_weight(entry: _Entry | None) -> tuple[Any, float]:
    if entry is None or entry.total is None or callable(entry.reduction):
        return 0.0, 0.0
    return entry.total, entry.weight


def _published(name: str, value: float, spec: _Spec, *, suffix: str) -> Metrics:
    """The names under which a value is seen: `x`, or `x_step` and `x_epoch` where both were asked for."""
    _, _, prog_bar, logger, on_step, on_epoch = spec
    if not (on_step and on_epoch):
        return {name: Metric(value=value, prog_bar=prog_bar, logger=logger)}
    return {
        _forked(name, suffix): Metric(value=value, prog_bar=prog_bar, logger=logger),
        name: Metric(value=value, prog_bar=False, logger=False, is_alias=True),
    }


def _step_name(entry: _Entry) -> str:
    return _forked(entry.name, "step") if entry.on_epoch else entry.name


def _forked(name: str, suffix: str) -> str:
    base, separator, loader = name.partition("/dataloader_idx_")
    return f"{base}_{suffix}{separator}{loader}"


def _combined(reduction: Reduction, total: Tensor, folded: Tensor) -> Tensor:
    total = total.to(folded.device)
    if reduction in ("mean", "sum"):
        return total + folded
    if isinstance(reduction, str):
        return torch.minimum(total, folded) if reduction == "min" else torch.maximum(total, folded)
    return torch.cat([total, folded])


def _across(values: Tensor, reduction: Reduction) -> float:
    return float(_REDUCTIONS[reduction](values) if isinstance(reduction, str) else reduction(values.float()))


def _stacked(values: list[Any]) -> Tensor:
    """Scalars, on any device, as one float64 vector."""
    devices = {value.device for value in values if isinstance(value, Tensor)}
    if not devices:
        return torch.tensor(values, dtype=torch.float64)
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    return torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device).reshape(()) for value in values])


def _check_scalar(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ConfigError(f"self.log({name!r}): a tensor of shape {tuple(value.shape)}; must have one element")
        return
    try:
        float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"self.log({name!r}, {value!r}): must be a number or a tensor with one element") from None


def _reduction(name: str, reduce_fx: Any) -> Reduction:
    if isinstance(reduce_fx, str) and reduce_fx in ("mean", "avg", "sum", "min", "max"):
        return "mean" if reduce_fx == "avg" else reduce_fx
    if callable(reduce_fx):
        return _SAME.get(reduce_fx, reduce_fx)
    raise ConfigError(f"self.log({name!r}, reduce_fx={reduce_fx!r}): must be 'mean', 'sum', 'min', 'max' or a function")

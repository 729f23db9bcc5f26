"""Buffer of logged values on their device until the logging interval or the epoch ends, and their reduction."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from raylit.compat.torch_metrics import is_metric, read_num_updates
from raylit.errors import ConfigError
from raylit.protocol.messages import Metric, Metrics
from raylit.worker.collectives import Collectives
from raylit.worker.data.batches import get_batch_size
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.reductions import (
    FUNCTION,
    OBJECT,
    REDUCTIONS,
    Reduction,
    apply_reduction,
    check_scalar,
    combine_totals,
    fork_name,
    interleave,
    reduce_epoch,
    reduce_step,
    resolve_reduction,
    stack_values,
    warn_of_missing_function,
)

MAX_KEPT_VALUES = 256
"""Values of an epoch's metric that are kept before they are summed; bounds memory, saves a torch call per step."""


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
        return REDUCTIONS[reduction](together) if isinstance(reduction, str) else reduction(together)

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
            folded = REDUCTIONS[reduction](values)
        else:
            folded = values
        self.total = folded if self.total is None else combine_totals(reduction, self.total, folded)
        self.values, self.weights = [], []

    def stack(self) -> Tensor:
        try:
            return stack_values(self.values)
        except RuntimeError as error:
            shapes = {tuple(value.shape) for value in self.values if isinstance(value, Tensor)}
            raise ConfigError(f"self.log({self.name!r}) got tensors of shapes {shapes}: one element each") from error


_Layout = list[tuple[str, MetricSpec]]


class MetricBuffer:
    """Metrics of one loop. Reading is collective; logging is local and does not wait for the device."""

    def __init__(self, collectives: Collectives, *, is_evaluation: bool = False) -> None:
        self._collectives = collectives
        self._is_evaluation = is_evaluation
        self._entries: dict[str, MetricEntry] = {}
        self._global_entries: dict[str, MetricEntry] = {}
        self._previous_entries: dict[str, MetricEntry] = {}
        """During the hooks at an epoch's end: the entries that the epoch's batches have logged."""
        self._step_layout: _Layout = []
        self.is_training_batch = False
        """Inside a training batch, where `on_step` is the default; elsewhere `on_epoch` is."""
        self.is_suspended = False
        """Logged values are discarded."""
        self.is_piece = False
        """A piece of the batch is processed, in truncated back-propagation."""
        self.batch: Any = None
        """The current batch; its size is its weight in the epoch's means."""
        self.global_batch_idx: int | None = None
        """In an evaluation: the batch's index in a single-process pass over the loader."""
        self.num_global_batches: dict[int, int] = {}
        """In an evaluation: batches of each loader, over all ranks once `step_rows` is filled."""
        self._sized_batch: Any = None
        self._size = 1
        self.dataloader_idx: int | None = None
        """Index of the loader where an evaluation has several; names then get `/dataloader_idx_N`."""
        self._newest_logs: dict[int, tuple[MetricEntry, int]] = {}
        """By torchmetrics object: the entry under which it was logged last, and its number of updates then."""
        self.defaults: set[str] = set()
        """Names that are logged only by default, because no better value was given."""
        self._suppressed_names: set[str] = set()
        self.step_rows: list[tuple[int, int, Metrics]] = []
        """After an evaluation: (dataloader_idx, global_batch_idx, metrics) of each batch, for `on_step` metrics."""

    def log_step(self, name: str, value: Any) -> None:
        """Log a value of this step alone, for the loggers."""
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
        batch_size: int | Tensor | None,
        add_dataloader_idx: bool,
    ) -> None:
        """Buffer a value; a tensor stays on its device.

        With `batch_size=0` the value does not count in an epoch's mean. The other arguments are those of `self.log`.

        Raises:
            ConfigError: The value or the arguments are not allowed, or differ from an earlier call.
        """
        if self.is_suspended:
            return
        if self.dataloader_idx is not None and add_dataloader_idx:
            name = f"{name}/dataloader_idx_{self.dataloader_idx}"
        # A function may be created anew in every step, so functions are not compared with each other.
        arguments = (prog_bar, logger, on_step, on_epoch, reduce_fx if type(reduce_fx) is str else "function")
        entry = self._entries.get(name)
        if entry is None or entry.arguments != arguments:
            entry = self._declare(name, value, arguments, reduce_fx)
        if isinstance(value, Tensor):
            value = value.detach()
        elif not isinstance(value, (int, float)):
            if entry.spec.reduction == OBJECT:
                self._log_object(entry, value)
                return
            value = float(value)
        entry.last = value
        entry.is_fresh = True
        if entry.rows is not None:
            entry.rows.append((self.global_batch_idx or 0, value))
        if entry.on_epoch:
            entry.values.append(value)
            weight = self.get_batch_size() if batch_size is None else batch_size
            # A tensor, such as a count of unmasked elements, stays on its device too.
            entry.weights.append(weight.detach() if isinstance(weight, Tensor) else float(weight))
            if len(entry.values) >= MAX_KEPT_VALUES:
                entry.fold()

    def _log_object(self, entry: MetricEntry, metric: Any) -> None:
        """Buffer a torchmetrics object, which keeps the epoch's value itself, and the batch's value if it has one."""
        self._check_alternating_names(entry, metric)
        entry.object, entry.loader = metric, self.dataloader_idx or 0
        value = torchmetrics_adapter.read_step_value(entry.name, metric) if entry.spec.on_step else None
        if value is None:
            return
        entry.last, entry.is_fresh = value, True
        if entry.rows is not None:
            entry.rows.append((self.global_batch_idx or 0, value))

    def _check_alternating_names(self, entry: MetricEntry, metric: Any) -> None:
        """Check that an object is not logged under two names in different batches.

        The object has one state, which would mix both names' batches. Two names that are always logged together are
        allowed.

        Raises:
            ConfigError: The names alternate.
        """
        count = read_num_updates(metric)
        last_entry, last_count = self._newest_logs.get(id(metric), (entry, 0))
        if (
            last_entry is not entry
            and entry.num_updates < last_count < count
            and entry.on_epoch
            and last_entry.on_epoch
        ):
            raise ConfigError(
                f"self.log({last_entry.name!r}) and self.log({entry.name!r}) are given one {type(metric).__name__} in "
                "different batches: it has one state, so that neither name would have a value of its own. Give each "
                "name an object of its own, such as metric.clone()"
            )
        entry.num_updates = count
        self._newest_logs[id(metric)] = (entry, count)

    def end_loader(self, index: int) -> None:
        """End one of several loaders: set its states of the objects apart.

        The next loader may update the same objects.
        """
        states: dict[int, torchmetrics_adapter.State] = {}
        for entry in self._entries.values():
            if entry.object is None or entry.loader != index:
                continue
            parts = torchmetrics_adapter.find_metrics(entry.object)
            for part in parts:
                if id(part) not in states:
                    states[id(part)] = torchmetrics_adapter.detach_state(part)
            entry.segments[index] = [states[id(part)] for part in parts]

    def end_loaders(self) -> None:
        """End the last of several loaders: load each object's states from all loaders, for hooks that read it."""
        logged = [entry for entry in self._entries.values() if entry.object is not None]
        in_several = torchmetrics_adapter.restore_segments((entry.object, entry.segments) for entry in logged)
        for entry in logged:
            if not any(id(part) in in_several for part in torchmetrics_adapter.find_metrics(entry.object)):
                entry.segments = {}

    def discard_objects(self) -> None:
        """Reset the objects of a run that ends before their values are read."""
        for entry in chain(self._entries.values(), self._global_entries.values(), self._previous_entries.values()):
            if entry.object is not None:
                torchmetrics_adapter.reset(entry.object)
                entry.segments = {}

    @property
    def objects(self) -> list[Any]:
        """The torchmetrics objects that were logged in the current epoch."""
        return [entry.object for entry in self._entries.values() if entry.object is not None]

    def record(
        self,
        name: str,
        value: Any,
        *,
        prog_bar: bool,
        logger: bool,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        piece_fx: Any = None,
        add_dataloader_idx: bool = True,
    ) -> None:
        """Buffer a value from a step's output, as `log` does.

        A value is shown where any batch requests it; a name that the module also passes to `self.log` is left to that.
        `piece_fx` reduces the values of a batch's pieces to one.
        """
        if self.is_suspended:
            return
        has_index = self.dataloader_idx is not None and add_dataloader_idx
        full_name = f"{name}/dataloader_idx_{self.dataloader_idx}" if has_index else name
        entry = self._entries.get(full_name)
        if entry is not None and entry.arguments is not None:
            if not entry.is_from_output:
                return
            entry.widen(prog_bar, logger)
            prog_bar, logger, on_step, on_epoch, _ = entry.arguments
        if self.is_piece and piece_fx is not None and entry is not None:
            value = entry.add_piece(value, self.batch, piece_fx)
        self.log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, None, add_dataloader_idx)
        if entry is None:
            entry = self._entries[full_name]
            entry.start_pieces(value, self.batch)
        entry.is_from_output = True

    @contextmanager
    def already_reduced(self) -> Iterator[None]:
        """Treat values logged inside the context as reduced over all ranks already.

        They are not reduced again, and replace what the batches have logged under the same name.
        """
        batches = self._entries
        self._entries = self._global_entries
        try:
            yield
        finally:
            self._entries = batches

    @contextmanager
    def override_logged(self) -> Iterator[None]:
        """Let values logged by the hooks at an epoch's end replace those of the batches under the same name."""
        batches, self._entries = self._entries, {}
        self._previous_entries = batches
        try:
            yield
        finally:
            self._previous_entries = {}
            for name in self._entries.keys() & batches.keys():
                if (previous_object := batches[name].object) not in (None, self._entries[name].object):
                    torchmetrics_adapter.reset(previous_object)
            self._entries = {**batches, **self._entries}

    def suppress(self, evaluated: Metrics) -> None:
        """Stop publishing names for which validation has a better value.

        These are its own `early_stop_on` and `checkpoint_on`, and with `val_loss` a loss that is `checkpoint_on` by
        default.
        """
        self._suppressed_names.update({"early_stop_on", "checkpoint_on"} & evaluated.keys())
        if "val_loss" in evaluated:
            self._suppressed_names.update(self.defaults)

    def _declare(self, name: str, value: Any, arguments: tuple[Any, ...], reduce_fx: Any) -> MetricEntry:
        is_object = is_metric(value)
        if not is_object:
            check_scalar(name, value)
        known = self._entries.get(name)
        if known is not None and (known.arguments is None or known.is_from_output):
            known.arguments, known.is_from_output = arguments, False
            if known.spec.reduction == FUNCTION:
                known.spec = known.spec._replace(reduction=resolve_reduction(name, reduce_fx))
            return known
        if known is not None:
            raise ConfigError(
                f"self.log({name!r}) is called with other arguments than before in the same loop: "
                f"{arguments} after {known.arguments} (prog_bar, logger, on_step, on_epoch, reduce_fx)"
            )
        if "/dataloader_idx_" in name.removesuffix(f"/dataloader_idx_{self.dataloader_idx}"):
            raise ConfigError(
                f"self.log({name!r}): leave /dataloader_idx_... out, several loaders get it by themselves"
            )
        prog_bar, logger, on_step, on_epoch, _ = arguments
        if on_step and self.batch is None and not self.is_training_batch:
            raise ConfigError(f"self.log({name!r}, on_step=True) outside of a batch: pass on_epoch=True instead")
        spec = MetricSpec(
            dataloader_idx=self.dataloader_idx or 0,
            reduction=OBJECT if is_object else resolve_reduction(name, reduce_fx),
            prog_bar=bool(prog_bar),
            logger=True if logger is None else bool(logger),
            on_step=self.is_training_batch if on_step is None else bool(on_step),
            on_epoch=not self.is_training_batch if on_epoch is None else bool(on_epoch),
        )
        entry = self._entries[name] = MetricEntry(name, spec, arguments)
        if spec.on_step and self._is_evaluation:
            entry.rows = []
        return entry

    def get_batch_size(self) -> int:
        """Return the number of samples in the last batch, as `raylit.worker.data.batches.get_batch_size` finds it."""
        if self._sized_batch is not self.batch:
            self._sized_batch, self._size = self.batch, get_batch_size(self.batch)
        return self._size

    def latest(self, *, only_prog_bar: bool = False) -> dict[str, float]:
        """Return this rank's last values by the names of their steps; waits for the device.

        In the hooks at an epoch's end it includes this rank's values of the epoch.
        """
        epoch_values = {} if only_prog_bar else compute_local_values(self._previous_entries.values())
        entries = [entry for entry in self._entries.values() if entry.spec.on_step and entry.last is not None]
        shown_entries = [entry for entry in entries if entry.spec.prog_bar or not only_prog_bar]
        steps = {entry.spec.step_name(entry.name): float(entry.last) for entry in shown_entries}
        return {**{name: value for name, value in epoch_values.items() if name not in self._suppressed_names}, **steps}

    def read_step(
        self, *, stop_wish: bool = False, own_numbers: Sequence[float] = ()
    ) -> tuple[Metrics, bool, list[list[float]]]:
        """Reduce the `on_step` values that are new since the last reading over the ranks that have one.

        One collective; a second one when a rank logs a name for the first time.

        Args:
            stop_wish: This rank wishes to stop.
            own_numbers: Further numbers of this rank, as many as those of the other ranks.

        Returns:
            The metrics, whether any rank wishes to stop, and each rank's further numbers.
        """
        entries = {name: entry for name, entry in self._entries.items() if entry.spec.on_step and entry.is_fresh}
        layout, rows, is_stop_wished = self._gather(
            entries, self._step_layout, read_last_value, stop_wish, own_numbers=own_numbers
        )
        self._step_layout = layout
        metrics: Metrics = {}
        for index, (name, spec) in enumerate(layout):
            values, is_present = rows[:, 2 * index], rows[:, 2 * index + 1] > 0
            if is_present.any():
                metrics.update(spec.publish(name, reduce_step(values[is_present], spec.reduction), suffix="step"))
        for entry in entries.values():
            entry.is_fresh = False
        return metrics, is_stop_wished, rows[:, 2 * len(layout) : -2].tolist()

    def read_epoch(self) -> tuple[Metrics, dict[str, int]]:
        """Reduce the `on_epoch` metrics over all batches of all ranks and remove them from the buffer.

        One collective and one more where the names have to be agreed on, one for each reduction that is a function, two
        for all torchmetrics objects, one for the `on_step` values of an evaluation.

        Returns:
            The metrics, and the index of each name's loader.
        """
        entries = {name: entry for name, entry in self._entries.items() if _belongs_to_epoch(entry)}
        entries.update({name: entry for name, entry in self._global_entries.items() if entry.object is not None})
        for entry in entries.values():
            entry.fold()
        layout, rows, _ = self._gather(entries, [], read_total_and_weight, False)
        values: dict[str, float] = {}
        for index, (name, spec) in enumerate(layout):
            totals, weights = rows[:, 2 * index], rows[:, 2 * index + 1]
            if callable(spec.reduction):
                values[name] = self._apply_function(spec.reduction, entries.get(name))
            elif spec.reduction == FUNCTION and self._collectives.rank == 0:
                warn_of_missing_function(name)
            elif spec.reduction == "mean" or weights.any():
                is_present = weights > 0
                # The mean is nan if all batches are empty.
                values[name] = reduce_epoch(totals[is_present], weights[is_present], spec.reduction)
        values.update(
            self._compute_objects({name: entries.get(name) for name, spec in layout if spec.reduction == OBJECT})
        )
        self.step_rows = self._gather_step_rows(layout, entries)
        published = [
            (spec, spec.publish(name, values[name], suffix="epoch"))
            for name, spec in layout
            if name in values and spec.on_epoch
        ]
        self._entries = {name: entry for name, entry in self._entries.items() if name not in entries}
        return self._add_global_entries(published)

    def _add_global_entries(self, published: list[tuple[MetricSpec, Metrics]]) -> tuple[Metrics, dict[str, int]]:
        """Add values that are reduced already, which are equal on all ranks."""
        entries = [entry for entry in self._global_entries.values() if entry.object is None]
        self._global_entries = {}
        for entry in entries:
            value = compute_local_value(entry)
            assert value is not None
            published.append((entry.spec, entry.spec.publish(entry.name, value, suffix="epoch")))
        metrics: Metrics = {}
        loaders: dict[str, int] = {}
        for spec, named in published:
            visible = {name: metric for name, metric in named.items() if name not in self._suppressed_names}
            metrics.update(visible)
            loaders.update(dict.fromkeys(visible, spec.dataloader_idx))
        return metrics, loaders

    def _apply_function(self, reduction: Callable[[Tensor], Tensor], entry: MetricEntry | None) -> float:
        values = entry.total.tolist() if entry is not None and entry.total is not None else []
        return apply_reduction(reduction, interleave(self._collectives.gather_objects(values)))

    def _compute_objects(self, entries: dict[str, MetricEntry | None]) -> dict[str, float]:
        """Compute torchmetrics objects over the states of all ranks, and reset them. Collective."""
        if not entries:
            return {}
        objects = {name: entry.object for name, entry in entries.items() if entry is not None}
        on_epoch = [name for name, entry in entries.items() if entry is not None and entry.on_epoch]
        segments_by_name = {
            name: torchmetrics_adapter.copy_segments(entry.object, entry.segments)
            for name, entry in entries.items()
            if entry is not None
        }
        segments_of_ranks = self._collectives.gather_objects(segments_by_name)
        values = {}
        for name in on_epoch:
            entry = entries[name]
            assert entry is not None
            is_local = self._collectives.world_size == 1 and not entry.segments
            ranked = [states[name] for states in segments_of_ranks if name in states]
            segments = None if is_local else torchmetrics_adapter.order_segments(ranked)
            values[name] = torchmetrics_adapter.compute_value(name, entry.object, segments)
        self._newest_logs = {}
        for metric in objects.values():
            torchmetrics_adapter.reset(metric)
        # A rank without a batch has no object but needs the value too.
        return dict(chain.from_iterable(one.items() for one in reversed(self._collectives.gather_objects(values))))

    def _gather_step_rows(self, layout: _Layout, entries: dict[str, MetricEntry]) -> list[tuple[int, int, Metrics]]:
        specs = {name: spec for name, spec in layout if spec.on_step}
        if not specs or not self._is_evaluation:
            return []
        rows_by_name = {name: _split_rows(entry.rows) for name, entry in entries.items() if entry.rows}
        rows: dict[tuple[int, int], Metrics] = {}
        for named, num_batches in self._collectives.gather_objects((rows_by_name, dict(self.num_global_batches))):
            self.num_global_batches.update(
                {index: max(num, self.num_global_batches.get(index, 0)) for index, num in num_batches.items()}
            )
            for name, (indices, values) in named.items():
                spec = specs[name]
                for global_batch_idx, value in zip(indices, values, strict=True):
                    metric = Metric(value=value, prog_bar=spec.prog_bar, logger=spec.logger)
                    rows.setdefault((spec.dataloader_idx, global_batch_idx), {})[spec.step_name(name)] = metric
        return [
            (loader, global_batch_idx, metrics)
            for (loader, global_batch_idx), metrics in sorted(rows.items(), key=lambda item: item[0])
        ]

    def _gather(
        self,
        entries: dict[str, MetricEntry],
        layout: _Layout,
        read_numbers: Callable[[MetricEntry | None], tuple[Any, float]],
        stop_wish: bool,
        *,
        own_numbers: Sequence[float] = (),
    ) -> tuple[_Layout, Tensor, bool]:
        """Gather (value, weight) pairs of all ranks as rows, in the order of a layout that all ranks agree on.

        Collective. In each row the rank's own numbers and two flags follow the pairs. Also returns the layout and
        whether any rank wishes to stop.
        """
        while True:
            known = dict(layout)
            unknown = {name: entry.spec for name, entry in entries.items() if _is_new(entry.spec, known.get(name))}
            pairs = [read_numbers(entries.get(name)) for name, _ in layout]
            values = [number for pair in pairs for number in pair]
            numbers = [*values, *own_numbers, float(bool(unknown)), float(stop_wish)]
            rows = self._collectives.gather_vector(stack_values(numbers).cpu())
            if not rows[:, -2].any():
                return layout, rows, bool(rows[:, -1].any())
            for specs in self._collectives.gather_objects(unknown):
                for name, spec in specs.items():
                    known[name] = spec if name not in known else known[name].merge(spec)
            layout = sorted(known.items(), key=lambda item: item[0])

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return the unfinished epoch's sums, in plain values.

        For torchmetrics objects only their names in the module: their states are saved apart.
        """
        state: dict[str, Any] = {}
        for name, entry in self._entries.items():
            entry.fold()
            if entry.object is not None:
                if (path := torchmetrics_adapter.find_path(module, entry.object)) is not None:
                    state[name] = {"spec": tuple(entry.spec), "object": path}
            elif (saved := save_entry(entry)) is not None:
                state[name] = saved
        return state

    def load_state_dict(self, state: dict[str, Any], module: nn.Module) -> None:
        for name, saved in state.items():
            entry = self._entries[name] = load_entry(name, saved)
            if "object" in saved:
                entry.object = dict(module.named_modules()).get(saved["object"])


def read_last_value(entry: MetricEntry | None) -> tuple[Any, float]:
    return (0.0, 0.0) if entry is None or entry.last is None else (entry.last, 1.0)


def read_total_and_weight(entry: MetricEntry | None) -> tuple[Any, Any]:
    """Return the entry's total and weight; a weight of 0.0 if this rank has no value."""
    if entry is None or entry.total is None or entry.total.ndim > 0:
        return 0.0, 0.0
    return entry.total, entry.weight if entry.spec.reduction == "mean" else 1.0


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
            fold = torch.sum if reduction == "mean" else REDUCTIONS[str(reduction)]
            merged[name].update(total=float(fold(totals)), weight=sum(saved["weight"] for saved in saved_entries))
    return merged


def compute_local_value(entry: MetricEntry) -> float | None:
    """Reduce an entry's batches so far on this rank; None if there are none.

    Waits for the device; the entry keeps its values.
    """
    entry.fold()
    reduction = entry.spec.reduction
    if entry.object is not None and entry.segments:
        with torchmetrics_adapter.detach_metric(entry.object):
            segments = [[entry.segments[index]] for index in sorted(entry.segments)]
            return torchmetrics_adapter.compute_value(entry.name, entry.object, segments)
    if entry.object is not None:
        return torchmetrics_adapter.compute_value(entry.name, entry.object, None)
    if entry.total is None or reduction == FUNCTION:
        return None
    if callable(reduction):
        return apply_reduction(reduction, entry.total.tolist())
    total, weight = read_total_and_weight(entry)
    return reduce_epoch(stack_values([total]), stack_values([weight]), reduction)


def compute_local_values(entries: Iterable[MetricEntry]) -> dict[str, float]:
    """Reduce entries on this rank; the result has the names of the epoch's values."""
    values = {entry: value for entry in entries if entry.on_epoch and (value := compute_local_value(entry)) is not None}
    published = [entry.spec.publish(entry.name, value, suffix="epoch") for entry, value in values.items()]
    return {name: metric.value for named in published for name, metric in named.items()}


def _belongs_to_epoch(entry: MetricEntry) -> bool:
    return entry.on_epoch or entry.rows is not None or entry.object is not None


def _is_new(spec: MetricSpec, known: MetricSpec | None) -> bool:
    return known is None or (spec.prog_bar and not known.prog_bar) or (spec.logger and not known.logger)


def _split_rows(rows: list[tuple[int, Any]]) -> tuple[list[int], list[float]]:
    """Return the batch indices and the values; waits for the device once."""
    return [index for index, _ in rows], stack_values([value for _, value in rows]).tolist()

"""Logged values on their device until the logging interval or the epoch ends, and their reduction over the ranks."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor, nn

from raylit.compat.torch_metrics import is_metric, read_num_updates
from raylit.errors import ConfigError
from raylit.protocol.messages import Metric, Metrics
from raylit.worker.data.batches import batch_size_of
from raylit.worker.distributed.collectives import Collectives
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.entry import (
    FUNCTION,
    NUM_KEPT,
    OBJECT,
    Entry,
    Spec,
    apply_reduction,
    check_scalar,
    entry_of,
    epoch_across,
    in_turns,
    kept_of,
    last_value,
    reduction_of,
    stack_values,
    step_across,
    total_and_weight,
    warn_of_missing_function,
)


def local_epoch_value(entry: Entry) -> float | None:
    """Over the batches so far; None: there is none. Waits for the device, changes nothing."""
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
    total, weight = total_and_weight(entry)
    return epoch_across(stack_values([total]), stack_values([weight]), reduction)


def local_epoch_values(entries: Iterable[Entry]) -> dict[str, float]:
    """By the names that the epoch's values go by."""
    values = {entry: value for entry in entries if entry.on_epoch and (value := local_epoch_value(entry)) is not None}
    published = [entry.spec.published(entry.name, value, suffix="epoch") for entry, value in values.items()]
    return {name: metric.value for named in published for name, metric in named.items()}


_Layout = list[tuple[str, Spec]]


class MetricBuffer:
    """The metrics of one loop. Reading is collective; logging is local and free of device syncs."""

    def __init__(self, collectives: Collectives, *, is_evaluation: bool = False) -> None:
        self._collectives = collectives
        self._is_evaluation = is_evaluation
        self._entries: dict[str, Entry] = {}
        self._global_entries: dict[str, Entry] = {}
        self._ended: dict[str, Entry] = {}
        """In the hooks at an epoch's end: what its batches have logged."""
        self._step_layout: _Layout = []
        self.is_training_batch = False
        """Inside a training batch: `on_step` is the default; else `on_epoch` is."""
        self.is_suspended = False
        """What is logged counts for nothing."""
        self.is_piece = False
        """A piece of the batch is under way, in truncated back-propagation."""
        self.batch: Any = None
        """The batch under way; its size weighs the epoch's means."""
        self.place: int | None = None
        """In an evaluation: where the batch stands in the data set."""
        self.num_places: dict[int, int] = {}
        """In an evaluation: batches of each loader; of all ranks once there are `step_rows`."""
        self._sized_batch: Any = None
        self._size = 1
        self.dataloader_idx: int | None = None
        """Set where an evaluation has several loaders: names then get `/dataloader_idx_N`."""
        self._newest_logs: dict[int, tuple[Entry, int]] = {}
        """By torchmetrics object: the name under which it was logged last, and how many updates it had then."""
        self.defaults: set[str] = set()
        """Names that were logged only because nobody gave a better value."""
        self._withheld: set[str] = set()
        self.step_rows: list[tuple[int, int, Metrics]] = []
        """Of a finished evaluation: (dataloader_idx, place, metrics) of its batches, for what was logged `on_step`."""

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
        batch_size: int | Tensor | None,
        add_dataloader_idx: bool,
    ) -> None:
        """Keep a value. A tensor stays on its device. With `batch_size=0` it counts for nothing in an epoch's mean."""
        if self.is_suspended:
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
            if entry.spec.reduction == OBJECT:
                self._log_object(entry, value)
                return
            value = float(value)
        entry.last = value
        entry.is_fresh = True
        if entry.rows is not None:
            entry.rows.append((self.place or 0, value))
        if entry.on_epoch:
            entry.values.append(value)
            weight = self._batch_size() if batch_size is None else batch_size
            # A tensor stays on its device, too: a count of unmasked elements, for example.
            entry.weights.append(weight.detach() if isinstance(weight, Tensor) else float(weight))
            if len(entry.values) >= NUM_KEPT:
                entry.fold()

    def _log_object(self, entry: Entry, metric: Any) -> None:
        """A torchmetrics object keeps the epoch's value itself; a batch's is there if the object has computed it."""
        self._check_alone(entry, metric)
        entry.object, entry.loader = metric, self.dataloader_idx or 0
        value = torchmetrics_adapter.step_value(entry.name, metric) if entry.spec.on_step else None
        if value is None:
            return
        entry.last, entry.is_fresh = value, True
        if entry.rows is not None:
            entry.rows.append((self.place or 0, value))

    def _check_alone(self, entry: Entry, metric: Any) -> None:
        """ConfigError: the object has one state for two names that are logged in turns. Under two names that always
        come together it has the same value."""
        count = read_num_updates(metric)
        other, count_then = self._newest_logs.get(id(metric), (entry, 0))
        if other is not entry and entry.num_updates < count_then < count and entry.on_epoch and other.on_epoch:
            raise ConfigError(
                f"self.log({other.name!r}) and self.log({entry.name!r}) are given one {type(metric).__name__} in "
                "different batches: it has one state, so that neither name would have a value of its own. Give each "
                "name an object of its own, such as metric.clone()"
            )
        entry.num_updates = count
        self._newest_logs[id(metric)] = (entry, count)

    def end_loader(self, index: int) -> None:
        """A loader of several is through: what the objects have seen in it is kept apart, as the next loader may update
        the same ones."""
        states: dict[int, torchmetrics_adapter.State] = {}
        for entry in self._entries.values():
            if entry.object is None or entry.loader != index:
                continue
            parts = torchmetrics_adapter.parts_of(entry.object)
            for part in parts:
                if id(part) not in states:
                    states[id(part)] = torchmetrics_adapter.detach_state(part)
            entry.segments[index] = [states[id(part)] for part in parts]

    def end_loaders(self) -> None:
        """All of several are through: hooks that read an object find what it has seen in all of them."""
        segments: dict[int, dict[int, torchmetrics_adapter.State]] = {}
        parts = {}
        for entry in self._entries.values():
            for index, states in entry.segments.items():
                for part, state in zip(torchmetrics_adapter.parts_of(entry.object), states, strict=True):
                    parts[id(part)] = part
                    segments.setdefault(id(part), {})[index] = state
        for key, own in segments.items():
            if len(own) > 1:
                torchmetrics_adapter.load_joined(parts[key], [own[index] for index in sorted(own)])
            else:
                torchmetrics_adapter.attach_state(parts[key], *own.values())
        for entry in self._entries.values():
            if entry.object is not None and all(
                len(segments.get(id(part), {})) <= 1 for part in torchmetrics_adapter.parts_of(entry.object)
            ):
                entry.segments = {}

    def discard_objects(self) -> None:
        """After a run that ends before their values are read: the next one begins afresh."""
        for entry in chain(self._entries.values(), self._global_entries.values(), self._ended.values()):
            if entry.object is not None:
                torchmetrics_adapter.reset(entry.object)
                entry.segments = {}

    @property
    def objects(self) -> list[Any]:
        """The torchmetrics objects that have been logged in the epoch under way."""
        return [entry.object for entry in self._entries.values() if entry.object is not None]

    def file(
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
        """As `log`, for what a step has returned. Where one batch shows a name and another does not, it is shown; a
        name that the module gives to `self.log` too is left to it. `piece_fx` makes one value of those of a batch's
        pieces."""
        if self.is_suspended:
            return
        has_index = self.dataloader_idx is not None and add_dataloader_idx
        full_name = f"{name}/dataloader_idx_{self.dataloader_idx}" if has_index else name
        entry = self._entries.get(full_name)
        if entry is not None and entry.asked is not None:
            if not entry.is_returned:
                return
            entry.widen(prog_bar, logger)
            prog_bar, logger, on_step, on_epoch, _ = entry.asked
        if self.is_piece and piece_fx is not None and entry is not None:
            value = entry.with_pieces(value, self.batch, piece_fx)
        self.log(name, value, prog_bar, logger, on_step, on_epoch, reduce_fx, None, add_dataloader_idx)
        if entry is None:
            entry = self._entries[full_name]
            entry.start_pieces(value, self.batch)
        entry.is_returned = True

    @contextmanager
    def already_reduced(self) -> Iterator[None]:
        """What is logged inside is the value over all ranks already: it is not reduced again, and takes the place of
        what the batches have logged under the same name."""
        batches = self._entries
        self._entries = self._global_entries
        try:
            yield
        finally:
            self._entries = batches

    @contextmanager
    def replacing(self) -> Iterator[None]:
        """Around the hooks at an epoch's end: what they log takes the place of what batches logged under that name."""
        batches, self._entries = self._entries, {}
        self._ended = batches
        try:
            yield
        finally:
            self._ended = {}
            for name in self._entries.keys() & batches.keys():
                if (replaced := batches[name].object) not in (None, self._entries[name].object):
                    torchmetrics_adapter.reset(replaced)
            self._entries = {**batches, **self._entries}

    def suppress(self, evaluated: Metrics) -> None:
        """Do not publish what validation has a better say in: its own `early_stop_on` and `checkpoint_on`, and
        `val_loss` rather than a loss that is `checkpoint_on` by default."""
        self._withheld.update({"early_stop_on", "checkpoint_on"} & evaluated.keys())
        if "val_loss" in evaluated:
            self._withheld.update(self.defaults)

    def _declare(self, name: str, value: Any, asked: tuple[Any, ...], reduce_fx: Any) -> Entry:
        is_object = is_metric(value)
        if not is_object:
            check_scalar(name, value)
        known = self._entries.get(name)
        if known is not None and (known.asked is None or known.is_returned):
            known.asked, known.is_returned = asked, False
            if known.spec.reduction == FUNCTION:
                known.spec = known.spec._replace(reduction=reduction_of(name, reduce_fx))
            return known
        if known is not None:
            raise ConfigError(
                f"self.log({name!r}) is called with other arguments than before in the same loop: "
                f"{asked} after {known.asked} (prog_bar, logger, on_step, on_epoch, reduce_fx)"
            )
        if "/dataloader_idx_" in name.removesuffix(f"/dataloader_idx_{self.dataloader_idx}"):
            raise ConfigError(
                f"self.log({name!r}): leave /dataloader_idx_... out, several loaders get it by themselves"
            )
        prog_bar, logger, on_step, on_epoch, _ = asked
        if on_step and self.batch is None and not self.is_training_batch:
            raise ConfigError(f"self.log({name!r}, on_step=True) outside of a batch: pass on_epoch=True instead")
        spec = Spec(
            dataloader_idx=self.dataloader_idx or 0,
            reduction=OBJECT if is_object else reduction_of(name, reduce_fx),
            prog_bar=bool(prog_bar),
            logger=True if logger is None else bool(logger),
            on_step=self.is_training_batch if on_step is None else bool(on_step),
            on_epoch=not self.is_training_batch if on_epoch is None else bool(on_epoch),
        )
        entry = self._entries[name] = Entry(name, spec, asked)
        if spec.on_step and self._is_evaluation:
            entry.rows = []
        return entry

    def _batch_size(self) -> int:
        if self._sized_batch is not self.batch:
            self._sized_batch, self._size = self.batch, batch_size_of(self.batch)
        return self._size

    # Reading

    def latest(self, *, only_prog_bar: bool = False) -> dict[str, float]:
        """This rank's own last values, by the names that steps go by; in the hooks at an epoch's end its own of the
        epoch. Waits for the device."""
        ended = {} if only_prog_bar else local_epoch_values(self._ended.values())
        entries = [entry for entry in self._entries.values() if entry.spec.on_step and entry.last is not None]
        shown = [entry for entry in entries if entry.spec.prog_bar or not only_prog_bar]
        steps = {entry.spec.step_name(entry.name): float(entry.last) for entry in shown}
        return {**{name: value for name, value in ended.items() if name not in self._withheld}, **steps}

    def read_step(self, *, stop_wish: bool = False) -> tuple[Metrics, bool]:
        """The values of `on_step` metrics that are new since the last reading, reduced over the ranks that have one,
        and whether any rank wishes a stop. One collective; a second one when a rank logs a name for the first time."""
        entries = {name: entry for name, entry in self._entries.items() if entry.spec.on_step and entry.is_fresh}
        layout, rows, is_stop_wished = self._gather(entries, self._step_layout, last_value, stop_wish)
        self._step_layout = layout
        metrics: Metrics = {}
        for index, (name, spec) in enumerate(layout):
            values, is_present = rows[:, 2 * index], rows[:, 2 * index + 1] > 0
            if is_present.any():
                metrics.update(spec.published(name, step_across(values[is_present], spec.reduction), suffix="step"))
        for entry in entries.values():
            entry.is_fresh = False
        return metrics, is_stop_wished

    def read_epoch(self) -> tuple[Metrics, dict[str, int]]:
        """The `on_epoch` metrics over all batches of all ranks, and the loader of each; empties the buffer of them.

        One collective and one more where the names have to be agreed on, one for each reduction that is a function,
        two for all torchmetrics objects, one for the `on_step` values of an evaluation.
        """
        entries = {name: entry for name, entry in self._entries.items() if _belongs_to_epoch(entry)}
        entries.update({name: entry for name, entry in self._global_entries.items() if entry.object is not None})
        for entry in entries.values():
            entry.fold()
        layout, rows, _ = self._gather(entries, [], total_and_weight, False)
        values: dict[str, float] = {}
        for index, (name, spec) in enumerate(layout):
            totals, weights = rows[:, 2 * index], rows[:, 2 * index + 1]
            if callable(spec.reduction):
                values[name] = self._applied(spec.reduction, entries.get(name))
            elif spec.reduction == FUNCTION and self._collectives.rank == 0:
                warn_of_missing_function(name)
            elif spec.reduction == "mean" or weights.any():
                is_present = weights > 0
                # A mean of nothing but empty batches is nan.
                values[name] = epoch_across(totals[is_present], weights[is_present], spec.reduction)
        values.update(self._computed({name: entries.get(name) for name, spec in layout if spec.reduction == OBJECT}))
        self.step_rows = self._gathered_rows(layout, entries)
        published = [
            (spec, spec.published(name, values[name], suffix="epoch"))
            for name, spec in layout
            if name in values and spec.on_epoch
        ]
        self._entries = {name: entry for name, entry in self._entries.items() if name not in entries}
        return self._with_global(published)

    def _with_global(self, published: list[tuple[Spec, Metrics]]) -> tuple[Metrics, dict[str, int]]:
        """Add what was logged as global: every rank has the same."""
        entries = [entry for entry in self._global_entries.values() if entry.object is None]
        self._global_entries = {}
        for entry in entries:
            value = local_epoch_value(entry)
            assert value is not None
            published.append((entry.spec, entry.spec.published(entry.name, value, suffix="epoch")))
        metrics: Metrics = {}
        loaders: dict[str, int] = {}
        for spec, named in published:
            shown = {name: metric for name, metric in named.items() if name not in self._withheld}
            metrics.update(shown)
            loaders.update(dict.fromkeys(shown, spec.dataloader_idx))
        return metrics, loaders

    def _applied(self, reduction: Callable[[Tensor], Tensor], entry: Entry | None) -> float:
        own = entry.total.tolist() if entry is not None and entry.total is not None else []
        return apply_reduction(reduction, in_turns(self._collectives.gather_objects(own)))

    def _computed(self, entries: dict[str, Entry | None]) -> dict[str, float]:
        """The values of torchmetrics objects over the states of all ranks; resets them."""
        if not entries:
            return {}
        objects = {name: entry.object for name, entry in entries.items() if entry is not None}
        on_epoch = [name for name, entry in entries.items() if entry is not None and entry.on_epoch]
        own = {name: _segments_of(entry) for name, entry in entries.items() if entry is not None}
        ranked = self._collectives.gather_objects(own)
        values = {}
        for name in on_epoch:
            entry = entries[name]
            assert entry is not None
            is_alone = self._collectives.world_size == 1 and not entry.segments
            segments = None if is_alone else _in_order([states[name] for states in ranked if name in states])
            values[name] = torchmetrics_adapter.compute_value(name, entry.object, segments)
        self._newest_logs = {}
        for metric in objects.values():
            torchmetrics_adapter.reset(metric)
        # A rank without a batch has no object, and yet is to know the value.
        return dict(chain.from_iterable(one.items() for one in reversed(self._collectives.gather_objects(values))))

    def _gathered_rows(self, layout: _Layout, entries: dict[str, Entry]) -> list[tuple[int, int, Metrics]]:
        specs = {name: spec for name, spec in layout if spec.on_step}
        if not specs or not self._is_evaluation:
            return []
        own = {name: _as_numbers(entry.rows) for name, entry in entries.items() if entry.rows}
        rows: dict[tuple[int, int], Metrics] = {}
        for named, num_places in self._collectives.gather_objects((own, dict(self.num_places))):
            self.num_places.update(
                {index: max(num, self.num_places.get(index, 0)) for index, num in num_places.items()}
            )
            for name, (places, values) in named.items():
                spec = specs[name]
                for place, value in zip(places, values, strict=True):
                    metric = Metric(value=value, prog_bar=spec.prog_bar, logger=spec.logger)
                    rows.setdefault((spec.dataloader_idx, place), {})[spec.step_name(name)] = metric
        return [(loader, place, metrics) for (loader, place), metrics in sorted(rows.items(), key=lambda item: item[0])]

    def _gather(
        self,
        entries: dict[str, Entry],
        layout: _Layout,
        number_of: Callable[[Entry | None], tuple[Any, float]],
        stop_wish: bool,
    ) -> tuple[_Layout, Tensor, bool]:
        """A row of (value, weight) pairs for each rank, in the order of a layout that all ranks agree on."""
        while True:
            known = dict(layout)
            unknown = {name: entry.spec for name, entry in entries.items() if _is_new(entry.spec, known.get(name))}
            pairs = [number_of(entries.get(name)) for name, _ in layout]
            own = [*(number for pair in pairs for number in pair), float(bool(unknown)), float(stop_wish)]
            rows = self._collectives.gather_vector(stack_values(own).cpu())
            if not rows[:, -2].any():
                return layout, rows, bool(rows[:, -1].any())
            for specs in self._collectives.gather_objects(unknown):
                for name, spec in specs.items():
                    known[name] = spec if name not in known else known[name].joined(spec)
            layout = sorted(known.items(), key=lambda item: item[0])

    # In a checkpoint

    def state_dict(self, module: nn.Module) -> dict[str, Any]:
        """The unfinished epoch's sums, in plain values. Of torchmetrics objects their names in the module: their states
        are its own."""
        state: dict[str, Any] = {}
        for name, entry in self._entries.items():
            entry.fold()
            if entry.object is not None:
                if (path := torchmetrics_adapter.path_in(module, entry.object)) is not None:
                    state[name] = {"spec": tuple(entry.spec), "object": path}
            elif (kept := kept_of(entry)) is not None:
                state[name] = kept
        return state

    def load_state_dict(self, state: dict[str, Any], module: nn.Module) -> None:
        for name, kept in state.items():
            entry = self._entries[name] = entry_of(name, kept)
            if "object" in kept:
                entry.object = dict(module.named_modules()).get(kept["object"])


def _belongs_to_epoch(entry: Entry) -> bool:
    return entry.on_epoch or entry.rows is not None or entry.object is not None


def _segments_of(entry: Entry) -> dict[int, list[torchmetrics_adapter.State]]:
    """The states of the entry's object by the loader that they come from, on the CPU."""
    if entry.segments:
        return {index: torchmetrics_adapter.on_cpu(states) for index, states in entry.segments.items()}
    return {0: torchmetrics_adapter.states_of(entry.object)}


def _in_order(
    ranked: list[dict[int, list[torchmetrics_adapter.State]]],
) -> list[list[list[torchmetrics_adapter.State]]]:
    """For each loader in turn the states of the ranks that have any."""
    indices = sorted(set(chain.from_iterable(ranked)))
    return [[own[index] for own in ranked if index in own] for index in indices]


def _is_new(spec: Spec, known: Spec | None) -> bool:
    return known is None or (spec.prog_bar and not known.prog_bar) or (spec.logger and not known.logger)


def _as_numbers(rows: list[tuple[int, Any]]) -> tuple[list[int], list[float]]:
    """Places and values; waits for the device once."""
    return [place for place, _ in rows], stack_values([value for _, value in rows]).tolist()

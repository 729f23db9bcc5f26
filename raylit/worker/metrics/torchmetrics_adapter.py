"""torchmetrics objects: their states over all ranks, computed once, and their way through a checkpoint. Worker.

Their own sync is switched off: it counts on every rank having had a batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from raylit.accelerators.transfer import map_tensors
from raylit.compat.torch_metrics import (
    disable_sync,
    forget_value,
    is_averaging,
    is_concatenating,
    is_metric,
    is_state_changed,
    list_reductions,
    read_forward_value,
    read_num_updates,
    reset_state,
    restore_sync,
    set_num_updates,
)
from raylit.errors import ConfigError
from raylit.worker.distributed.collectives import Collectives
from raylit.worker.metrics.entry import check_scalar, in_turns

State = tuple[int, dict[str, Any]]
"""How often a metric was updated, and its states by name, on the CPU."""


def step_value(name: str, metric: Any) -> Tensor | None:
    """The value of the batch, where `forward` has computed one; Lightning's own choice."""
    value = read_forward_value(metric)
    if value is not None:
        check_scalar(name, value)
    return None if value is None else value.detach()


def states_of(metric: Any) -> list[State]:
    """Of the metric and of those inside it."""
    return [_state_of(part) for part in parts_of(metric)]


def on_cpu(states: list[State]) -> list[State]:
    """Copies, which can be sent to other ranks."""
    return [(count, {name: map_tensors(value, _copied) for name, value in own.items()}) for count, own in states]


def detach_state(part: Any) -> State:
    """The states of a metric without those inside it. They are not copied: the metric gets fresh ones instead."""
    count = _count_of(part)
    states = {name: getattr(part, name) for name in list_reductions(part)}
    # States made in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        for name in states:
            reset_state(part, name)
    set_num_updates(part, 0)
    return count, states


def attach_state(part: Any, state: State) -> None:
    """The inverse of `detach_state`."""
    count, values = state
    for name, value in values.items():
        setattr(part, name, value)
    set_num_updates(part, count)


@contextmanager
def detach_metric(metric: Any) -> Iterator[None]:
    """The metric's own states are out of the way for the time being."""
    parts = parts_of(metric)
    before = [detach_state(part) for part in parts]
    try:
        yield
    finally:
        for part, state in zip(parts, before, strict=True):
            attach_state(part, state)


def load_joined(part: Any, segments: Sequence[State]) -> None:
    """The states of several stretches of data as one; where no state stands for all of them, that of the longest."""
    states = [state for state in segments if state[0] > 0]
    if not states:
        return
    # States made in inference mode could not be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        count, merged = _merged(part, [[state] for state in states])
        if any(_is_of_another_shape(value, states[0][1][key]) for key, value in merged.items()):
            count, merged = max(states, key=lambda state: state[0])
        _set_state(part, count, {name: map_tensors(value, Tensor.clone) for name, value in merged.items()})


def compute_value(name: str, metric: Any, segments: list[list[list[State]]] | None) -> float:
    """The value over the states of all ranks, given in rank order, for each stretch of data in turn; None: those that
    the metric has. With others the metric is of no more use before its reset."""
    parts = parts_of(metric)
    was_syncing = [disable_sync(part) for part in parts]
    for index, part in enumerate(parts):
        forget_value(part)
        if segments is not None:
            own = [[states[index] for states in ranked if states[index][0] > 0] for ranked in segments]
            if any(own):
                _set_state(part, *_merged(part, own))
    try:
        value = metric.compute()
    finally:
        for part, is_syncing in zip(parts, was_syncing, strict=True):
            restore_sync(part, is_syncing=is_syncing)
    try:
        check_scalar(name, value)
    except ConfigError as error:
        raise ConfigError(
            f"self.log({name!r}, {type(metric).__name__}(...)): its value is not one number but "
            f"{_described(value)}; log the parts of metric.compute() by themselves"
        ) from error
    return float(value)


def reset(metric: Any) -> None:
    # States made in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        metric.reset()


def path_in(module: nn.Module, metric: Any) -> str | None:
    """The metric's name in the module; None where it is not a part of it."""
    return next((name for name, part in module.named_modules() if part is metric), None)


def states_in(module: nn.Module) -> dict[str, State]:
    """The states of every metric of the module that has any, by its name there: this rank's own."""
    states = {name: _state_of(part) for name, part in named_parts(module).items()}
    return {name: state for name, state in states.items() if state[0] > 0}


def load_states(module: nn.Module, states: dict[str, State]) -> None:
    """Metrics that the module has no longer are passed over."""
    parts = dict(module.named_modules())
    for name, (count, values) in states.items():
        if is_metric(parts.get(name)):
            _set_state(parts[name], count, values)


def load_merged(module: nn.Module, ranked: Sequence[dict[str, State]]) -> list[str]:
    """The states of several ranks as one's, in rank order. Names the metrics of which that one keeps a single rank's
    state, as no state stands for what several have seen."""
    parts = dict(module.named_modules())
    left_out = []
    for name in dict.fromkeys(chain.from_iterable(ranked)):
        if not is_metric(parts.get(name)):
            continue
        states = [own[name] for own in ranked if name in own]
        count, merged = _merged(parts[name], [states])
        if any(_is_of_another_shape(value, states[0][1][key]) for key, value in merged.items()):
            left_out.append(name)
            count, merged = max(states, key=lambda state: state[0])
        _set_state(parts[name], count, merged)
    return left_out


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Around a step with a batch of another rank's: the module's metrics are to know nothing of it."""
    parts = [part for part in module.modules() if is_metric(part)]
    before = [_state_of(part) for part in parts]
    try:
        yield
    finally:
        for part, (count, values) in zip(parts, before, strict=True):
            _set_state(part, count, values)


def parts_of(metric: Any) -> list[Any]:
    """The metric and those inside it."""
    return [part for part in metric.modules() if is_metric(part)]


def named_parts(module: nn.Module) -> dict[str, Any]:
    """Every metric of the module, by its name there."""
    return {name: part for name, part in module.named_modules() if is_metric(part)}


def _state_of(part: Any) -> State:
    # Copies, as updates may change a state in place.
    return _count_of(part), {name: map_tensors(getattr(part, name), _copied) for name in list_reductions(part)}


def _count_of(part: Any) -> int:
    """0: it has seen nothing. Wrappers do not count their updates; they may have states all the same."""
    return read_num_updates(part) or int(any(is_state_changed(part, name) for name in list_reductions(part)))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _make_updatable(part: Any) -> None:
    """States that were made in inference mode, by an update or where a hook has computed the value over the ranks,
    could not be changed outside of it."""
    with torch.inference_mode(False):
        for name in list_reductions(part):
            value = getattr(part, name)
            tensors = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, Tensor)]
            if any(one.is_inference() for one in tensors):
                setattr(part, name, map_tensors(value, Tensor.clone))


def _set_state(part: Any, count: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(part, name, map_tensors(value, lambda tensor: tensor.to(part.device)))
    set_num_updates(part, count)


def _merged(part: Any, segments: list[list[State]]) -> State:
    """The states of the ranks that have updated the part, for each stretch of data in turn, reduced as each state asks
    for."""
    states = list(chain.from_iterable(segments))
    if len(states) == 1:
        return states[0]
    counts = [count for count, _ in states]
    return sum(counts), {
        name: _reduced(reduction, [[values[name] for _, values in own] for own in segments], counts)
        for name, reduction in list_reductions(part).items()
    }


def _is_of_another_shape(merged: Any, value: Any) -> bool:
    return isinstance(merged, Tensor) and isinstance(value, Tensor) and merged.shape != value.shape


def _reduced(reduction: Any, segments: list[list[Any]], counts: list[int]) -> Any:
    values = list(chain.from_iterable(segments))
    if is_concatenating(reduction) or any(isinstance(value, list) for value in values):
        ranked = [[value if isinstance(value, list) else [value] for value in own] for own in segments]
        items = list(chain.from_iterable(in_turns(own) for own in ranked))
        return items if reduction is None or is_concatenating(reduction) else reduction(items)
    if is_averaging(reduction):
        # A mean over updates: a rank with more of them counts more.
        weighted = sum(value * count for value, count in zip(values, counts, strict=True))
        return weighted / sum(counts)
    together = torch.stack(values)
    return together if reduction is None else reduction(together)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class SuspendedStates:
    """What the torchmetrics objects of a module have seen before an evaluation, out of its way: an object that training
    updates as well begins afresh, and goes on afterwards where it was.

    An object that only the hooks around evaluations update, such as the best value so far, is left alone.
    """

    def __init__(self, module: nn.Module, collectives: Collectives) -> None:
        self._module = module
        self._collectives = collectives
        self._counts: dict[str, int] = {}
        """Updates of each at the end of the last evaluation: one that has others now was updated in training."""
        self._parts: dict[str, Any] = {}
        self._before: dict[str, State] = {}

    def begin(self, others: Iterable[Any] = ()) -> None:
        """Before the first batch. `others`: objects that are no parts of the module."""
        self._parts = named_parts(self._module)
        known = {id(part) for part in self._parts.values()}
        for index, part in enumerate(chain.from_iterable(map(parts_of, others))):
            if id(part) not in known:
                self._parts[f"#{index}"] = part
        trained = {
            name: part for name, part in self._parts.items() if _count_of(part) not in (0, self._counts.get(name))
        }
        self._before = {name: detach_state(part) for name, part in trained.items()}

    def give_back_unused(self) -> None:
        """After the last batch: the hooks at the end may read what no rank has updated. Collective."""
        used = {name for name, part in self._parts.items() if _count_of(part) > 0}
        if any(not name.startswith("#") for name in self._parts):
            used.update(*self._collectives.gather_objects(used))
        for name in self._before.keys() - used:
            attach_state(self._parts[name], self._before.pop(name))

    def end(self) -> None:
        """After the metrics have been read, which resets those that were logged. Others are the user's own to reset:
        they go on with both."""
        for name, state in self._before.items():
            part = self._parts[name]
            since = detach_state(part)
            if since[0] > 0:
                load_joined(part, [state, since])
            else:
                attach_state(part, state)
        self._before = {}

    def note_counts(self) -> None:
        """At the very end."""
        for part in self._parts.values():
            _make_updatable(part)
        self._counts = {name: _count_of(part) for name, part in self._parts.items()}
        self._parts = {}

    def restore(self) -> None:
        """The evaluation has failed: only what was before it counts."""
        for name, state in self._before.items():
            attach_state(self._parts[name], state)
        self._before = {}

"""Torchmetrics objects: reducing their states over all ranks, computing them once, saving and loading them.

Their own synchronization is switched off: it requires every rank to have had a batch. torchmetrics is never imported
here; without an import by the user there is no object of it either.
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
from raylit.worker.collectives import Collectives
from raylit.worker.metrics.reductions import check_scalar, interleave

State = tuple[int, dict[str, Any]]
"""Number of updates of a metric, and its states by name, on the CPU."""


def read_step_value(name: str, metric: Any) -> Tensor | None:
    """Return the batch's value if `forward` has computed one, as Lightning does."""
    value = read_forward_value(metric)
    if value is not None:
        check_scalar(name, value)
    return None if value is None else value.detach()


def copy_states(metric: Any) -> list[State]:
    """Copy the states of a metric and of the metrics inside it."""
    return [_copy_state(part) for part in find_metrics(metric)]


def copy_states_to_cpu(states: list[State]) -> list[State]:
    """Copy states to the CPU, to send them to other ranks."""
    return [
        (count, {name: map_tensors(value, _copy_tensor) for name, value in values.items()}) for count, values in states
    ]


def detach_state(part: Any) -> State:
    """Take the states of a metric without those inside it; they are not copied, the metric gets fresh ones."""
    count = _count_updates(part)
    states = {name: getattr(part, name) for name in list_reductions(part)}
    # States created in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        for name in states:
            reset_state(part, name)
    set_num_updates(part, 0)
    return count, states


def attach_state(part: Any, state: State) -> None:
    """Restore what `detach_state` has returned."""
    count, values = state
    for name, value in values.items():
        setattr(part, name, value)
    set_num_updates(part, count)


@contextmanager
def detach_metric(metric: Any) -> Iterator[None]:
    """Detach the metric's states for the time of the context."""
    parts = find_metrics(metric)
    states = [detach_state(part) for part in parts]
    try:
        yield
    finally:
        for part, state in zip(parts, states, strict=True):
            attach_state(part, state)


def load_segments(part: Any, segments: Sequence[State]) -> None:
    """Merge the states of several segments of data into the metric; if they cannot be merged, load the longest's."""
    states = [state for state in segments if state[0] > 0]
    if not states:
        return
    # States created in inference mode could not be changed outside of it.
    with torch.inference_mode(False), torch.no_grad():
        count, merged = _merge_states(part, [[state] for state in states])
        if any(_has_other_shape(value, states[0][1][key]) for key, value in merged.items()):
            count, merged = max(states, key=lambda state: state[0])
        _set_state(part, count, {name: map_tensors(value, Tensor.clone) for name, value in merged.items()})


def compute_value(name: str, metric: Any, segments: list[list[list[State]]] | None) -> float:
    """Compute the metric over the states of all ranks.

    With `segments` the metric must be reset before it is used again.

    Args:
        name: The logged name, for errors.
        metric: The torchmetrics object.
        segments: For each segment of data the states of the ranks, in rank order; None for the metric's own states.

    Raises:
        ConfigError: The value is not a single number.
    """
    parts = find_metrics(metric)
    was_syncing = [disable_sync(part) for part in parts]
    for index, part in enumerate(parts):
        forget_value(part)
        if segments is not None:
            states_of_part = [[states[index] for states in ranked if states[index][0] > 0] for ranked in segments]
            if any(states_of_part):
                _set_state(part, *_merge_states(part, states_of_part))
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
            f"{_describe_value(value)}; log the parts of metric.compute() by themselves"
        ) from error
    return float(value)


def reset(metric: Any) -> None:
    # States created in inference mode could not be changed outside of it.
    with torch.inference_mode(False):
        metric.reset()


def find_path(module: nn.Module, metric: Any) -> str | None:
    """Return the metric's name in the module; None where it is not a part of it."""
    return next((name for name, part in module.named_modules() if part is metric), None)


def copy_module_states(module: nn.Module) -> dict[str, State]:
    """Copy this rank's states of every metric of the module that has been updated, by its name there."""
    states = {name: _copy_state(part) for name, part in find_named_metrics(module).items()}
    return {name: state for name, state in states.items() if state[0] > 0}


def load_states(module: nn.Module, states: dict[str, State]) -> None:
    """Load states into the module's metrics; those of metrics that it no longer has are ignored."""
    parts = dict(module.named_modules())
    for name, (count, values) in states.items():
        if is_metric(parts.get(name)):
            _set_state(parts[name], count, values)


def load_merged_states(module: nn.Module, ranked: Sequence[dict[str, State]]) -> list[str]:
    """Merge the states of several ranks, in rank order, and load them.

    Returns:
        The names of metrics whose states cannot be merged, which get a single rank's state.
    """
    parts = dict(module.named_modules())
    unmerged = []
    for name in dict.fromkeys(chain.from_iterable(ranked)):
        if not is_metric(parts.get(name)):
            continue
        states = [states_of_rank[name] for states_of_rank in ranked if name in states_of_rank]
        count, merged = _merge_states(parts[name], [states])
        if any(_has_other_shape(value, states[0][1][key]) for key, value in merged.items()):
            unmerged.append(name)
            count, merged = max(states, key=lambda state: state[0])
        _set_state(parts[name], count, merged)
    return unmerged


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Restore the module's metrics after a step with another rank's batch."""
    parts = [part for part in module.modules() if is_metric(part)]
    states = [_copy_state(part) for part in parts]
    try:
        yield
    finally:
        for part, (count, values) in zip(parts, states, strict=True):
            _set_state(part, count, values)


def find_metrics(metric: Any) -> list[Any]:
    """Return the metric and the metrics inside it."""
    return [part for part in metric.modules() if is_metric(part)]


def find_named_metrics(module: nn.Module) -> dict[str, Any]:
    """Return every metric of the module by its name there."""
    return {name: part for name, part in module.named_modules() if is_metric(part)}


def copy_segments(metric: Any, segments: dict[int, list[State]]) -> dict[int, list[State]]:
    """Return the states of the object by the loader that they come from, on the CPU."""
    if segments:
        return {index: copy_states_to_cpu(states) for index, states in segments.items()}
    return {0: copy_states(metric)}


def order_segments(
    segments_of_ranks: list[dict[int, list[State]]],
) -> list[list[list[State]]]:
    """Return, for each loader in turn, the states of the ranks that have any."""
    indices = sorted(set(chain.from_iterable(segments_of_ranks)))
    return [[segments[index] for segments in segments_of_ranks if index in segments] for index in indices]


def restore_segments(logged: Iterable[tuple[Any, dict[int, list[State]]]]) -> set[int]:
    """Load each object's states from all loaders; return the ids of the metrics that several loaders have updated.

    `logged` has each object with its states by the index of the loader.
    """
    segments: dict[int, dict[int, State]] = {}
    parts = {}
    for metric, states_by_index in logged:
        for index, states in states_by_index.items():
            for part, state in zip(find_metrics(metric), states, strict=True):
                parts[id(part)] = part
                segments.setdefault(id(part), {})[index] = state
    for key, states_by_loader in segments.items():
        if len(states_by_loader) > 1:
            load_segments(parts[key], [states_by_loader[index] for index in sorted(states_by_loader)])
        else:
            attach_state(parts[key], *states_by_loader.values())
    return {key for key, states_by_loader in segments.items() if len(states_by_loader) > 1}


def _copy_state(part: Any) -> State:
    # Copy, as updates may change a state in place.
    return _count_updates(part), {
        name: map_tensors(getattr(part, name), _copy_tensor) for name in list_reductions(part)
    }


def _count_updates(part: Any) -> int:
    """Return the number of updates, at least 1 if any state has changed: wrappers do not count their updates."""
    return read_num_updates(part) or int(any(is_state_changed(part, name) for name in list_reductions(part)))


def _copy_tensor(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _make_updatable(part: Any) -> None:
    """Replace states that were created in inference mode, which could not be changed outside of it.

    An update creates them, or a hook that computes the value over the ranks.
    """
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


def _merge_states(part: Any, segments: list[list[State]]) -> State:
    """Merge the states of the ranks that have updated the metric, by segment and by each state's reduction."""
    states = list(chain.from_iterable(segments))
    if len(states) == 1:
        return states[0]
    counts = [count for count, _ in states]
    return sum(counts), {
        name: _reduce_values(reduction, [[values[name] for _, values in segment] for segment in segments], counts)
        for name, reduction in list_reductions(part).items()
    }


def _has_other_shape(merged: Any, value: Any) -> bool:
    return isinstance(merged, Tensor) and isinstance(value, Tensor) and merged.shape != value.shape


def _reduce_values(reduction: Any, segments: list[list[Any]], counts: list[int]) -> Any:
    values = list(chain.from_iterable(segments))
    if is_concatenating(reduction) or any(isinstance(value, list) for value in values):
        ranked = [[value if isinstance(value, list) else [value] for value in segment] for segment in segments]
        items = list(chain.from_iterable(interleave(segment) for segment in ranked))
        return items if reduction is None or is_concatenating(reduction) else reduction(items)
    if is_averaging(reduction):
        # A mean over updates: ranks are weighted by their numbers of updates.
        weighted = sum(value * count for value, count in zip(values, counts, strict=True))
        return weighted / sum(counts)
    together = torch.stack(values)
    return together if reduction is None else reduction(together)


def _describe_value(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


class SuspendedStates:
    """States of a module's torchmetrics objects from before an evaluation, set apart for its duration.

    An object that training updates too starts the evaluation with fresh states and gets its own back afterwards. An
    object that only the hooks around evaluations update, such as the best value so far, is left alone.
    """

    def __init__(self, module: nn.Module, collectives: Collectives) -> None:
        self._module = module
        self._collectives = collectives
        self._counts: dict[str, int] = {}
        """Updates of each object at the end of the last evaluation; a different number means training updated it."""
        self._parts: dict[str, Any] = {}
        self._states_before: dict[str, State] = {}

    def suspend(self, others: Iterable[Any] = ()) -> None:
        """Set states apart before the first batch; `others` are objects that are not part of the module."""
        self._parts = find_named_metrics(self._module)
        module_part_ids = {id(part) for part in self._parts.values()}
        for index, part in enumerate(chain.from_iterable(map(find_metrics, others))):
            if id(part) not in module_part_ids:
                self._parts[f"#{index}"] = part
        trained = {
            name: part for name, part in self._parts.items() if _count_updates(part) not in (0, self._counts.get(name))
        }
        self._states_before = {name: detach_state(part) for name, part in trained.items()}

    def restore_unused(self) -> None:
        """Restore the objects that no rank has updated, for the hooks at the end to read. Collective."""
        used = {name for name, part in self._parts.items() if _count_updates(part) > 0}
        if any(not name.startswith("#") for name in self._parts):
            used.update(*self._collectives.gather_objects(used))
        for name in self._states_before.keys() - used:
            attach_state(self._parts[name], self._states_before.pop(name))

    def resume(self) -> None:
        """Restore the states after the metrics have been read, which resets the logged objects.

        Objects that were not reset keep what they have seen before and during the evaluation: resetting them is up to
        the user.
        """
        for name, state in self._states_before.items():
            part = self._parts[name]
            evaluation_state = detach_state(part)
            if evaluation_state[0] > 0:
                load_segments(part, [state, evaluation_state])
            else:
                attach_state(part, state)
        self._states_before = {}

    def record_counts(self) -> None:
        """Record the numbers of updates at the very end of an evaluation."""
        for part in self._parts.values():
            _make_updatable(part)
        self._counts = {name: _count_updates(part) for name, part in self._parts.items()}
        self._parts = {}

    def restore(self) -> None:
        """Restore the states from before an evaluation that has failed."""
        for name, state in self._states_before.items():
            attach_state(self._parts[name], state)
        self._states_before = {}

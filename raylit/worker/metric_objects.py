"""torchmetrics objects: their states over all ranks, computed once, and their way through a checkpoint. Worker.

Their own sync is switched off: it counts on every rank having had a batch. torchmetrics is never imported here; where
nobody has imported it there is no object of it either.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from raylit.accelerators.transfer import map_tensors
from raylit.errors import ConfigError
from raylit.worker.metric_entry import check_scalar, in_turns

State = tuple[int, dict[str, Any]]
"""How often a metric was updated, and its states by name, on the CPU."""


def is_object(value: Any) -> bool:
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def step_value(name: str, metric: Any) -> Tensor | None:
    """The value of the batch, where `forward` has computed one; Lightning's own choice."""
    value = metric._forward_cache
    if value is not None:
        check_scalar(name, value)
    return None if value is None else value.detach()


def states_of(metric: Any) -> list[State]:
    """Of the metric and of those inside it."""
    return [_state_of(part) for part in _parts_of(metric)]


def computed(name: str, metric: Any, ranked: list[list[State]]) -> float:
    """The value over the states of all ranks, given in rank order. The metric is of no more use before its reset."""
    parts = _parts_of(metric)
    is_syncing = [part._to_sync for part in parts]
    for part, states in zip(parts, zip(*ranked, strict=True), strict=True):
        part._to_sync = False
        part._computed = None
        if len(ranked) > 1:
            _merge(part, [state for state in states if state[0] > 0])
    try:
        value = metric.compute()
    finally:
        for part, is_on in zip(parts, is_syncing, strict=True):
            part._to_sync = is_on
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
    states = {name: _state_of(part) for name, part in module.named_modules() if is_object(part)}
    return {name: state for name, state in states.items() if state[0] > 0}


def load_states(module: nn.Module, states: dict[str, State]) -> None:
    """Metrics that the module has no longer are passed over."""
    parts = dict(module.named_modules())
    for name, (num_updates, values) in states.items():
        if is_object(parts.get(name)):
            _set_state(parts[name], num_updates, values)


def load_merged(module: nn.Module, ranked: Sequence[dict[str, State]]) -> list[str]:
    """The states of several ranks as one's, in rank order. Names the metrics of which that one keeps a single rank's
    state, as no state stands for what several have seen."""
    parts = dict(module.named_modules())
    left_out = []
    for name in dict.fromkeys(chain.from_iterable(ranked)):
        if not is_object(parts.get(name)):
            continue
        states = [own[name] for own in ranked if name in own]
        count, merged = _merged(parts[name], states)
        if any(_is_of_another_shape(value, states[0][1][key]) for key, value in merged.items()):
            left_out.append(name)
            count, merged = max(states, key=lambda state: state[0])
        _set_state(parts[name], count, merged)
    return left_out


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
    """Around a step with a batch of another rank's: the module's metrics are to know nothing of it."""
    parts = [part for part in module.modules() if is_object(part)]
    before = [_state_of(part) for part in parts]
    try:
        yield
    finally:
        for part, (num_updates, values) in zip(parts, before, strict=True):
            _set_state(part, num_updates, values)


def _parts_of(metric: Any) -> list[Any]:
    return [part for part in metric.modules() if is_object(part)]


def _state_of(part: Any) -> State:
    # Copies, as updates may change a state in place.
    states = {name: map_tensors(getattr(part, name), _copied) for name in part._reductions}
    # Wrappers do not count; they may have states all the same.
    return part._update_count or int(any(_is_changed(part, name) for name in states)), states


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _is_changed(part: Any, name: str) -> bool:
    value, default = getattr(part, name), part._defaults[name]
    if isinstance(value, list) or isinstance(default, list):
        return len(value) > 0
    return not torch.equal(value, default.to(value.device))


def _set_state(part: Any, num_updates: int, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(part, name, map_tensors(value, lambda tensor: tensor.to(part.device)))
    part._update_count = num_updates
    part._computed = None


def _merge(part: Any, states: list[State]) -> None:
    """Give the part the states of the ranks that have updated it, reduced as each state asks for."""
    if states:
        _set_state(part, *_merged(part, states))


def _merged(part: Any, states: list[State]) -> State:
    if len(states) == 1:
        return states[0]
    counts = [count for count, _ in states]
    return sum(counts), {
        name: _reduced(reduction, [values[name] for _, values in states], counts)
        for name, reduction in part._reductions.items()
    }


def _is_of_another_shape(merged: Any, value: Any) -> bool:
    return isinstance(merged, Tensor) and isinstance(value, Tensor) and merged.shape != value.shape


def _reduced(reduction: Any, values: list[Any], counts: list[int]) -> Any:
    data = sys.modules["torchmetrics.utilities.data"]
    if reduction is data.dim_zero_cat or any(isinstance(value, list) for value in values):
        items = in_turns([value if isinstance(value, list) else [value] for value in values])
        return items if reduction is None or reduction is data.dim_zero_cat else reduction(items)
    if reduction is data.dim_zero_mean:
        # A mean over updates: a rank with more of them counts more.
        weighted = sum(value * count for value, count in zip(values, counts, strict=True))
        return weighted / sum(counts)
    together = torch.stack(values)
    return together if reduction is None else reduction(together)


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"

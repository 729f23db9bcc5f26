"""Take the states of torchmetrics objects apart and put them together. Worker.

Written against torchmetrics 1.9. It is never imported here: without its import there are no objects of it.
A part is one torchmetrics.Metric; its states are attributes of it, tensors or lists of tensors.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from raylit.compat.private_names import read_private

_FEATURE = "logging a torchmetrics object"


def is_metric(value: Any) -> bool:
    """Return whether a value is a torchmetrics object."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, torchmetrics.Metric)


def read_forward_value(metric: Any) -> Any:
    """Return the value of the last batch that went through `forward`; None if none has since the last reset."""
    return _read(metric, "_forward_cache")


def read_num_updates(part: Any) -> int:
    """Return how often a metric was updated since its last reset. Wrappers do not count their updates."""
    count: int = _read(part, "_update_count")
    return count


def set_num_updates(part: Any, count: int) -> None:
    """Have a metric count that many updates, and compute its value anew when it is asked for it."""
    _read(part, "_update_count")  # it raises where torchmetrics would ignore what is set
    part._update_count = count
    forget_value(part)


def forget_value(part: Any) -> None:
    """Have a metric compute its value anew when it is asked for it."""
    _read(part, "_computed")
    part._computed = None


def list_reductions(part: Any) -> dict[str, Any]:
    """Return by the names of its states how a metric reduces each over ranks: a function of a stack, or None."""
    reductions: dict[str, Any] = _read(part, "_reductions")
    return reductions


def read_default(part: Any, name: str) -> Any:
    """Return what a state is after a reset: a tensor or an empty list."""
    return _read(part, "_defaults")[name]


def is_concatenating(reduction: Any) -> bool:
    """Return whether a reduction is torchmetrics' own concatenation."""
    return reduction is sys.modules["torchmetrics.utilities.data"].dim_zero_cat


def is_averaging(reduction: Any) -> bool:
    """Return whether a reduction is torchmetrics' own mean."""
    return reduction is sys.modules["torchmetrics.utilities.data"].dim_zero_mean


def disable_sync(part: Any) -> bool:
    """Have `compute` use a metric's states as they are on this rank. Returns whether it synced them before."""
    is_syncing: bool = _read(part, "_to_sync")
    part._to_sync = False
    return is_syncing


def restore_sync(part: Any, *, is_syncing: bool) -> None:
    """Undo `disable_sync`, with what that has returned."""
    part._to_sync = is_syncing


def reset_state(part: Any, name: str) -> None:
    """Replace one state by a fresh one, on the device of the one before, which is left as it is."""
    value, default = getattr(part, name), read_default(part, name)
    fresh = default.detach().clone().to(value.device) if isinstance(value, Tensor) else []
    setattr(part, name, fresh)


def is_state_changed(part: Any, name: str) -> bool:
    """Return whether a state is other than after a reset. Waits for the device."""
    value, default = getattr(part, name), read_default(part, name)
    if isinstance(value, list) or isinstance(default, list):
        return len(value) > 0
    return not torch.equal(value, default.to(value.device))


def _read(part: Any, name: str) -> Any:
    return read_private(part, name, feature=_FEATURE, library="torchmetrics")

"""Sequences: a batch in pieces along its time dimension. User's side of truncated back-propagation, on workers."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from raylit.accelerators.transfer import is_namedtuple
from raylit.errors import ModuleError


def split_along_time(batch: Any, length: int) -> list[Any]:
    """Pieces of at most `length` time steps. Time is dimension 1 of a tensor (batch, time, ...), and what the entries
    of a list of sequences have of it; everything else goes into every piece as it is.

    ModuleError: nothing has a time dimension, or their lengths differ.
    """
    parts = _parts(batch)
    num_steps = {steps for part in parts if (steps := _num_steps(part)) is not None}
    if len(num_steps) != 1:
        found = f"its parts have {sorted(num_steps)} time steps" if num_steps else "nothing in it has time steps"
        raise ModuleError(
            f"truncated back-propagation splits a batch along time, (batch, time, ...), but {found}: override "
            "tbptt_split_batch(batch, split_size) and return the pieces"
        )
    return [_piece(batch, slice(start, start + length)) for start in range(0, num_steps.pop(), length)]


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    return [batch] if isinstance(batch, Tensor) else list(batch)


def _num_steps(part: Any) -> int | None:
    if isinstance(part, Tensor):
        return part.shape[1] if part.ndim > 1 else None
    is_list_of_sequences = isinstance(part, (list, tuple)) and part and isinstance(part[0], (Tensor, list, tuple))
    return len(part[0]) if is_list_of_sequences else None


def _piece(batch: Any, steps: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[:, steps] if _num_steps(batch) is not None else batch
    if isinstance(batch, Mapping):
        return {key: _cut(part, steps) for key, part in batch.items()}
    parts = [_cut(part, steps) for part in batch]
    if isinstance(batch, tuple):
        return type(batch)(*parts) if is_namedtuple(batch) else tuple(parts)
    return parts


def _cut(part: Any, steps: slice) -> Any:
    if _num_steps(part) is None:
        return part
    if isinstance(part, Tensor):
        return part[:, steps]
    sequences: Sequence[Any] = part
    return [sequence[steps] for sequence in sequences]

"""How many samples a batch holds. Worker."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch


def batch_size_of(batch: Any) -> int:
    """First dimension of the first tensor in the batch; 1 where that has none, or where there is no tensor."""
    size = _first_dimension(batch)
    return 1 if size is None else size


def _first_dimension(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.ndim > 0 else 1
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, range)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
    return next((size for part in parts if (size := _first_dimension(part)) is not None), None)

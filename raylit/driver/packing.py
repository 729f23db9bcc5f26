"""Tensors as NumPy views in a message: Ray's object store then copies their bytes once and shares them read-only."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MIN_BYTES = 4096
"""Below, a pickled tensor is as cheap."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """A dense CPU tensor's bytes."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


def packed(message: Any) -> Any:
    """The message with the larger tensors of its dicts, lists and tuples packed."""
    return _mapped(message, _pack)


def unpacked(message: Any) -> Any:
    """The message with its tensors again. Those above a few kilobytes are views of shared, read-only memory: copy from
    them, never write to them."""
    return _mapped(message, _unpack)


def _pack(leaf: Any) -> Any:
    is_dense = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided
    if not is_dense or leaf.nbytes < _MIN_BYTES or type(leaf) is not Tensor or leaf.requires_grad:
        return leaf
    contiguous = leaf.contiguous()
    return _Packed(contiguous.reshape(-1).view(torch.uint8).numpy(), leaf.dtype, tuple(leaf.shape))


def _unpack(leaf: Any) -> Any:
    if not isinstance(leaf, _Packed):
        return leaf
    if leaf.data.flags.writeable:
        return torch.from_numpy(leaf.data).view(leaf.dtype).reshape(leaf.shape)
    # torch warns about memory that it cannot mark as read-only; nothing here writes to it.
    return torch.frombuffer(memoryview(leaf.data).toreadonly(), dtype=torch.uint8).view(leaf.dtype).reshape(leaf.shape)


def _mapped(value: Any, function: Any) -> Any:
    if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
        for_copy = value.copy()
        for key, item in value.items():
            for_copy[key] = _mapped(item, function)
        return for_copy
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, function) for item in value)
    if dataclasses.is_dataclass(value) and type(value).__module__ == "raylit.messages":
        names = [field.name for field in dataclasses.fields(value)]
        changed = {name: _mapped(getattr(value, name), function) for name in names}
        return dataclasses.replace(value, **changed)  # type: ignore[type-var]
    return function(value)

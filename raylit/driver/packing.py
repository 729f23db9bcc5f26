"""Tensors as NumPy views in a message: Ray's object store then copies their bytes once and shares them read-only."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """A dense CPU tensor's bytes."""

    data: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


def packed(message: Any) -> Any:
    """The message with the plain CPU tensors of its dicts, lists and tuples packed."""
    return _mapped(message, _pack)


def unpacked(message: Any, *, is_copying: bool = False) -> Any:
    """The message with its tensors again. Without `is_copying` they are views of memory that other processes share:
    copy from them, never write to them."""
    return _mapped(message, _unpack_copy if is_copying else _unpack)


def _pack(leaf: Any) -> Any:
    is_dense = isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.layout is torch.strided
    if not is_dense or type(leaf) is not Tensor or leaf.requires_grad:
        return leaf
    contiguous = leaf.contiguous()
    return _Packed(contiguous.reshape(-1).view(torch.uint8).numpy(), leaf.dtype, tuple(leaf.shape))


def _unpack(leaf: Any) -> Any:
    if not isinstance(leaf, _Packed):
        return leaf
    if leaf.data.flags.writeable:
        return torch.from_numpy(leaf.data).view(leaf.dtype).reshape(leaf.shape)
    with warnings.catch_warnings():
        # torch warns once of memory that it cannot mark as read-only; nothing of ours writes to it.
        warnings.filterwarnings("ignore", message="The given (buffer|NumPy array) is not writable")
        return torch.from_numpy(leaf.data).view(leaf.dtype).reshape(leaf.shape)


def _unpack_copy(leaf: Any) -> Any:
    return _unpack(leaf).clone() if isinstance(leaf, _Packed) else leaf


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

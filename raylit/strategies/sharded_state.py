"""Sharded state with placeholders in place of its parts. Driver and worker.

A sharded state is the usual nested dict whose sharded tensors are placeholders on the meta device, with the shape of
the whole tensor. A part's name is the path of its placeholder in that dict.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

Reader = Callable[[Mapping[str, Tensor]], None]
"""Function that reads parts into target tensors by name: plain targets get the whole, sharded ones their shard."""


def split_parts(value: Any, where: str, parts: dict[str, Tensor]) -> Any:
    """Return the value with a placeholder for each sharded tensor, which is added to `parts`.

    Other tensors are copied to the CPU.
    """

    def split_tensor(tensor: Tensor, path: str) -> Tensor:
        if not is_sharded(tensor):
            return tensor.detach().cpu()
        parts[path] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return _map_tensors(value, where, split_tensor)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def iterate_placeholders(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """Yield each placeholder in the value with the name of the part that it stands for."""
    if isinstance(value, Tensor):
        if value.is_meta:
            yield where, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from iterate_placeholders(item, f"{where}.{name}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            yield from iterate_placeholders(item, f"{where}.{index}")


def fill_placeholders(value: Any, where: str, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value with `tensors` in the place of its placeholders."""
    return _map_tensors(value, where, lambda tensor, path: tensors[path] if tensor.is_meta else tensor)


def read_in_place(state_dict: Mapping[str, Any], own: Mapping[str, Any], where: str, *, read: Reader) -> dict[str, Any]:
    """Return a state dict in which `own` tensors replace the placeholders, after parts were read into them."""
    targets = {
        name: tensor
        if has_memory_of_shape(tensor := own[name], value.shape)
        else torch.empty(value.shape, dtype=value.dtype)
        for name, value in state_dict.items()
        if isinstance(value, Tensor) and value.is_meta
    }
    read({f"{where}.{name}": target.detach() for name, target in targets.items()})
    return {**state_dict, **targets}


def has_memory_of_shape(tensor: Any, shape: torch.Size) -> TypeGuard[Tensor]:
    """Return whether the value is a tensor of that shape whose memory is allocated."""
    return (
        isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor) and not tensor.is_meta and tensor.shape == shape
    )


def read_into_new_tensors(value: Any, where: str, *, read: Reader) -> Any:
    """Return the value with new tensors in the place of placeholders, after parts were read into them."""
    targets = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in iterate_placeholders(value, where)
    }
    read(targets)
    return fill_placeholders(value, where, targets)


def _map_tensors(value: Any, where: str, change: Callable[[Tensor, str], Tensor]) -> Any:
    """Return the value with each tensor replaced by the result of `change`, which gets the tensor and its path."""
    if isinstance(value, Tensor):
        return change(value, where)
    if isinstance(value, dict):
        mapped = copy.copy(value)  # a state dict carries the versions of its modules along
        for name, item in value.items():
            mapped[name] = _map_tensors(item, f"{where}.{name}", change)
        return mapped
    if type(value) in (list, tuple):
        return type(value)(_map_tensors(item, f"{where}.{index}", change) for index, item in enumerate(value))
    return value

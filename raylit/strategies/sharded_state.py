"""Sharded state: what stands for its parts where they are not. Both sides.

A state with parts is the usual dict whose sharded tensors are placeholders on the meta device, of their whole shape;
the parts' names are where they stand in it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

Reader = Callable[[Mapping[str, Tensor]], None]
"""Reads parts into targets by the parts' names: plain tensors get the whole, sharded ones their share."""


def split(value: Any, where: str, parts: dict[str, Tensor]) -> Any:
    """The value with a placeholder for each sharded tensor, which goes into `parts`; other tensors on the CPU."""

    def placed(tensor: Tensor, place: str) -> Tensor:
        if not is_sharded(tensor):
            return tensor.detach().cpu()
        parts[place] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return _mapped(value, where, placed)


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def placeholders(value: Any, where: str) -> Iterator[tuple[str, Tensor]]:
    """What stands for a part, by the part's name."""
    if isinstance(value, Tensor):
        if value.is_meta:
            yield where, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from placeholders(item, f"{where}.{name}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            yield from placeholders(item, f"{where}.{index}")


def fill_placeholders(value: Any, where: str, tensors: Mapping[str, Tensor]) -> Any:
    """The value with `tensors` in the place of placeholders."""
    return _mapped(value, where, lambda tensor, place: tensors[place] if tensor.is_meta else tensor)


def read_in_place(state_dict: Mapping[str, Any], own: Mapping[str, Any], where: str, *, read: Reader) -> dict[str, Any]:
    """A state dict with `own` tensors in the place of placeholders, for which they are read into these."""
    targets = {
        name: tensor if is_fit(tensor := own[name], value.shape) else torch.empty(value.shape, dtype=value.dtype)
        for name, value in state_dict.items()
        if isinstance(value, Tensor) and value.is_meta
    }
    read({f"{where}.{name}": target.detach() for name, target in targets.items()})
    return {**state_dict, **targets}


def is_fit(tensor: Any, shape: torch.Size) -> TypeGuard[Tensor]:
    """A tensor with memory for numbers of that shape."""
    return (
        isinstance(tensor, Tensor) and not nn.parameter.is_lazy(tensor) and not tensor.is_meta and tensor.shape == shape
    )


def read_anew(value: Any, where: str, *, read: Reader) -> Any:
    """The value with new tensors in the place of placeholders."""
    targets = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in placeholders(value, where)}
    read(targets)
    return fill_placeholders(value, where, targets)


def _mapped(value: Any, where: str, change: Callable[[Tensor, str], Tensor]) -> Any:
    """The value with other tensors, of which `change` is told where they stand in it."""
    if isinstance(value, Tensor):
        return change(value, where)
    if isinstance(value, dict):
        mapped = copy.copy(value)  # a state dict carries the versions of its modules along
        for name, item in value.items():
            mapped[name] = _mapped(item, f"{where}.{name}", change)
        return mapped
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, f"{where}.{index}", change) for index, item in enumerate(value))
    return value

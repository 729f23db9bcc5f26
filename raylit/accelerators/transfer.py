"""Batches to and from a device."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def set_layout(module: nn.Module, layout: torch.memory_format) -> None:
    """Set the memory format of 4-dimensional parameters and buffers, in place, as optimizers refer to them."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not nn.parameter.is_lazy(tensor) and tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def map_tensors(
    value: Any, function: Callable[[Tensor], Any], *, on_movable: Callable[[Any], Any] | None = None
) -> Any:
    """Apply `function` to every tensor in nested dicts, lists, tuples and dataclasses, and return the new value.

    Other objects with a `to` method (packed sequences, torchvision's and PyG's batches) are passed to `on_movable`;
    without it they are left as they are.
    """
    if isinstance(value, Tensor):
        return function(value)
    if callable(getattr(value, "to", None)) and not isinstance(value, type):
        return value if on_movable is None else on_movable(value)

    def map_item(item: Any) -> Any:
        return map_tensors(item, function, on_movable=on_movable)

    if isinstance(value, Mapping):
        items = {key: map_item(item) for key, item in value.items()}
        return items if type(value) is dict else _rebuild_mapping(value, items)
    if is_namedtuple(value):
        return type(value)(*(map_item(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_item(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: map_item(getattr(value, name)) for name in fields})
    return value


def is_namedtuple(value: Any) -> bool:
    """Return whether a value is of a class that `collections.namedtuple` or `typing.NamedTuple` has made."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def to_device(batch: Any, device: torch.device) -> Any:
    """Copy the batch to `device` without waiting for the copy."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, non_blocking=True)

    return map_tensors(batch, move, on_movable=lambda value: value.to(device))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchForm:
    """Data type and memory format that a run gives to the tensors of its batches."""

    floating_dtype: torch.dtype | None = None
    """Data type of floating-point tensors; None leaves it."""
    is_channels_last: bool = False
    """True if 4-dimensional tensors get the memory format NHWC."""

    @property
    def is_plain(self) -> bool:
        """True if batches are not changed."""
        return self.floating_dtype is None and not self.is_channels_last

    def convert(self, batch: Any) -> Any:
        """Return the batch with its tensors in this form."""
        return batch if self.is_plain else map_tensors(batch, self._convert_tensor)

    def _convert_tensor(self, tensor: Tensor) -> Tensor:
        if self.floating_dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.floating_dtype)
        if self.is_channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def _rebuild_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        return type(original)(items)  # type: ignore[call-arg]
    except TypeError:
        return items

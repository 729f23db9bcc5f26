"""Batches to and from a device."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def set_layout(module: nn.Module, layout: torch.memory_format) -> None:
    """Of its weights and buffers of four dimensions, in place; optimizers made before or after follow them."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not nn.parameter.is_lazy(tensor) and tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=layout)


def map_tensors(
    value: Any, function: Callable[[Tensor], Any], *, on_movable: Callable[[Any], Any] | None = None
) -> Any:
    """`value` with `function` applied to every tensor in its dicts, lists, tuples and dataclasses.

    Objects with a `to` method of their own (packed sequences, torchvision's and PyG's batches) go to `on_movable`;
    without one they are left as they are.
    """
    if isinstance(value, Tensor):
        return function(value)
    if callable(getattr(value, "to", None)) and not isinstance(value, type):
        return value if on_movable is None else on_movable(value)

    def mapped(item: Any) -> Any:
        return map_tensors(item, function, on_movable=on_movable)

    if isinstance(value, Mapping):
        items = {key: mapped(item) for key, item in value.items()}
        return items if type(value) is dict else _rebuilt_mapping(value, items)
    if is_namedtuple(value):
        return type(value)(*(mapped(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: mapped(getattr(value, name)) for name in fields})
    return value


def is_namedtuple(value: Any) -> bool:
    """Return whether a value is of a class that `collections.namedtuple` or `typing.NamedTuple` has made."""
    return isinstance(value, tuple) and hasattr(value, "_fields")


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch on `device`. Does not wait for the copy."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, non_blocking=True)

    return map_tensors(batch, move, on_movable=lambda value: value.to(device))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BatchForm:
    """What a run makes of a batch's tensors, wherever they are."""

    floating_dtype: torch.dtype | None = None
    """Of floating-point tensors; None: their own."""
    is_channels_last: bool = False
    """Tensors of four dimensions lie in memory as NHWC."""

    @property
    def is_plain(self) -> bool:
        """Batches stay as they are."""
        return self.floating_dtype is None and not self.is_channels_last

    def apply(self, batch: Any) -> Any:
        return batch if self.is_plain else map_tensors(batch, self._of_tensor)

    def _of_tensor(self, tensor: Tensor) -> Tensor:
        if self.floating_dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(self.floating_dtype)
        if self.is_channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def _rebuilt_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        return type(original)(items)  # type: ignore[call-arg]
    except TypeError:
        return items

"""A batch's tensors on their way to a device. Worker, and the base of the user's transfer hook."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


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
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: mapped(getattr(value, name)) for name in fields})
    return value


def to_device(batch: Any, device: torch.device, floating_dtype: torch.dtype | None = None) -> Any:
    """The batch on `device`, floating-point tensors as `floating_dtype` where given. Does not wait for the copy."""

    def move(tensor: Tensor) -> Tensor:
        dtype = floating_dtype if tensor.is_floating_point() else None
        return tensor.to(device=device, dtype=dtype, non_blocking=True)

    return map_tensors(batch, move, on_movable=lambda value: value.to(device))


def to_floating(batch: Any, dtype: torch.dtype) -> Any:
    """The batch with its floating-point tensors as `dtype`, where they are."""
    return map_tensors(batch, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _rebuilt_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        return type(original)(items)  # type: ignore[call-arg]
    except TypeError:
        return items

"""A batch's way to the device and a result's way back. Worker."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """`value` with `function` applied to every tensor in its dicts, lists, tuples and dataclasses.

    Objects with a `to` method of their own (packed sequences, torchvision's and PyG's batches) are left to the caller.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: map_tensors(item, function) for key, item in value.items()}
        return items if type(value) is dict else _rebuilt_mapping(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: map_tensors(getattr(value, name), function) for name in fields})
    return value


def to_device(batch: Any, device: torch.device, floating_dtype: torch.dtype | None = None) -> Any:
    """The batch on `device`, floating-point tensors as `floating_dtype` where given. Does not wait for the copy."""

    def move(tensor: Tensor) -> Tensor:
        dtype = floating_dtype if tensor.is_floating_point() else None
        return tensor.to(device=device, dtype=dtype, non_blocking=True)

    if not isinstance(batch, Tensor) and callable(getattr(batch, "to", None)):
        return batch.to(device)
    return map_tensors(batch, move)


def to_cpu(value: Any) -> Any:
    """Detached, on the CPU. Waits for the device."""
    return map_tensors(value, lambda tensor: tensor.detach().cpu())


def _rebuilt_mapping(original: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    try:
        return type(original)(items)  # type: ignore[call-arg]
    except TypeError:
        return items

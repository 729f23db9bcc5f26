"""What hooks left on modules and callbacks, on its way back to the driver's objects. Worker packs, driver applies."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from raylit.callbacks.base import Callback
from raylit.worker.shared_memory import SharedMemory

_NN_INTERNAL = frozenset(nn.Module().__dict__)
_LEFT_BEHIND = (DataLoader, Dataset, nn.Module)
"""Data stays where it is; modules go by their state."""


@dataclass(slots=True)
class Attributes:
    """Plain attributes of every submodule by its name, and of every callback in order."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Those that are not part of the module's state dict."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Attributes that cannot be pickled."""
    grown_module: nn.Module | None = None
    """The whole module, where hooks have added or removed parts that the driver's lacks or still has."""


def pack(
    module: nn.Module, callbacks: Sequence[Callback], *, state_keys: Set[str], shared: SharedMemory | None = None
) -> bytes:
    """Pickle the attributes as one, so that what they share stays shared; what cannot travel is left out and named.

    `state_keys`: those of the module's state as it came from the driver, which also has what is in the `shared` memory.
    """
    attributes = Attributes(
        modules={name: _without(shared, _own_attributes(child)) for name, child in module.named_modules()},
        buffers=_transient_buffers(module),
        callbacks=[_without(shared, _state(callback)) for callback in callbacks],
        grown_module=module if set(module.state_dict()) != state_keys else None,
    )
    try:
        return cloudpickle.dumps(attributes)
    except Exception:
        _drop_unpicklable(attributes)
        return cloudpickle.dumps(attributes)


def apply(pickled: bytes, module: nn.Module, callbacks: Sequence[Callback]) -> list[str]:
    """Put the attributes onto the driver's objects. Returns the names of those that could not travel."""
    attributes: Attributes = cloudpickle.loads(pickled)
    if attributes.grown_module is not None:
        grown = attributes.grown_module.__dict__
        # What was a plain attribute, such as None, and is a layer now would hide it.
        for name in {**grown["_modules"], **grown["_parameters"], **grown["_buffers"]}.keys() & module.__dict__.keys():
            del module.__dict__[name]
        module.__dict__.update(grown)
    for name, child in module.named_modules():
        child.__dict__.update(attributes.modules.get(name, {}))
    for name, buffer in attributes.buffers.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._buffers[leaf] = buffer
    for callback, state in zip(callbacks, attributes.callbacks, strict=True):
        callback.__dict__.update(state)
    return attributes.left_out


def apply_weights(state_dict: Mapping[str, Any], module: nn.Module) -> None:
    """Load what was trained into the driver's own tensors, in the precision that it was trained in. Those on the meta
    device come to the CPU with it."""
    _materialize(module)
    for name, tensor in module.state_dict(keep_vars=True).items():
        trained = state_dict.get(name)
        if isinstance(tensor, Tensor) and isinstance(trained, Tensor) and tensor.dtype != trained.dtype:
            tensor.data = tensor.data.to(trained.dtype)
    module.load_state_dict(state_dict)


def _materialize(module: nn.Module) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if parameter not in made:
                    made[parameter] = nn.Parameter(
                        torch.empty_like(parameter, device="cpu"), requires_grad=parameter.requires_grad
                    )
                part._parameters[name] = made[parameter]


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: _on_cpu(value)
        for name, value in _state(module).items()
        if (name not in _NN_INTERNAL or name == "training") and not isinstance(value, _LEFT_BEHIND)
    }


def _transient_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: buffer.detach().cpu()
        for prefix, child in module.named_modules()
        for name in child._non_persistent_buffers_set
        if (buffer := child._buffers.get(name)) is not None
    }


def _without(shared: SharedMemory | None, attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if shared is None or not shared.contains(value)}


def _state(owner: Any) -> dict[str, Any]:
    state = owner.__getstate__() if hasattr(owner, "__getstate__") else owner.__dict__
    return state if isinstance(state, dict) else {}


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def _drop_unpicklable(attributes: Attributes) -> None:
    owners = [*attributes.modules.items(), *((f"callback {i}", state) for i, state in enumerate(attributes.callbacks))]
    for owner, state in owners:
        for name in list(state):
            try:
                cloudpickle.dumps(state[name])
            except Exception:
                del state[name]
                attributes.left_out.append(f"{owner}.{name}" if owner else name)

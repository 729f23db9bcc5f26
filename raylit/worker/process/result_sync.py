"""Attributes and weights of modules and callbacks, returned to the driver's objects after a run.

The worker packs them, the driver applies them.
"""

import io
import pickle
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from raylit.callbacks.base import Callback
from raylit.compat.torch_core import list_registered
from raylit.strategies.sharded_state import has_memory_of_shape
from raylit.worker.data.shared_memory import SharedMemory

_NN_INTERNAL = frozenset(nn.Module().__dict__)
_LEFT_BEHIND = (DataLoader, Dataset, nn.Module)
"""Types that are not returned as attributes: data stays on the worker, modules return their state."""


@dataclass(slots=True)
class Attributes:
    """Plain attributes of every submodule by its name, and of every callback in order."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Buffers that are not part of the module's state dict."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters that require no gradient."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Attributes that cannot be pickled."""
    grown_module: nn.Module | None = None
    """The whole module, if hooks have added or removed parts of it."""


def pack(
    module: nn.Module, callbacks: Sequence[Callback], *, state_keys: Set[str], shared: SharedMemory | None = None
) -> bytes:
    """Pickle the attributes together, so that references between them are kept; those that cannot be pickled are named.

    Args:
        module: The module.
        callbacks: The callbacks.
        state_keys: Keys of the module's state dict as it came from the driver.
        shared: The run's shared memory; values that are unmodified in it are left out, as the driver has them.
    """
    own_keys = set(module.state_dict())
    attributes = Attributes(
        modules={
            name: _drop_unmodified(shared, _read_module_attributes(child)) for name, child in module.named_modules()
        },
        buffers=_read_transient_buffers(module, own_keys),
        frozen=frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad),
        callbacks=[_drop_unmodified(shared, _read_state(callback)) for callback in callbacks],
        grown_module=module if own_keys != state_keys else None,
    )
    try:
        return _pickle_on_host(attributes)
    except Exception:
        _drop_unpicklable(attributes)
        return _pickle_on_host(attributes)


class _HostPickler(cloudpickle.Pickler):
    """Pickler that moves tensors to the CPU, however deep they are nested: the driver may lack their device."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or obj.device.type in ("cpu", "meta"):
            return super().reducer_override(obj)
        copy = obj.detach().cpu()
        if isinstance(obj, nn.Parameter):
            copy = nn.Parameter(copy, requires_grad=obj.requires_grad)
        return copy.__reduce_ex__(pickle.DEFAULT_PROTOCOL)


def _pickle_on_host(value: Any) -> bytes:
    buffer = io.BytesIO()
    _HostPickler(buffer).dump(value)
    return buffer.getvalue()


def apply(pickled: bytes, module: nn.Module, callbacks: Sequence[Callback]) -> list[str]:
    """Set the attributes on the driver's objects and return the names of those that could not be pickled."""
    attributes: Attributes = cloudpickle.loads(pickled)
    if attributes.grown_module is not None:
        # A plain attribute, such as None, would hide the layer that has replaced it.
        for name in list_registered(attributes.grown_module) & module.__dict__.keys():
            del module.__dict__[name]
        module.__dict__.update(attributes.grown_module.__dict__)
    for name, child in module.named_modules():
        child.__dict__.update(attributes.modules.get(name, {}))
    for name, parameter in module.named_parameters():
        if parameter.requires_grad == (name in attributes.frozen):
            parameter.requires_grad_(name not in attributes.frozen)
    for name, buffer in attributes.buffers.items():
        owner, _, leaf = name.rpartition(".")
        _set_buffer(module.get_submodule(owner), leaf, buffer)
    for callback, state in zip(callbacks, attributes.callbacks, strict=True):
        callback.__dict__.update(state)
    return attributes.left_out


class GatheredWeights:
    """Weights that are returned in pieces.

    A piece is copied into the memory of the driver's module at once where it fits, so that there is never a second copy
    of the weights. A run that fails in between leaves the module with some of the new weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._module_state: dict[str, Any] | None = None
        self.state_dict: dict[str, Tensor] = {}
        """All weights so far: the module's own tensors, and others with memory of their own."""

    def take(self, piece: Mapping[str, Tensor]) -> None:
        """Copy a piece into the module's memory, or keep a clone where that does not fit."""
        if self._module_state is None:
            self._module_state = self._module.state_dict(keep_vars=True)
        for name, trained in piece.items():
            tensor = self._module_state.get(name)
            if not has_memory_of_shape(tensor, trained.shape) or tensor.device.type != "cpu":
                self.state_dict[name] = trained.clone()
                continue
            if tensor.dtype == trained.dtype:
                tensor.data.copy_(trained)
            else:
                tensor.data = trained.clone()
            self.state_dict[name] = tensor.detach()


def apply_weights(state_dict: Mapping[str, Any], module: nn.Module, *, is_adopting: bool = False) -> None:
    """Load trained weights into the driver's own tensors, in the precision that they were trained in.

    Tensors on the meta device are created on the CPU; with `is_adopting` they use the state dict's memory.
    """
    _materialize(module, state_dict if is_adopting else {})
    for name, tensor in module.state_dict(keep_vars=True).items():
        trained = state_dict.get(name)
        if isinstance(tensor, Tensor) and isinstance(trained, Tensor) and tensor.dtype != trained.dtype:
            tensor.data = tensor.data.to(trained.dtype)
    module.load_state_dict(state_dict)


def _materialize(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    parameters: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in parameters:
                    trained = state_dict.get(f"{prefix}.{name}" if prefix else name)
                    data = (
                        trained
                        if has_memory_of_shape(trained, parameter.shape)
                        else torch.empty_like(parameter, device="cpu")
                    )
                    parameters[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                setattr(part, name, parameters[parameter])


def _read_module_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: _to_cpu(value)
        for name, value in _read_state(module).items()
        if (name not in _NN_INTERNAL or name == "training") and not isinstance(value, _LEFT_BEHIND)
    }


def _read_transient_buffers(module: nn.Module, state_keys: Set[str]) -> dict[str, Tensor]:
    return {
        name: buffer.detach().cpu()
        for name, buffer in module.named_buffers(remove_duplicate=False)
        if name not in state_keys
    }


def _set_buffer(owner: nn.Module, name: str, buffer: Tensor) -> None:
    if hasattr(owner, name):
        setattr(owner, name, buffer)
    else:
        owner.register_buffer(name, buffer, persistent=False)


def _drop_unmodified(shared: SharedMemory | None, attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if shared is None or not shared.is_unmodified(value)}


def _read_state(owner: Any) -> dict[str, Any]:
    state = owner.__getstate__() if hasattr(owner, "__getstate__") else owner.__dict__
    return state if isinstance(state, dict) else {}


def _to_cpu(value: Any) -> Any:
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

"""What hooks left on modules and callbacks, on its way back to the driver's objects. Worker packs, driver applies."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from raylit.callbacks.base import Callback
from raylit.compat.torch_module import list_registered
from raylit.strategies.sharded_state import has_memory_of_shape
from raylit.worker.data.shared_memory import SharedMemory

_NN_INTERNAL = frozenset(nn.Module().__dict__)
_LEFT_BEHIND = (DataLoader, Dataset, nn.Module)
"""Data stays where it is; modules go by their state."""


@dataclass(slots=True)
class Attributes:
    """Plain attributes of every submodule by its name, and of every callback in order."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """Those that are not part of the module's state dict."""
    frozen: frozenset[str] = frozenset()
    """Names of the parameters that require no gradient."""
    callbacks: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """Attributes that cannot be pickled."""
    grown_module: nn.Module | None = None
    """The whole module, where hooks have added or removed parts that the driver's lacks or still has."""


def pack(
    module: nn.Module, callbacks: Sequence[Callback], *, state_keys: Set[str], shared: SharedMemory | None = None
) -> bytes:
    """Pickle the attributes as one, so that what they share stays shared; what cannot travel is left out and named.

    `state_keys`: those of the module's state as it came from the driver, which also has what is as it was in the
    `shared` memory.
    """
    own_keys = set(module.state_dict())
    attributes = Attributes(
        modules={name: _without(shared, _own_attributes(child)) for name, child in module.named_modules()},
        buffers=_transient_buffers(module, own_keys),
        frozen=frozenset(name for name, parameter in module.named_parameters() if not parameter.requires_grad),
        callbacks=[_without(shared, _state(callback)) for callback in callbacks],
        grown_module=module if own_keys != state_keys else None,
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
        # What was a plain attribute, such as None, and is a layer now would hide it.
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
    """Weights that come back in pieces. What the driver's module has memory for goes there at once, so that there is
    never a second copy of it; a run that fails while they come leaves it with some of them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own: dict[str, Any] | None = None
        self.state_dict: dict[str, Tensor] = {}
        """All that has come so far: the module's own tensors, and others with memory of their own."""

    def take(self, piece: Mapping[str, Tensor]) -> None:
        if self._own is None:
            self._own = self._module.state_dict(keep_vars=True)
        for name, trained in piece.items():
            own = self._own.get(name)
            if not has_memory_of_shape(own, trained.shape) or own.device.type != "cpu":
                self.state_dict[name] = trained.clone()
                continue
            if own.dtype == trained.dtype:
                own.data.copy_(trained)
            else:
                own.data = trained.clone()
            self.state_dict[name] = own.detach()


def apply_weights(state_dict: Mapping[str, Any], module: nn.Module, *, is_adopting: bool = False) -> None:
    """Load what was trained into the driver's own tensors, in the precision that it was trained in. Those on the meta
    device come to the CPU with it; `is_adopting`: by taking the state dict's memory for theirs."""
    _materialize(module, state_dict if is_adopting else {})
    for name, tensor in module.state_dict(keep_vars=True).items():
        trained = state_dict.get(name)
        if isinstance(tensor, Tensor) and isinstance(trained, Tensor) and tensor.dtype != trained.dtype:
            tensor.data = tensor.data.to(trained.dtype)
    module.load_state_dict(state_dict)


def _materialize(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    made: dict[nn.Parameter, nn.Parameter] = {}
    for prefix, part in module.named_modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.is_meta:
                if parameter not in made:
                    trained = state_dict.get(f"{prefix}.{name}" if prefix else name)
                    data = (
                        trained
                        if has_memory_of_shape(trained, parameter.shape)
                        else torch.empty_like(parameter, device="cpu")
                    )
                    made[parameter] = nn.Parameter(data, requires_grad=parameter.requires_grad)
                setattr(part, name, made[parameter])


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    return {
        name: _on_cpu(value)
        for name, value in _state(module).items()
        if (name not in _NN_INTERNAL or name == "training") and not isinstance(value, _LEFT_BEHIND)
    }


def _transient_buffers(module: nn.Module, state_keys: Set[str]) -> dict[str, Tensor]:
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


def _without(shared: SharedMemory | None, attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if shared is None or not shared.has_as_given(value)}


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

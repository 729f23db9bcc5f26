"""Private names of torch's modules, tensors and data loaders, each behind one function. Any process.

Written against torch 2.13, tested with torch 2.9.1 too. What torch has a public way for, such as
`named_parameters(recurse=False, remove_duplicate=False)` and `setattr`, is done where it is needed, not here.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.utils.data import DataLoader

from raylit.compat.private_names import import_private, read_private
from raylit.errors import RaylitError

_COMPILE = "torch.compile of a module"
_SYNC = "sync_batchnorm=True"


# Modules


def find_reset(module: nn.Module) -> Callable[[], object] | None:
    """Return the method that initializes a module's own parameters; None if it has none."""
    # torch's MultiheadAttention and Transformer use the second name.
    for name in ("reset_parameters", "_reset_parameters"):
        if callable(reset := getattr(module, name, None)):
            return reset
    return None


def copy_registered(source: nn.Module, target: nn.Module) -> None:
    """Have `target` use the own parameters and buffers of `source`, including those that are None."""
    for name in ("_parameters", "_buffers"):
        read_private(target, name, feature=_SYNC).update(read_private(source, name, feature=_SYNC))


def build_flat_module(
    parameters: Iterable[tuple[str, nn.Parameter]], buffers: Iterable[tuple[str, Tensor]]
) -> nn.Module:
    """Build a module with these parameters and buffers, whose names may have dots in them."""
    module, feature = nn.Module(), "an average of sharded weights"
    read_private(module, "_parameters", feature=feature).update(parameters)
    read_private(module, "_buffers", feature=feature).update(buffers)
    return module


def list_registered(module: nn.Module) -> set[str]:
    """Return the names of a module's own parameters, buffers and submodules, also of those that are None."""
    feature = "a module that has changed on a worker"
    return {
        name for kind in ("_parameters", "_buffers", "_modules") for name in read_private(module, kind, feature=feature)
    }


def has_global_hooks() -> bool:
    """Return whether a hook is registered for the calls of all modules."""
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    return any(getattr(torch_modules, name, None) for name in names)


def get_call(module: nn.Module) -> Callable[..., Any]:
    """Return the function that runs when an uncompiled module is called: its hooks and its `forward`."""
    return cast(Callable[..., Any], read_private(module, "_call_impl", feature=_COMPILE))


def get_compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """Return the function that runs when a compiled module is called; None if it is not compiled."""
    return cast(Callable[..., Any] | None, read_private(module, "_compiled_call_impl", feature=_COMPILE))


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Have calls of a module go to `call`, as `module.compile()` does; None restores the module's own call."""
    read_private(module, "_compiled_call_impl", feature=_COMPILE)  # it raises where torch would ignore what is set
    module._compiled_call_impl = call


# Tensors


def read_version(tensor: Tensor) -> int:
    """Return the number that grows with each in-place change of a tensor."""
    return cast(int, read_private(tensor, "_version", feature="a gradient scaler with several optimizers"))


def build_negative_view(tensor: Tensor) -> Tensor:
    """Return a view that reads as the tensor with the opposite sign."""
    return cast(Tensor, read_private(torch, "_neg_view", feature="a checkpoint of a view that negates")(tensor))


def compute_norms(tensors: list[Tensor], order: float) -> list[Tensor]:
    """Return the norm of each tensor; one kernel for all of them where torch has it."""
    together = getattr(torch, "_foreach_norm", None)
    if together is None:
        return [torch.linalg.vector_norm(tensor, order) for tensor in tensors]
    return list(together(tensors, order))


def scale_in_place(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor by a 0-dim one; one kernel for all of them where torch has it."""
    together = getattr(torch, "_foreach_mul_", None)
    if together is not None:
        together(tensors, factor)
        return
    for tensor in tensors:
        tensor.mul_(factor)


# Data loaders


def drop_iterator(loader: "DataLoader[Any]") -> None:
    """Make a copied loader with persistent processes start its own processes for the next iteration."""
    vars(loader)["_iterator"] = None


def find_loader_death() -> RuntimeError | None:
    """Return torch's error about a DataLoader process of this process that has died; None if none has."""
    try:
        raise_deaths = import_private("torch._C", "_error_if_any_worker_fails", feature="naming a dead loader")
    except RaylitError:
        return None
    try:
        raise_deaths()
    except RuntimeError as error:
        return error
    return None


__all__ = [
    "BatchNormBase",
    "build_flat_module",
    "build_negative_view",
    "compute_norms",
    "copy_registered",
    "drop_iterator",
    "find_loader_death",
    "find_reset",
    "get_call",
    "get_compiled_call",
    "has_global_hooks",
    "list_registered",
    "read_version",
    "scale_in_place",
    "set_compiled_call",
]

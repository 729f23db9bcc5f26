"""Read and drive the private state behind torch's `fully_shard`, and describe its checkpoints. Driver and worker.

Written against torch 2.13, tested with torch 2.9.1 too. There a unit's state has one parameter group or none in
the place of a list.

A unit is a module that `fully_shard` was called on. A parameter group is what a unit gathers and reduces at once.
`unsharded_param` and the like are attributes of torch's `FSDPParam`, which is private as a class.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from raylit.compat.private_names import describe_missing, read_private

_FEATURE = "strategy='fsdp'"


def get_state(unit: nn.Module) -> Any:
    """Return the state that `fully_shard` keeps for a unit."""
    return read_private(unit, "_get_fsdp_state", feature=_FEATURE)()


def list_param_groups(state: Any) -> list[Any]:
    """Return the parameter groups of a unit's state; none for a unit without parameters of its own."""
    try:
        return list(state._fsdp_param_groups)
    except AttributeError:
        group = read_private(state, "_fsdp_param_group", feature=_FEATURE)  # torch 2.9
        return [] if group is None else [group]


def list_sharded_parameters(state: Any) -> list[Any]:
    """Return torch's `FSDPParam` of each parameter that a unit shards."""
    return [parameter for group in list_param_groups(state) for parameter in group.fsdp_params]


# Before training


def initialize_root(state: Any) -> None:
    """Do for the root unit what torch does in its first forward pass, with the parameters that are trained now."""
    read_private(state, "_lazy_init", feature=_FEATURE)()
    for group in iterate_all_param_groups(state):
        read_private(group, "_init_mp_dtypes", feature=_FEATURE)()


def copy_out_at_once(unit: Any) -> None:
    """Have a unit copy out gathered parameters before it goes on, and free the gathered buffer."""
    read_private(unit, "_set_unshard_async_op", feature=_FEATURE)(True)


def get_reduce_scatter(group: Any) -> Any:
    """Return the reduce-scatter that a parameter group uses: an object with `allocate` and `__call__`."""
    return read_private(group, "_reduce_scatter_comm", feature=_FEATURE)


def remove_forward_hooks(state: Any) -> None:
    """Remove the hooks by which a unit gathers its parameters around its forward pass."""
    for name in ("_pre_forward_hook_handle", "_post_forward_hook_handle"):
        read_private(state, name, feature=_FEATURE).remove()


# In a step


def run_pre_forward(state: Any, unit: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Gather a unit's parameters, as its hook does before a forward pass, and return its arguments. Collective."""
    prepared: tuple[Any, Any] = read_private(state, "_pre_forward", feature=_FEATURE)(unit, args, kwargs)
    return prepared


def run_post_forward(state: Any, unit: nn.Module, args: Any, output: Any) -> Any:
    """Reshard a unit's parameters, as its hook does after a forward pass, and return the output to go on with."""
    return read_private(state, "_post_forward", feature=_FEATURE)(unit, args, output)


def run_pre_backward(state: Any, gradient: Tensor) -> None:
    """Gather a unit's parameters, as its hook does before a backward pass. Collective."""
    read_private(state, "_pre_backward", feature=_FEATURE)(gradient)


def finish_backward(state: Any) -> None:
    """Reduce left-over gradients for the root unit, as torch does at the end of a backward pass. Collective."""
    read_private(state, "_root_post_backward_final_callback", feature=_FEATURE)()


def get_forward_order(state: Any) -> list[Any]:
    """Return the live list of parameter groups in the order in which their forward passes have ended."""
    order: list[Any] = read_private(state, "_comm_ctx", feature=_FEATURE).post_forward_order
    return order


def clear_forward_order(state: Any) -> None:
    """Forget the root unit's forward passes, so that none is taken for part of the next backward pass."""
    get_forward_order(state).clear()
    for group in iterate_all_param_groups(state):
        read_private(group, "_post_forward_indices", feature=_FEATURE).clear()


def iterate_all_param_groups(state: Any) -> Iterator[Any]:
    """Yield the parameter groups of the initialized root unit and of all units below it."""
    for one in read_private(state, "_state_ctx", feature=_FEATURE).all_states:
        yield from list_param_groups(one)


# After a run


def remove_sharding(unit: FSDPModule) -> None:
    """Restore the class that a unit had before `fully_shard`, and remove the hooks that it added."""
    state = get_state(unit)  # type: ignore[arg-type]
    remove_forward_hooks(state)
    for group in list_param_groups(state):
        for name in ("_module_to_pre_save_state_dict_hook_handle", "_module_to_pre_load_state_dict_hook_handle"):
            for handle in read_private(group, name, feature=_FEATURE).values():
                handle.remove()
        for parameter in group.fsdp_params:
            read_private(parameter, "_post_load_hook_handle", feature=_FEATURE).remove()
    bases = type(unit).__mro__  # the class that fully_shard makes, FSDPModule, the user's class, ...
    if bases[1] is not FSDPModule:
        raise describe_missing(type(unit), "__mro__[1] is FSDPModule", feature=_FEATURE)
    unit.__class__ = bases[2]


# Checkpoints


METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        # BytesStorageMetadata is left out: torch's planner would unpickle such a part; it reads tensors with
        # weights_only.
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}
"""Names in a pickled `Metadata` that has only tensors, by module; dtypes are not among them."""


def build_storage_info(filename: str, *, offset: int, length: int) -> object:
    """Return an entry of a `Metadata` that says where torch.distributed.checkpoint finds a tensor's bytes."""
    # The import takes a while.
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(filename, offset, length)

"""Arithmetic on sharded parameters: local shards, gathered copies and the loss scale. Worker."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from raylit.compat.torch_optim import LocalGradScaler
from raylit.errors import CheckpointError


def list_shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's shards of the tensors; an empty shard becomes a single zero."""
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return [tensor if tensor.numel() > 0 else tensor.new_zeros(1) for tensor in own]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the CPU. Collective if it is sharded."""
    own = tensor.detach()
    return (own.full_tensor() if isinstance(own, DTensor) else own).cpu()


def all_gather_shards(value: Any) -> Any:
    """Return the value with whole tensors on rank 0, gathered one after the other. Collective.

    Tensors are None on the other ranks.
    """
    if isinstance(value, Tensor):
        tensor = gather_full_tensor(value)
        return tensor if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        together = copy.copy(value)
        for name, item in value.items():
            together[name] = all_gather_shards(item)
        return together
    return type(value)(all_gather_shards(item) for item in value) if type(value) in (list, tuple) else value


def build_local_value(
    value: Any, own: Any, where: str, targets: dict[str, Tensor], *, is_in_place: bool = False
) -> Any:
    """Return the local form of a saved value: sharded as `own` is, if the shapes agree.

    For a placeholder that is a target tensor, which is added to `targets` for its numbers to be read; with
    `is_in_place` the target is `own` itself.
    """
    if not isinstance(value, Tensor):
        return value
    is_alike = isinstance(own, DTensor) and value.shape == own.shape
    if value.is_meta:
        if not is_alike:
            targets[where] = torch.empty(value.shape, dtype=value.dtype)
        else:
            targets[where] = own.detach() if is_in_place else torch.empty_like(own.detach(), dtype=value.dtype)
        return targets[where]
    if not is_alike:
        return value
    # Every rank has the whole tensor, so that nothing needs to be sent.
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def build_local_state(
    state: dict[str, Any], optimizer: Optimizer, where: str, targets: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the local form of an optimizer's saved state, as `build_local_value` does for a value.

    Raises:
        CheckpointError: the optimizer has another number of parameters than the saved one.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(indices)} parameters, {type(optimizer).__name__} here has "
            f"{len(parameters)}: resume with the optimizer that it was saved with"
        )
    own = dict(zip(indices, parameters, strict=True))
    local_state = {
        index: {
            name: build_local_value(value, own[index], f"{where}.state.{index}.{name}", targets)
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": local_state}


class ShardedScaler(LocalGradScaler):
    """Gradient scaler with which all ranks skip a step if one rank's shard has a number that is not finite.

    torch's own scaler cannot have sharded and whole gradients in one optimizer.
    """

    def select_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        return list_shards(gradients)

    def combine_found_inf(self, found_inf: Tensor) -> None:
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)

"""Arithmetic on sharded parameters: norms, copies and the loss scale."""

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


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts of them, none of which is empty."""
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return [tensor if tensor.numel() > 0 else tensor.new_zeros(1) for tensor in own]


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """On the CPU. Collective where it is sharded."""
    own = tensor.detach()
    return (own.full_tensor() if isinstance(own, DTensor) else own).cpu()


def all_gather_shards(value: Any) -> Any:
    """With whole tensors on rank 0, one gathered after the other; what the other ranks get is of no use. Collective."""
    if isinstance(value, Tensor):
        tensor = gather_full_tensor(value)
        return tensor if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        together = copy.copy(value)
        for name, item in value.items():
            together[name] = all_gather_shards(item)
        return together
    return type(value)(all_gather_shards(item) for item in value) if type(value) in (list, tuple) else value


def counterpart(value: Any, own: Any, where: str, targets: dict[str, Tensor], *, is_in_place: bool = False) -> Any:
    """What stands for a saved value here: shared out as `own` is where it is of that shape. Those whose numbers are yet
    to be read are among the `targets`; `is_in_place`: into `own` itself."""
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
    # Every rank has the whole of it: nothing needs to be sent.
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def counterpart_of_state(
    state: dict[str, Any], optimizer: Optimizer, where: str, targets: dict[str, Tensor]
) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    if len(indices) != len(parameters):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(indices)} parameters, {type(optimizer).__name__} here has "
            f"{len(parameters)}: resume with the optimizer that it was saved with"
        )
    own = dict(zip(indices, parameters, strict=True))
    of_parameters = {
        index: {
            name: counterpart(value, own[index], f"{where}.state.{index}.{name}", targets)
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": of_parameters}


class ShardedScaler(LocalGradScaler):
    """A number that is not finite in the shard of one rank makes all of them leave out the step. torch's own cannot
    have both kinds of gradients in one optimizer."""

    def select_gradients(self, gradients: list[Tensor]) -> list[Tensor]:
        return shards(gradients)

    def combine_found_inf(self, found_inf: Tensor) -> None:
        dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)

"""Tensors of every rank, gathered on every rank for the user's own use. Worker."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(value: Any, *, group: Any, with_gradients: bool, device: torch.device) -> Any:
    """Every tensor or number in nested dicts, lists and tuples as a stack with a row of each rank. Collective."""
    if isinstance(value, (bool, int, float)):
        value = torch.tensor(value, device=device)
    if isinstance(value, Tensor):
        return _Gather.apply(value, group) if with_gradients else _stacked(value, group)
    if isinstance(value, dict):
        return {
            key: gathered(item, group=group, with_gradients=with_gradients, device=device)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [gathered(item, group=group, with_gradients=with_gradients, device=device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


class _Gather(torch.autograd.Function):
    """The gradient of a rank's tensor is the sum of those that all ranks have for its row."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _stacked(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous()
        dist.all_reduce(summed, group=ctx.group)
        return summed[dist.get_rank(ctx.group)], None


def _stacked(tensor: Tensor, group: Any) -> Tensor:
    tensor = tensor.contiguous()
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor, group=group)
    return torch.stack(rows)

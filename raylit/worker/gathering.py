"""Tensors of every rank, gathered on every rank for the user's own use. Worker."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from raylit.accelerators.transfer import is_namedtuple
from raylit.errors import ModuleError

_MAX_DIMS = 16


def gathered(value: Any, *, group: Any, with_gradients: bool, device: torch.device, is_even: bool) -> Any:
    """Every tensor or number in nested dicts, lists and tuples as a stack with a row of each rank. Collective.

    `is_even`: tensors have one shape on all ranks. Else those that are shorter in their first dimension than another
    rank's are filled up by repetition, as a DistributedSampler fills up a batch.

    ModuleError: they differ in other dimensions.
    """

    def gather(item: Any) -> Any:
        return gathered(item, group=group, with_gradients=with_gradients, device=device, is_even=is_even)

    if isinstance(value, (bool, int, float)):
        value = torch.tensor(value, device=device)
    if isinstance(value, Tensor):
        if not is_even:
            value = _filled_up(value, group)
        return _Gather.apply(value, group) if with_gradients else _stacked(value, group)
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [gather(item) for item in value]
        return type(value)(*items) if is_namedtuple(value) else type(value)(items)
    return value


def _filled_up(tensor: Tensor, group: Any) -> Tensor:
    """As long as the longest of the ranks'. Collective."""
    own = torch.full((_MAX_DIMS + 1,), -1, dtype=torch.int64, device=tensor.device)
    own[: tensor.ndim + 1] = torch.tensor([tensor.ndim, *tensor.shape], device=tensor.device)
    shapes = [tuple(row[1 : row[0] + 1]) for row in _stacked(own, group).tolist()]
    if len(set(shapes)) == 1:
        return tensor
    if len({shape[1:] for shape in shapes}) > 1 or () in shapes:
        listed = "; ".join(f"{shape} on rank {rank}" for rank, shape in enumerate(shapes))
        raise ModuleError(
            f"all_gather of tensors whose shapes differ beyond the first dimension: {listed}. Pad them to one shape"
        )
    length = max(shape[0] for shape in shapes)
    if tensor.shape[0] == 0:
        return tensor.new_zeros((length, *tensor.shape[1:]))
    return tensor[torch.arange(length, device=tensor.device) % tensor.shape[0]]


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

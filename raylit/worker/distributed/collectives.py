"""Collectives over the ranks: reductions of numbers, gathering of nested tensors and objects."""

import sys
import threading
from datetime import timedelta
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor

from raylit.accelerators.transfer import is_namedtuple
from raylit.errors import ModuleError

_NOTICE_S = 10.0
_MEETING_S = 300.0
"""Rank 0 may have been busy with something of its own, which the others wait for."""


class Collectives:
    """The ranks of the run; all of its methods are collective and answer at once for a single worker."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def gather_vector(self, values: Tensor) -> Tensor:
        """A float64 CPU vector of one length on every rank, as the rows of a (world_size, length) matrix."""
        if self.world_size == 1:
            return values[None]
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def mean(self, value: Tensor) -> Tensor:
        """Of a tensor of one shape and device on every rank."""
        if self.world_size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def gather_counts(self, count: int) -> list[int]:
        """An integer of every rank, in rank order."""
        return [int(value) for value in self.gather_vector(torch.tensor([float(count)], dtype=torch.float64))[:, 0]]

    def gather_objects(self, value: Any) -> list[Any]:
        """A picklable object of every rank, in rank order. Slow: only at the end of an epoch, or rarer."""
        if self.world_size == 1:
            return [value]
        # cloudpickle, because a metric's reduction may be a lambda.
        pickles: list[Any] = [None] * self.world_size
        dist.all_gather_object(pickles, cloudpickle.dumps(value))
        return [cloudpickle.loads(pickle) for pickle in pickles]

    def meet(self, what: str, *, notice_s: float = _NOTICE_S, timeout_s: float = _MEETING_S) -> None:
        """Before something that the user's code calls on every rank. A rank that waits longer than `notice_s` says so,
        as one that is alone in it would wait for ever.

        ModuleError: the others have not come within `timeout_s`.
        """
        if self.world_size == 1:
            return
        advice = (
            f"rank {self.rank} waits in {what} for the other ranks. It is collective: every rank calls it, at the same "
            "place, and rank 0 alone does what is done once. Call it without `if trainer.is_global_zero` and the like, "
            "also outside of rank_zero_only"
        )
        notice = threading.Timer(notice_s, lambda: print(advice, file=sys.stderr, flush=True))
        notice.daemon = True
        notice.start()
        try:
            # Its messages do not mix with those of another collective that a rank may be in, as a barrier's would.
            if dist.get_backend() == "gloo":
                dist.monitored_barrier(timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
            else:
                self.gather_counts(0)
        except RuntimeError as error:
            if "monitoredBarrier" not in str(error) or "onnection" in str(error):
                raise  # a rank has died
            raise ModuleError(f"{advice}. The others have not come within {timeout_s:g} s") from error
        finally:
            notice.cancel()

    def barrier(self, *, timeout_s: float) -> None:
        """Every rank waits for the slowest one, up to `timeout_s` beyond the fastest."""
        if self.world_size > 1:
            work = dist.barrier(async_op=True)
            work.wait(timedelta(seconds=timeout_s))


_MAX_DIMS = 16


def all_gather_nested(value: Any, *, group: Any, with_gradients: bool, device: torch.device, is_even: bool) -> Any:
    """Every tensor or number in nested dicts, lists and tuples as a stack with a row of each rank. Collective.

    `is_even`: tensors have one shape on all ranks. Else those that are shorter in their first dimension than another
    rank's are filled up by repetition, as a DistributedSampler fills up a batch.

    ModuleError: they differ in other dimensions.
    """

    def gather(item: Any) -> Any:
        return all_gather_nested(item, group=group, with_gradients=with_gradients, device=device, is_even=is_even)

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

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
_WAIT_TIMEOUT_S = 300.0
"""Rank 0 may be busy with work of its own while the others wait."""


class Collectives:
    """Collectives over the ranks of the run; with one rank all of them return at once."""

    def __init__(self, *, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size

    def gather_vector(self, values: Tensor) -> Tensor:
        """All-gather a float64 CPU vector of one length as the rows of a (world_size, length) matrix."""
        if self.world_size == 1:
            return values[None]
        require_reachable(values)
        rows = [torch.empty_like(values) for _ in range(self.world_size)]
        dist.all_gather(rows, values)
        return torch.stack(rows)

    def mean(self, value: Tensor) -> Tensor:
        """Average a tensor of one shape and device over all ranks."""
        if self.world_size == 1:
            return value
        total = _to_reachable(value).clone()
        dist.all_reduce(total)
        return total.to(value.device) / self.world_size

    def gather_counts(self, count: int) -> list[int]:
        """All-gather an integer of every rank, in rank order."""
        return [int(value) for value in self.gather_vector(torch.tensor([float(count)], dtype=torch.float64))[:, 0]]

    def gather_objects(self, value: Any) -> list[Any]:
        """All-gather a picklable object of every rank, in rank order.

        Slow: call it only at the end of an epoch, or less often.
        """
        if self.world_size == 1:
            return [value]
        # cloudpickle, because a metric's reduction may be a lambda.
        pickles: list[Any] = [None] * self.world_size
        dist.all_gather_object(pickles, cloudpickle.dumps(value))
        return [cloudpickle.loads(pickle) for pickle in pickles]

    def wait_for_all_ranks(self, what: str, *, notice_s: float = _NOTICE_S, timeout_s: float = _WAIT_TIMEOUT_S) -> None:
        """Wait for all ranks before a collective that the user's code calls.

        A rank that waits longer than `notice_s` prints a notice, as a rank that is the only one to call it would wait
        forever.

        Args:
            what: The user's call, for the notice.
            notice_s: Seconds before the notice.
            timeout_s: Seconds before the error.

        Raises:
            ModuleError: Other ranks have not called it within `timeout_s`.
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
            # Unlike a barrier's, its messages do not mix with those of another collective that a rank may be in.
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
        """Wait for the slowest rank, up to `timeout_s` beyond the fastest."""
        if self.world_size > 1:
            work = dist.barrier(async_op=True)
            work.wait(timedelta(seconds=timeout_s))


def require_reachable(tensor: Tensor) -> None:
    """Check that torch.distributed can read a tensor: with one on XLA it does nothing, and says nothing.

    Raises:
        ModuleError: The tensor is on XLA.
    """
    if tensor.device.type == "xla":
        raise ModuleError(
            "a collective of torch.distributed was called with a tensor on XLA, which it would leave as it is, without "
            "an error: pass tensor.cpu(), or use self.all_gather"
        )


def _to_reachable(tensor: Tensor) -> Tensor:
    """Return the tensor where torch.distributed can read it: a differentiable copy on the CPU of one on XLA."""
    return tensor.cpu() if tensor.device.type == "xla" else tensor


_MAX_DIMS = 16


def all_gather_nested(value: Any, *, group: Any, with_gradients: bool, device: torch.device, is_even: bool) -> Any:
    """Gather every tensor or number in nested dicts, lists and tuples into a stack with one row per rank. Collective.

    Args:
        value: Nested values, alike on all ranks but for their numbers.
        group: Process group; None for all ranks.
        with_gradients: Back-propagate through the collective.
        device: Device for numbers.
        is_even: Tensors have one shape on all ranks. Otherwise those that are shorter in their first dimension than
            another rank's are padded by repetition, as a DistributedSampler pads a batch.

    Raises:
        ModuleError: Shapes differ in other dimensions.
    """

    def gather(item: Any) -> Any:
        return all_gather_nested(item, group=group, with_gradients=with_gradients, device=device, is_even=is_even)

    if isinstance(value, (bool, int, float)):
        value = torch.tensor(value, device=device)
    if isinstance(value, Tensor):
        own_device, value = value.device, _to_reachable(value)
        if not is_even:
            value = _pad_first_dimension(value, group)
        rows = _DifferentiableGather.apply(value, group) if with_gradients else _gather_stack(value, group)
        return rows.to(own_device)
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [gather(item) for item in value]
        return type(value)(*items) if is_namedtuple(value) else type(value)(items)
    return value


def _pad_first_dimension(tensor: Tensor, group: Any) -> Tensor:
    """Pad a tensor to the length of the longest of the ranks' tensors by repeating its rows. Collective."""
    shape_row = torch.full((_MAX_DIMS + 1,), -1, dtype=torch.int64, device=tensor.device)
    shape_row[: tensor.ndim + 1] = torch.tensor([tensor.ndim, *tensor.shape], device=tensor.device)
    shapes = [tuple(row[1 : row[0] + 1]) for row in _gather_stack(shape_row, group).tolist()]
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


class _DifferentiableGather(torch.autograd.Function):
    """All-gather whose gradient for a rank's tensor is the sum of all ranks' gradients for its row."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _gather_stack(tensor, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        summed = gradients[0].contiguous()
        dist.all_reduce(summed, group=ctx.group)
        return summed[dist.get_rank(ctx.group)], None


def _gather_stack(tensor: Tensor, group: Any) -> Tensor:
    require_reachable(tensor)
    tensor = tensor.contiguous()
    rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, tensor, group=group)
    return torch.stack(rows)

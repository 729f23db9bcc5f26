"""Peers: what the ranks tell each other outside gradient sync. Worker."""

from datetime import timedelta
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor


class Peers:
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

    def barrier(self, *, timeout_s: float) -> None:
        """Every rank waits for the slowest one, up to `timeout_s` beyond the fastest."""
        if self.world_size > 1:
            work = dist.barrier(async_op=True)
            work.wait(timedelta(seconds=timeout_s))

"""Peers: what the ranks tell each other outside gradient sync. Worker."""

import sys
import threading
from datetime import timedelta
from typing import Any

import cloudpickle
import torch
import torch.distributed as dist
from torch import Tensor

from raylit.errors import ModuleError

_NOTICE_S = 10.0
_MEETING_S = 300.0
"""Rank 0 may have been busy with something of its own, which the others wait for."""


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

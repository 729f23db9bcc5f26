"""Averaging of gradients in a DDP communication hook: in their own precision, or compressed."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylit.config.strategy import CommHook, DDPStrategy

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # torch's own, which it lets run over NCCL only.
    "bf16_compress_hook": torch.bfloat16,
    "fp16_compress_hook": torch.float16,
}


def comm_hook(options: DDPStrategy) -> CommHook | None:
    """For DDP to register; None: gradients travel as they are."""
    hook, wrapper = options.ddp_comm_hook, options.ddp_comm_wrapper
    if hook is None:
        return None
    dtype = dtype_on_the_way(hook)
    if dtype is not None:
        hook = partial(_halved, dtype)
    assert callable(hook)
    chosen = hook if wrapper is None else wrapper(hook)

    def named(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        return chosen(state, bucket)  # DDP asks a hook for its name and signature, which not everything callable has

    return named


def dtype_on_the_way(hook: CommHook | str | None) -> torch.dtype | None:
    """What a hook makes of gradients, which those that are averaged by hand become too; None: others."""
    return _DTYPES.get(hook if isinstance(hook, str) else getattr(hook, "__name__", ""))


def _halved(dtype: torch.dtype, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """`state`: a process group, None for all ranks. Divided first: sums of float16 numbers overflow early."""
    group = dist.group.WORLD if state is None else state
    assert group is not None
    buffer = bucket.buffer()
    sent = buffer.to(dtype).div_(group.size())
    future = dist.all_reduce(sent, group=group, async_op=True).get_future()
    return future.then(lambda arrived: buffer.copy_(arrived.value()[0]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReducedPrecision:
    """How gradients go from rank to rank, here as in DDP."""

    bucket_bytes: float = 25 * 2**20
    """They travel together up to this size."""
    dtype: torch.dtype | None = None
    """As what they travel; None: as what they are."""

    @classmethod
    def of(cls, options: DDPStrategy) -> "ReducedPrecision":
        size = {} if options.bucket_cap_mb is None else {"bucket_bytes": options.bucket_cap_mb * 2**20}
        return cls(**size, dtype=dtype_on_the_way(options.ddp_comm_hook))

    def average(self, gradients: list[Tensor]) -> None:
        """Their mean over the ranks, in place. Collective."""
        world_size = dist.get_world_size()
        for bucket in _buckets(gradients, size_bytes=self.bucket_bytes):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            # Divided before it is added up, as DDP's hooks do it: sums of half-precision numbers overflow early.
            sent = flat if self.dtype is None else flat.to(self.dtype).div_(world_size)
            dist.all_reduce(sent)
            mean = sent.div_(world_size) if self.dtype is None else sent.to(flat.dtype)
            for gradient, part in zip(bucket, mean.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def average_gradients(
    parameters: Sequence[nn.Parameter], is_touched: Sequence[bool] | None = None, *, travel: ReducedPrecision
) -> None:
    """The mean of the gradients over the ranks, in place. Collective; the same parameters on every rank.

    `is_touched`: whose gradients have changed on this rank; by default all that there are. A parameter that no rank
    has touched keeps what it has, as it would in one process.
    """
    if not parameters:
        return
    own = [parameter.grad is not None for parameter in parameters] if is_touched is None else is_touched
    present = torch.tensor([float(flag) for flag in own], device=parameters[0].device)
    dist.all_reduce(present)
    gradients = []
    for parameter, num_present in zip(parameters, present.tolist(), strict=True):
        if num_present == 0:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    travel.average(gradients)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Rank 0's values to all, in place. Collective."""
    for tensor in tensors:
        copy = tensor.contiguous()
        dist.broadcast(copy, src=0)
        if copy is not tensor:
            tensor.copy_(copy)


class TouchedGradients:
    """Knows which parameters' gradients backward passes have changed since they were last averaged."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, travel: ReducedPrecision) -> None:
        self._travel = travel
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._touched: set[int] = set()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._touch, index))
            for index, parameter in enumerate(self._parameters)
        ]

    def is_outdated(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Others of the parameters are trained now."""
        now = [id(parameter) for parameter in parameters if parameter.requires_grad]
        return now != [id(parameter) for parameter in self._parameters]

    def average(self) -> None:
        if not self._touched:
            return
        is_touched = [index in self._touched for index in range(len(self._parameters))]
        self._touched.clear()
        average_gradients(self._parameters, is_touched, travel=self._travel)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _touch(self, index: int, parameter: Tensor) -> None:
        self._touched.add(index)


def _buckets(gradients: list[Tensor], *, size_bytes: float) -> Iterator[list[Tensor]]:
    """Of one kind and place each, at most the size of a bucket unless a single one is larger."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_kind[gradient.dtype, gradient.device].append(gradient)
    for alike in by_kind.values():
        bucket: list[Tensor] = []
        held_bytes = 0
        for gradient in alike:
            if bucket and held_bytes + gradient.nbytes > size_bytes:
                yield bucket
                bucket, held_bytes = [], 0
            bucket.append(gradient)
            held_bytes += gradient.nbytes
        yield bucket

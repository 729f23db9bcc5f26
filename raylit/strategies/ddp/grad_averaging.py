"""Averaging of gradients over ranks, in their own precision or a reduced one. Worker.

DDP's communication hook and the averages that raylit makes itself share the settings here.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raylit.config import CommHook, DDPStrategy

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    # Names of torch's own hooks, which torch lets run over NCCL only.
    "bf16_compress_hook": torch.bfloat16,
    "fp16_compress_hook": torch.float16,
}


def build_comm_hook(options: DDPStrategy) -> CommHook | None:
    """Build the communication hook that DDP registers; None if gradients are sent in their own precision."""
    hook, wrapper = options.ddp_comm_hook, options.ddp_comm_wrapper
    if hook is None:
        return None
    dtype = find_sent_dtype(hook)
    if dtype is not None:
        hook = partial(_average_in_16_bits, dtype)
    assert callable(hook)
    chosen = hook if wrapper is None else wrapper(hook)

    def call_hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        # DDP reads a hook's name and signature, which not every callable has.
        return chosen(state, bucket)

    return call_hook


def find_sent_dtype(hook: CommHook | str | None) -> torch.dtype | None:
    """Return the type in which a hook sends gradients; None if it is none of the casting hooks.

    Gradients that are averaged without DDP are sent in the same type.
    """
    return _DTYPES.get(hook if isinstance(hook, str) else getattr(hook, "__name__", ""))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReducedPrecision:
    """Size of the buckets and type in which gradients are sent, for averages that raylit makes itself."""

    bucket_bytes: float = 25 * 2**20
    """Size in bytes up to which gradients are sent together."""
    dtype: torch.dtype | None = None
    """Type in which gradients are sent; None: their own."""

    @classmethod
    def from_options(cls, options: DDPStrategy) -> "ReducedPrecision":
        """Return the settings that DDP uses with these options."""
        size = {} if options.bucket_cap_mb is None else {"bucket_bytes": options.bucket_cap_mb * 2**20}
        return cls(**size, dtype=find_sent_dtype(options.ddp_comm_hook))

    def average(self, gradients: list[Tensor]) -> None:
        """Replace the gradients by their mean over the ranks, in place. Collective."""
        world_size = dist.get_world_size()
        for bucket in _iterate_buckets(gradients, size_bytes=self.bucket_bytes):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            # Divide before the sum, as DDP's hooks do: sums of half-precision numbers overflow early.
            sent = flat if self.dtype is None else flat.to(self.dtype).div_(world_size)
            dist.all_reduce(sent)
            mean = sent.div_(world_size) if self.dtype is None else sent.to(flat.dtype)
            for gradient, part in zip(bucket, mean.split([one.numel() for one in bucket]), strict=True):
                gradient.copy_(part.view_as(gradient))


def average_gradients(
    parameters: Sequence[nn.Parameter], is_touched: Sequence[bool] | None = None, *, reduction: ReducedPrecision
) -> None:
    """Replace the gradients by their mean over the ranks, in place. Collective; same parameters on every rank.

    `is_touched` states for each parameter whether its gradient has changed on this rank; the default is whether it
    has one. A parameter that no rank has touched keeps its gradient, as it would in one process.
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
    reduction.average(gradients)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Broadcast rank 0's values to all ranks, in place. Collective."""
    for tensor in tensors:
        copy = tensor.contiguous()
        dist.broadcast(copy, src=0)
        if copy is not tensor:
            tensor.copy_(copy)


class TouchedGradients:
    """Record of the parameters whose gradients backward passes have changed since the last average."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, reduction: ReducedPrecision) -> None:
        self._reduction = reduction
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._touched: set[int] = set()
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._touch, index))
            for index, parameter in enumerate(self._parameters)
        ]

    def is_outdated(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether other parameters require gradients now than at construction."""
        now = [id(parameter) for parameter in parameters if parameter.requires_grad]
        return now != [id(parameter) for parameter in self._parameters]

    def average(self) -> None:
        """Average the gradients over the ranks. Collective, unless no backward pass has run on this rank."""
        if not self._touched:
            return
        is_touched = [index in self._touched for index in range(len(self._parameters))]
        self._touched.clear()
        average_gradients(self._parameters, is_touched, reduction=self._reduction)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _touch(self, index: int, parameter: Tensor) -> None:
        self._touched.add(index)


def _average_in_16_bits(dtype: torch.dtype, state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket in a 16-bit type.

    `state` is a process group; None stands for all ranks. Gradients are divided before the sum, as sums of float16
    numbers overflow early.
    """
    group = dist.group.WORLD if state is None else state
    assert group is not None
    buffer = bucket.buffer()
    sent = buffer.to(dtype).div_(group.size())
    future = dist.all_reduce(sent, group=group, async_op=True).get_future()
    return future.then(lambda arrived: buffer.copy_(arrived.value()[0]))


def _iterate_buckets(gradients: list[Tensor], *, size_bytes: float) -> Iterator[list[Tensor]]:
    """Yield gradients of one type and device together, up to the size of a bucket; a larger one comes alone."""
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        by_kind[gradient.dtype, gradient.device].append(gradient)
    for alike in by_kind.values():
        bucket: list[Tensor] = []
        num_bytes = 0
        for gradient in alike:
            if bucket and num_bytes + gradient.nbytes > size_bytes:
                yield bucket
                bucket, num_bytes = [], 0
            bucket.append(gradient)
            num_bytes += gradient.nbytes
        yield bucket

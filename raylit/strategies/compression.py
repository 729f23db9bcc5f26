"""What becomes of gradients on their way between ranks: halved by name, or as the user's hook has it. Worker."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from raylit.strategy_options import CommHook, DDPStrategy

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

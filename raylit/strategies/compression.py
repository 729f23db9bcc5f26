"""What becomes of gradients on their way between ranks: torch's hooks, by name or as they are given. Worker."""

import torch

from raylit.strategy_options import CommHook, DDPStrategy

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def comm_hook(options: DDPStrategy) -> CommHook | None:
    """For DDP to register; None: gradients travel as they are."""
    hook = options.ddp_comm_hook
    if hook is None:
        return None
    # Only where it is used: importing raylit should not cost the import of all of torch's algorithms.
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    named: dict[str, CommHook] = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
    chosen = named[hook] if isinstance(hook, str) else hook
    return chosen if options.ddp_comm_wrapper is None else options.ddp_comm_wrapper(chosen)


def dtype_on_the_way(options: DDPStrategy) -> torch.dtype | None:
    """For gradients that are averaged by hand, which no hook of torch's sees; None: their own."""
    hook = options.ddp_comm_hook
    name = hook if isinstance(hook, str) else getattr(hook, "__name__", "").removesuffix("_compress_hook")
    return _DTYPES.get(name)

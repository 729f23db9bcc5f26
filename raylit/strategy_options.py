"""How the workers are to share one model: each strategy's options, as the user gives them. Both sides; in the plan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from raylit.errors import ConfigError

CommHook = Callable[..., Any]
"""As torch's `register_comm_hook` takes it: (state, bucket) to a future of the bucket's tensor."""
CompressionName = Literal["bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleDeviceStrategy:
    """One worker: nothing to share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DDPStrategy:
    """Every worker holds the whole model; gradients are averaged over the workers while the backward pass runs.

    Lightning's names, as far as torch's DistributedDataParallel has them. With one worker none of it matters.
    """

    find_unused_parameters: bool = False
    """Parameters that a loss does not depend on count as zero; else such a parameter is an error that names it."""
    static_graph: bool = False
    """Every batch uses the same parameters in the same order, with layers run twice or recomputed (activation
    checkpointing) among them. Parameters that are never used need no search then."""
    bucket_cap_mb: float | None = None
    """Gradients travel together up to this size, in MiB; None: 25, torch's own."""
    gradient_as_bucket_view: bool = True
    """Gradients are views of the memory that they travel in: no copies, and nothing may replace `parameter.grad`."""
    broadcast_buffers: bool = True
    """Rank 0's buffers (running statistics) go to all workers before each forward pass."""
    ddp_comm_hook: CommHook | CompressionName | None = None
    """What becomes of gradients on their way: "bf16" or "fp16" halves them, or a hook of
    torch.distributed.algorithms.ddp_comm_hooks, or your own."""
    ddp_comm_state: Any = None
    """The hook's first argument; each worker gets a copy."""
    ddp_comm_wrapper: Callable[[CommHook], CommHook] | None = None
    """Makes another hook of the hook, such as torch's `fp16_compress_wrapper`."""

    def __post_init__(self) -> None:
        """ConfigError: a value that cannot work."""
        switches = ("find_unused_parameters", "static_graph", "gradient_as_bucket_view", "broadcast_buffers")
        for name in switches:
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"DDPStrategy({name}={value!r}): must be True or False")
        size = self.bucket_cap_mb
        is_number = isinstance(size, (int, float)) and not isinstance(size, bool)
        if size is not None and not (is_number and 0 < size < float("inf")):
            raise ConfigError(
                f"DDPStrategy(bucket_cap_mb={size!r}): must be a size in MiB above 0, or None for torch's"
            )
        hook = self.ddp_comm_hook
        if hook is not None and hook not in ("bf16", "fp16") and not callable(hook):
            raise ConfigError(
                f"DDPStrategy(ddp_comm_hook={hook!r}): must be 'bf16', 'fp16' or a hook function of torch's"
            )
        if hook is None and (self.ddp_comm_state is not None or self.ddp_comm_wrapper is not None):
            raise ConfigError("DDPStrategy has a ddp_comm_state or ddp_comm_wrapper but no ddp_comm_hook: give one")
        if self.ddp_comm_wrapper is not None and not callable(self.ddp_comm_wrapper):
            raise ConfigError(
                f"DDPStrategy(ddp_comm_wrapper={self.ddp_comm_wrapper!r}): must take a hook and return one"
            )


StrategyOptions = SingleDeviceStrategy | DDPStrategy

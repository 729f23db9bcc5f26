"""How the workers are to share one model: each strategy's options, as the user gives them. Both sides; in the plan."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from raylit.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

CommHook = Callable[..., Any]
"""As torch's `register_comm_hook` takes it: (state, bucket) to a future of the bucket's tensor."""
CompressionName = Literal["bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleDeviceStrategy:
    """One worker: nothing to share."""

    is_sharding: ClassVar[bool] = False
    is_saving_parts: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DDPStrategy:
    """Every worker holds the whole model; gradients are averaged over the workers while the backward pass runs.

    Lightning's names, as far as torch's DistributedDataParallel has them. With one worker none of it matters.
    """

    find_unused_parameters: bool | Literal["auto"] = False
    """Parameters that a loss does not depend on count as zero; else such a parameter is an error that names it. "auto",
    which strategy="auto" stands for: they are looked for from the first step on that has any."""
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
    is_sharding: ClassVar[bool] = False
    is_saving_parts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """ConfigError: a value that cannot work."""
        if self.find_unused_parameters not in (True, False, "auto"):
            raise ConfigError(
                f"DDPStrategy(find_unused_parameters={self.find_unused_parameters!r}): must be True, False or 'auto'"
            )
        switches = ("static_graph", "gradient_as_bucket_view", "broadcast_buffers")
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


@dataclass(frozen=True, kw_only=True, slots=True)
class FSDPStrategy:
    """Every worker holds its share of parameters, gradients and optimizer states: torch's `fully_shard`.

    Lightning's names where it has one, values as torch takes them. With one worker none of it matters. A model that
    is too large for one process is built in `configure_model`; one that is built before is in each of them for a
    moment.
    """

    auto_wrap_policy: Collection[type[nn.Module]] | Callable[[nn.Module], bool] | None = None
    """What is gathered at a time: modules of these classes, or those that the function says True to. None: the repeated
    blocks, which are members of one class in a ModuleList, ModuleDict or Sequential."""
    activation_checkpointing_policy: Collection[type[nn.Module]] | None = None
    """Modules of these classes compute their activations again in the backward pass instead of keeping them."""
    cpu_offload: bool = False
    """Parameters, gradients and optimizer states stay in main memory, and with it the optimizer's step."""
    mixed_precision: "MixedPrecisionPolicy | None" = None
    """torch.distributed.fsdp.MixedPrecisionPolicy; None: as the Trainer's precision has it. With "bf16-mixed" and
    "16-mixed" parameters are gathered in that type, kept and reduced in float32."""
    reshard_after_forward: bool | int = True
    """Gathered parameters are let go of after the forward pass and gathered again for the backward pass: less memory,
    half as much traffic again. An int: kept by groups of so many workers."""
    state_dict_type: Literal["sharded", "full"] = "sharded"
    """Checkpoints are directories to which each worker writes its part at the same time, or single files, for which
    the whole goes through rank 0's memory."""
    empty_init: bool = True
    """`configure_model` builds on the meta device, and each part is initialised by its `reset_parameters`: the same
    numbers as in a plain build whose constructors end with that call. False: it builds real tensors, all of them in
    each worker for a moment, such as pretrained ones."""
    gather_weights: bool = True
    """After a run the driver's module has the trained weights, which have come piece by piece. False: it keeps what
    it has had, and is on the meta device where `configure_model` has made it; the weights are in the checkpoints."""

    is_sharding: ClassVar[bool] = True

    @property
    def is_saving_parts(self) -> bool:
        """A checkpoint is a directory, and each worker writes its part."""
        return self.state_dict_type == "sharded"

    def __post_init__(self) -> None:
        """ConfigError: a value that cannot work."""
        for name in ("cpu_offload", "empty_init", "gather_weights"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"FSDPStrategy({name}={value!r}): must be True or False")
        policy, checkpointed = self.auto_wrap_policy, self.activation_checkpointing_policy
        is_function = callable(policy) and not isinstance(policy, type)
        if policy is not None and not is_function and not _are_module_classes(policy):
            raise ConfigError(
                f"FSDPStrategy(auto_wrap_policy={policy!r}): must be classes of modules, such as {{Block}}, or a "
                "function of a module that says whether it is gathered by itself"
            )
        if checkpointed is not None and not _are_module_classes(checkpointed):
            raise ConfigError(
                f"FSDPStrategy(activation_checkpointing_policy={checkpointed!r}): must be classes of modules, such as "
                "{Block}"
            )
        if self.state_dict_type not in ("sharded", "full"):
            raise ConfigError(f"FSDPStrategy(state_dict_type={self.state_dict_type!r}): must be 'sharded' or 'full'")
        reshard = self.reshard_after_forward
        if not isinstance(reshard, int) or (reshard is not False and reshard < 1):
            raise ConfigError(
                f"FSDPStrategy(reshard_after_forward={reshard!r}): must be True, False or a number of workers"
            )


StrategyOptions = SingleDeviceStrategy | DDPStrategy | FSDPStrategy


def _are_module_classes(value: Any) -> bool:
    is_collection = isinstance(value, Collection) and not isinstance(value, str) and len(value) > 0
    return is_collection and all(isinstance(one, type) and issubclass(one, nn.Module) for one in value)

"""Options of the strategies by which workers share one model, as the user gives them. Part of the Plan; both sides."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

from raylit.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy

CommHook = Callable[..., Any]
"""A hook for torch's `register_comm_hook`: (state, bucket) to a future of the bucket's tensor."""
CompressionName = Literal["bf16", "fp16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleDeviceStrategy:
    """Options of a run with one worker, which has nothing to share."""

    is_sharding: ClassVar[bool] = False
    is_saving_parts: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class DDPStrategy:
    """Data parallelism: every worker holds the whole model; gradients are averaged during the backward pass.

    The names are Lightning's, as far as torch's DistributedDataParallel has these options. With one worker the options
    have no effect.
    """

    find_unused_parameters: bool | Literal["auto"] = False
    """Use zero gradients for parameters that a loss does not depend on; False: such a parameter is an error that names
    it. "auto", the value under strategy="auto": search for them from the first step that has any."""
    static_graph: bool = False
    """Every batch uses the same parameters in the same order. Layers may run twice or be recomputed (activation
    checkpointing), and parameters that are never used need no search."""
    bucket_cap_mb: float | None = None
    """Size of a gradient bucket, which is one all-reduce, in MiB; None: torch's default, 25."""
    gradient_as_bucket_view: bool = True
    """Make gradients views of the buckets, which saves copies; nothing may replace `parameter.grad` then."""
    broadcast_buffers: bool = True
    """Broadcast rank 0's buffers (running statistics) to all workers before each forward pass."""
    ddp_comm_hook: CommHook | CompressionName | None = None
    """How gradients are communicated: "bf16" or "fp16" halves their size; or a hook of
    torch.distributed.algorithms.ddp_comm_hooks, or your own."""
    ddp_comm_state: Any = None
    """The hook's first argument; each worker gets a copy."""
    ddp_comm_wrapper: Callable[[CommHook], CommHook] | None = None
    """A function that wraps the hook in another one, such as torch's `fp16_compress_wrapper`."""
    is_sharding: ClassVar[bool] = False
    is_saving_parts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work."""
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
    """Sharding by torch's `fully_shard`: every worker holds its shard of parameters, gradients and optimizer states.

    The names are Lightning's where it has one, the values are torch's. With one worker the options have no effect.
    Build a model that is too large for one process in `configure_model`: a model that is built earlier is in the memory
    of every worker as a whole before it is sharded.
    """

    auto_wrap_policy: Collection[type[nn.Module]] | Callable[[nn.Module], bool] | None = None
    """Modules whose parameters are all-gathered together: modules of these classes, or those for which the function
    returns True. None: the repeated blocks, which are members of one class in a ModuleList, ModuleDict or
    Sequential."""
    activation_checkpointing_policy: Collection[type[nn.Module]] | None = None
    """Modules of these classes recompute their activations in the backward pass instead of keeping them."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer states in main memory, where the optimizer steps on the CPU."""
    mixed_precision: "MixedPrecisionPolicy | None" = None
    """A torch.distributed.fsdp.MixedPrecisionPolicy; None: the Trainer's precision decides. With "bf16-mixed" and
    "16-mixed" parameters are all-gathered in that type; shards and reductions are float32."""
    reshard_after_forward: bool | int = True
    """Free gathered parameters after the forward pass and gather them again for the backward pass: less memory, 1.5
    times the traffic. An int: each group of this many workers keeps them, sharded."""
    state_dict_type: Literal["sharded", "full"] = "sharded"
    """Format of checkpoints: directories to which all workers write their shards at the same time, or single files, for
    which the whole state passes through rank 0's memory."""
    empty_init: bool = True
    """Run `configure_model` on the meta device and initialise each module by its `reset_parameters`: the same numbers
    as in a plain build whose constructors end with that call. False: it builds real tensors, such as pretrained ones,
    and each worker holds all of them before they are sharded."""
    gather_weights: bool = True
    """Send the trained weights to the driver's module after a run, piece by piece. False: that module keeps the weights
    that it had, on the meta device if `configure_model` has built it; the trained ones are in the checkpoints."""

    is_sharding: ClassVar[bool] = True

    @property
    def is_saving_parts(self) -> bool:
        """A checkpoint is a directory to which each worker writes its shard."""
        return self.state_dict_type == "sharded"

    def __post_init__(self) -> None:
        """Raise ConfigError for a value that cannot work."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RegisteredStrategy:
    """A third party's strategy, which `register_strategy` has given a name."""

    name: str
    build: Callable[[Any], Any]
    """(Plan) to the Strategy, in each worker."""
    is_sharding: ClassVar[bool] = False
    is_saving_parts: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SPMDStrategy:
    """Options of a run on an accelerator that is SPMD; the Trainer derives them from its `strategy`."""

    is_sharding_parameters: bool = False
    """Parameters, gradients and optimizer states are divided over the devices of a worker."""
    is_sharding: ClassVar[bool] = False
    is_saving_parts: ClassVar[bool] = False


StrategyOptions = SingleDeviceStrategy | DDPStrategy | FSDPStrategy | RegisteredStrategy | SPMDStrategy

NAMED_STRATEGIES: dict[str, StrategyOptions | None] = {
    "auto": None,
    "single": SingleDeviceStrategy(),
    "single_device": SingleDeviceStrategy(),
    "ddp": DDPStrategy(),
    # Lightning's ways to start the processes of "ddp", which Ray starts here.
    **dict.fromkeys(("ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_cpu"), DDPStrategy()),
    "fsdp": FSDPStrategy(),
    "fsdp_cpu_offload": FSDPStrategy(cpu_offload=True),
}
"""raylit's own. None: what the number of workers asks for."""


def _are_module_classes(value: Any) -> bool:
    is_collection = isinstance(value, Collection) and not isinstance(value, str) and len(value) > 0
    return is_collection and all(isinstance(one, type) and issubclass(one, nn.Module) for one in value)

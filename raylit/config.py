"""Plan, with every setting of a run, and the options of strategies: frozen, validated, sent to workers. Any process.

`raylit/trainer/arguments/` parses the Trainer's arguments into the groups of the Plan. The values here are checked.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from torch import nn

from raylit.accelerators import Accelerator, CPUAccelerator
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


BatchLimit = int | float
"""A float is a fraction of the loader (1.0: all batches), an int is a count of batches per worker."""

PlacementName = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
CombinationName = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
MatmulPrecisionName = Literal["highest", "high", "medium"]
PrecisionName = Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Number, kind and placement of the workers."""

    num_workers: int = 0
    """Number of Ray actors; 0 runs the loop in the driver's process."""
    num_nodes: int | None = None
    """Hosts that share the workers evenly; None: Ray and `placement` choose the hosts."""
    accelerator: Accelerator = field(default_factory=CPUAccelerator)
    """The kind of device; its class and values are pickled with the Plan."""
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    """What each actor asks Ray for, by Ray's names. Unless named: one CPU, and what the accelerator asks for."""
    placement: PlacementName = "PACK"
    """Ray's placement strategy: few hosts or many, as far as possible or strictly. num_nodes sets the exact number."""
    label_selector: dict[str, str] = field(default_factory=dict)
    """Labels that a worker's host must have; Ray's conditions: `a`, `!a`, `in(a, b)`, `!in(a, b)`."""
    start_timeout_s: float = 600.0
    """How long the start of the workers may wait for resources of the cluster."""
    ping_timeout_s: float = 10.0
    """A worker that does not answer for this time counts as dead; 0: no limit."""
    start_ping_timeout_s: float = 120.0
    """The limit while a worker starts, when imports may hold the interpreter for long. Equal to ping_timeout_s if the
    user has given that."""
    keep_s: float | None = None
    """How long idle workers stay for the next run; None: 5 minutes on the embedded node, 30 s on a cluster."""

    @property
    def world_size(self) -> int:
        """Number of ranks: one per worker, or 1 with the loop in the driver's process."""
        return max(1, self.num_workers)

    @property
    def given_ping_timeout_s(self) -> float | None:
        """The user's ping_timeout_s; None if it was not given."""
        return self.ping_timeout_s if self.ping_timeout_s == self.start_ping_timeout_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a run in epochs, steps and time, and how much of each loader is used."""

    max_epochs: int | None = 1000
    """None: no limit."""
    min_epochs: int = 0
    """Epochs that a request to stop, such as early stopping's, does not cut short."""
    max_steps: int | None = None
    """Optimizer steps; None: no limit."""
    min_steps: int = 0
    """Optimizer steps that a request to stop does not cut short."""
    train_batches: BatchLimit = 1.0
    val_batches: BatchLimit = 1.0
    test_batches: BatchLimit = 1.0
    predict_batches: BatchLimit = 1.0
    overfit_batches: BatchLimit = 0.0
    """Train and validate on the same first batches, unshuffled; 0.0: off."""
    max_time_s: float | None = None
    """Seconds after which training ends, at the next batch; None: no limit."""
    sanity_val_batches: int = 2
    """Validation batches per loader that run before training, to find errors early; -1: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """The times at which validation runs during fit."""

    interval: BatchLimit = 1.0
    """A float: a fraction of the training epoch; an int: training batches."""
    interval_s: float | None = None
    """Seconds from the end of one validation to the next; None: the interval counts batches."""
    every_n_epochs: int | None = 1
    """None: the interval counts batches across epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """Settings of the backward pass and the optimizer step, of precision and of compilation."""

    accumulation: tuple[tuple[int, int], ...] = ((0, 1),)
    """(first epoch, batches in an accumulation window) pairs, ascending; the first pair is for epoch 0."""
    clip_val: float | None = None
    """Limit of gradient clipping; None: no clipping."""
    clip_algorithm: Literal["norm", "value"] = "norm"
    precision: PrecisionName = "32-true"
    truncated_steps: int | None = None
    """Time steps of a piece of truncated back-propagation; None: the module's own length, else whole batches."""
    grad_norm_order: float | None = None
    """Order of the gradient norms that are logged at logging steps: 2.0, inf, ...; None: none are logged."""
    is_ending_on_nan: bool = False
    """Raise NotFiniteError for a loss or a weight that is not finite."""
    is_detecting_anomaly: bool = False
    """Use torch.autograd's anomaly detection."""
    matmul_precision: MatmulPrecisionName | None = None
    """Precision of float32 matrix products, as in torch.set_float32_matmul_precision; None: as in the driver."""
    is_channels_last: bool = False
    """Keep four-dimensional weights and batches in memory as NHWC."""
    compile_options: dict[str, Any] | None = None
    """Keywords of torch.compile; None: only what the user has compiled is compiled."""

    def window_in(self, epoch: int) -> int:
        """Return the number of batches whose gradients are added up before a step of this epoch."""
        return next(window for first, window in reversed(self.accumulation) if epoch >= first)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reporting:
    """Intervals and depth of the reports that workers send to the driver."""

    log_every_n_steps: int = 50
    """Optimizer steps from one report of step metrics to the next; 0: none."""
    refresh_period_s: float = 0.1
    """Least seconds between two progress reports of a worker."""
    summary_depth: int | None = None
    """Depth of the summary of layers that is printed when a fit starts; -1: all layers, None: no summary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """All settings of one run. The Trainer builds it, and it never changes."""

    workers: Workers = Workers()
    strategy: StrategyOptions = field(default_factory=SingleDeviceStrategy)
    """How the workers share the model. It may hold the user's classes and functions."""
    is_syncing_batchnorm: bool = False
    """Batch-norm layers compute their statistics over all ranks."""
    limits: Limits = Limits()
    validation: Validation = Validation()
    optimization: Optimization = Optimization()
    reporting: Reporting = Reporting()
    default_root_dir: str = "."
    """Directory or URL for logs and checkpoints."""
    reload_loaders_every_n_epochs: int = 0
    """Epochs after which the loader hooks are called again; 0: never."""
    combination: CombinationName = "max_size_cycle"
    """How several training loaders are combined if the user has not combined them."""
    prepares_per_node: bool = True
    """Call prepare_data once per host; False: once in all."""
    seed: int = 0
    """Seed of the data order: global batch k of epoch e is a function of seed, e and k."""
    use_distributed_sampler: bool = True
    """Share the samples out over the ranks; False: the user's code splits samplers and iterables."""
    deterministic: bool | Literal["warn"] = False
    """Use torch's deterministic algorithms; "warn": warn if there is none for an operation."""
    benchmark: bool | None = None
    """Value of torch.backends.cudnn.benchmark; None: False with `deterministic`, else as in the driver."""
    is_saving_async: bool = True
    """Go on with training while a checkpoint is written."""
    is_dev_run: bool = False
    """The run is a fast_dev_run, which writes nothing."""
    inference_mode: bool = True
    """Evaluate and predict under torch.inference_mode; False: under torch.no_grad."""

    def num_windows(self, num_batches: float) -> float:
        """Return the optimizer steps of a fit with this many batches per epoch; infinite if nothing limits them."""
        limits = self.limits
        most = math.inf if limits.max_steps is None else limits.max_steps
        if limits.max_epochs is None or math.isinf(num_batches):
            return most
        num_epochs, num_windows = max(1, limits.max_epochs), 0
        firsts = [first for first, _ in self.optimization.accumulation]
        for (first, window), following in zip(self.optimization.accumulation, [*firsts[1:], num_epochs], strict=True):
            num_windows += max(0, min(following, num_epochs) - first) * math.ceil(num_batches / window)
        return min(num_windows, most)


class PlanProperties(Protocol):
    """Properties that read the Plan, for the Trainer and for the view of it that hooks get."""

    _plan: Plan

    @property
    def accelerator(self) -> Accelerator:
        """The kind of device that the run trains on."""
        return self._plan.workers.accelerator

    @property
    def max_epochs(self) -> int | None:
        return self._plan.limits.max_epochs

    @property
    def min_epochs(self) -> int:
        return self._plan.limits.min_epochs

    @property
    def max_steps(self) -> int:
        """Limit in optimizer steps; -1: no limit."""
        return -1 if self._plan.limits.max_steps is None else self._plan.limits.max_steps

    @property
    def min_steps(self) -> int:
        return self._plan.limits.min_steps

    @property
    def limit_train_batches(self) -> BatchLimit:
        return self._plan.limits.train_batches

    @property
    def limit_val_batches(self) -> BatchLimit:
        return self._plan.limits.val_batches

    @property
    def limit_test_batches(self) -> BatchLimit:
        return self._plan.limits.test_batches

    @property
    def limit_predict_batches(self) -> BatchLimit:
        return self._plan.limits.predict_batches

    @property
    def overfit_batches(self) -> BatchLimit:
        return self._plan.limits.overfit_batches

    @property
    def num_sanity_val_steps(self) -> int:
        return self._plan.limits.sanity_val_batches

    @property
    def val_check_interval(self) -> BatchLimit:
        """Interval of validation in batches, or as a fraction of the epoch; 1.0 if validation runs by time."""
        return self._plan.validation.interval

    @property
    def check_val_every_n_epoch(self) -> int | None:
        return self._plan.validation.every_n_epochs

    @property
    def log_every_n_steps(self) -> int:
        return self._plan.reporting.log_every_n_steps

    @property
    def gradient_clip_val(self) -> float | None:
        return self._plan.optimization.clip_val

    @property
    def gradient_clip_algorithm(self) -> str:
        return self._plan.optimization.clip_algorithm

    @property
    def precision(self) -> str:
        return self._plan.optimization.precision

    @property
    def fast_dev_run(self) -> bool:
        return self._plan.is_dev_run

    @property
    def default_root_dir(self) -> str:
        return self._plan.default_root_dir

    @property
    def num_devices(self) -> int:
        """Number of workers per host."""
        return self._plan.workers.world_size // (self._plan.workers.num_nodes or 1)

"""The Plan: every setting of a run, validated and frozen. The driver builds it and sends it to the workers.

`raylit/trainer/arguments/` parses the Trainer's arguments into the groups below. The values here are checked.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from raylit.accelerators import Accelerator, CPUAccelerator
from raylit.accelerators.tpu_slices import TPUSlices
from raylit.config.strategy import SingleDeviceStrategy, StrategyOptions

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
    """Hosts that share the workers evenly; None: one, or Ray and `placement` choose them."""
    accelerator: Accelerator = field(default_factory=CPUAccelerator)
    """The kind of device; its class and values are pickled with the Plan."""
    slices: TPUSlices | None = None
    """The TPU slices that the workers use as a whole; None: there are none, or one host's TPUs."""
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

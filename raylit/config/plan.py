"""The Plan: every setting of a run, validated and frozen; it travels to the workers."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from raylit.config.strategy import SingleDeviceStrategy, StrategyOptions

BatchLimit = int | float
"""A float is a fraction of the loader (1.0: all of it), an int a count of batches per worker."""

AcceleratorName = Literal["cpu", "cuda"]
PlacementName = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
CombinationName = Literal["min_size", "max_size_cycle", "max_size", "sequential"]
MatmulPrecisionName = Literal["highest", "high", "medium"]
PrecisionName = Literal["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Who runs the steps."""

    num_workers: int = 0
    """Ray actors; 0 runs the loop in the driver's process."""
    num_nodes: int | None = None
    """Hosts that share the workers evenly; None: wherever there is room."""
    accelerator: AcceleratorName = "cpu"
    resources_per_worker: dict[str, float] = field(default_factory=dict)
    """What each actor asks Ray for, by Ray's names. Unless named: one CPU (and one GPU with accelerator="cuda")."""
    placement: PlacementName = "PACK"
    """Ray's strategy for the workers: few hosts or many, as far as possible or strictly. num_nodes says it exactly."""
    label_selector: dict[str, str] = field(default_factory=dict)
    """Only on hosts with these labels; Ray's conditions: `a`, `!a`, `in(a, b)`, `!in(a, b)`."""
    start_timeout_s: float = 600.0
    ping_timeout_s: float = 10.0
    """A worker that answers nothing for so long counts as dead; 0: never."""
    start_ping_timeout_s: float = 120.0
    """The same while it starts: what that prepares may hold the interpreter for long. Not longer than a ping_timeout_s
    that the user has given."""
    keep_s: float | None = None
    """How long idle workers stay for the next run; None: 5 minutes on the embedded node, 30 s on a cluster."""

    @property
    def world_size(self) -> int:
        return max(1, self.num_workers)

    @property
    def given_ping_timeout_s(self) -> float | None:
        """As the user has said it; None: not at all."""
        return self.ping_timeout_s if self.ping_timeout_s == self.start_ping_timeout_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How long, and how much of each loader."""

    max_epochs: int | None = 1000
    """None: no limit in epochs."""
    min_epochs: int = 0
    max_steps: int | None = None
    """Optimizer steps; None: no limit in steps."""
    min_steps: int = 0
    train_batches: BatchLimit = 1.0
    val_batches: BatchLimit = 1.0
    test_batches: BatchLimit = 1.0
    predict_batches: BatchLimit = 1.0
    overfit_batches: BatchLimit = 0.0
    """The same few batches for training and validation, unshuffled; 0.0: not so."""
    max_time_s: float | None = None
    """Training ends at the next batch border after so many seconds."""
    sanity_val_batches: int = 2
    """Validation batches run before training to find bugs early; -1: all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """When validation is due during fit."""

    interval: BatchLimit = 1.0
    """A float: a fraction of the training epoch; an int: training batches."""
    interval_s: float | None = None
    """Seconds from the end of one validation to the next; None: the interval counts batches."""
    every_n_epochs: int | None = 1
    """None: the interval counts batches across epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimization:
    """What happens between the loss and the next weights."""

    accumulation: tuple[tuple[int, int], ...] = ((0, 1),)
    """(first epoch, batches in a window) pairs, ascending; the first is of epoch 0."""
    clip_val: float | None = None
    clip_algorithm: Literal["norm", "value"] = "norm"
    precision: PrecisionName = "32-true"
    truncated_steps: int | None = None
    """Length of the pieces of truncated back-propagation; None: whole batches, unless the module has a length."""
    grad_norm_order: float | None = None
    """Gradients' norms are logged at logging steps: 2.0, inf, ...; None: they are not."""
    is_ending_on_nan: bool = False
    """A loss or weight that is not finite is an error."""
    is_detecting_anomaly: bool = False
    """torch.autograd's anomaly detection."""
    matmul_precision: MatmulPrecisionName | None = None
    """Of float32 products: torch.set_float32_matmul_precision; None: as in the driver."""
    is_channels_last: bool = False
    """Weights and batches of four dimensions lie in memory as NHWC."""
    compile_options: dict[str, Any] | None = None
    """Keywords of torch.compile; None: nothing is compiled but what the user has."""

    def window_in(self, epoch: int) -> int:
        """Batches whose gradients are added up before a step."""
        return next(window for first, window in reversed(self.accumulation) if epoch >= first)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reporting:
    """What the driver gets to see, and how often."""

    log_every_n_steps: int = 50
    refresh_period_s: float = 0.1
    """Least time between two progress reports of a worker."""
    summary_depth: int | None = None
    """How deep the model's layers are summarized at a fit's start; -1: all of them, None: not at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One run, as asked for. Built by the Trainer, never changed."""

    workers: Workers = Workers()
    strategy: StrategyOptions = field(default_factory=SingleDeviceStrategy)
    """How the workers share the model. It may hold classes and functions of the user's."""
    is_syncing_batchnorm: bool = False
    """Batch norm layers take their statistics over all ranks."""
    limits: Limits = Limits()
    validation: Validation = Validation()
    optimization: Optimization = Optimization()
    reporting: Reporting = Reporting()
    default_root_dir: str = "."
    reload_loaders_every_n_epochs: int = 0
    """The loader hooks are called again after so many epochs; 0: never."""
    combination: CombinationName = "max_size_cycle"
    """How several training loaders become one where the user has not combined them."""
    prepares_per_node: bool = True
    """prepare_data runs once per host, else once in all."""
    seed: int = 0
    """Seed of the data order: global batch k of epoch e is a function of seed, e and k."""
    use_distributed_sampler: bool = True
    """False: samplers and iterables are the user's to split."""
    deterministic: bool | Literal["warn"] = False
    benchmark: bool | None = None
    is_saving_async: bool = True
    """Training goes on while a checkpoint is written."""
    is_dev_run: bool = False
    """fast_dev_run: nothing is written."""
    inference_mode: bool = True

    def num_windows(self, num_batches: float) -> float:
        """Of a whole fit whose epochs have so many batches; infinite where neither epochs nor steps are limited."""
        limits = self.limits
        most = math.inf if limits.max_steps is None else limits.max_steps
        if limits.max_epochs is None or math.isinf(num_batches):
            return most
        num_epochs, num_windows = max(1, limits.max_epochs), 0
        firsts = [first for first, _ in self.optimization.accumulation]
        for (first, window), following in zip(self.optimization.accumulation, [*firsts[1:], num_epochs], strict=True):
            num_windows += max(0, min(following, num_epochs) - first) * math.ceil(num_batches / window)
        return min(num_windows, most)


class PlanProperties:
    """Properties that read the plan."""

    _plan: Plan

    @property
    def max_epochs(self) -> int | None:
        return self._plan.limits.max_epochs

    @property
    def min_epochs(self) -> int:
        return self._plan.limits.min_epochs

    @property
    def max_steps(self) -> int:
        """-1: no limit."""
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
        """1.0 where validation comes by time."""
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
        """Workers of each host."""
        return self._plan.workers.world_size // (self._plan.workers.num_nodes or 1)

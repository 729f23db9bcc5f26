"""The `trainer` that hooks and callbacks get on a worker: a light view of the run."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raylit.config import Plan
from raylit.core import trainer_view
from raylit.errors import ConfigError
from raylit.profilers import PassThroughProfiler
from raylit.protocol.messages import Metrics
from raylit.protocol.state import Progress, Stage, TrainerState
from raylit.worker.collectives import all_gather_nested
from raylit.worker.job import Job, WorkerContext
from raylit.worker.metrics.buffer import MetricBuffer

_DRIVER_ATTRIBUTES = (
    *("checkpoint_callback", "checkpoint_callbacks", "early_stopping_callback", "early_stopping_callbacks"),
    *("progress_bar_callback", "interrupted", "received_sigterm", "tuner", "fit", "validate", "test", "predict"),
)


class TrainerView(trainer_view.TrainerView):
    """State of the run as this worker knows it; hooks and callbacks get it as `trainer`.

    Setting `should_stop` requests the end of training.
    """

    def __init__(self, *, plan: Plan, context: WorkerContext, job: Job, stage: Stage) -> None:
        self._plan = plan
        self._entry = stage
        self._context = context
        self._job = job
        self._reduced: dict[str, float] = {}
        self._logged: dict[str, float] = {}
        self.current_epoch = 0
        self.global_step = 0
        self.num_batches_done = 0
        self.batch_idx = 0
        """Index of the current training batch, or of the last one between batches."""
        self.is_uneven = False
        """The current training batch does not have the same number of samples on every rank."""
        self.total_batches = 0
        self.num_windows = 0
        self.validated_batch = 0
        self.num_evaluated: Counter[int] = Counter()
        """Batches of each loader in the evaluations so far: the index of their next value in the logs."""
        self.is_epoch_ended = False
        self.is_epoch_cut_short = False
        """In `on_train_epoch_end`: the run ends before the epoch's last batch.

        If the run is continued from a checkpoint, the hook is called again when the epoch is complete.
        """
        self.stage: Stage | None = stage
        self.sanity_checking = False
        self.should_stop = False
        self.metrics: MetricBuffer | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.handles: Any = None
        """What the module's manual-optimization methods use."""
        self.lr_schedulers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []
        """Each scheduler with its interval, frequency, monitor and name; one that is removed no longer steps."""
        self.num_training_batches: float = 0
        self.count_training_batches: Callable[[], float] | None = None
        """Counts an epoch's batches, also before the loaders are built; None outside of a fit.

        Collective at its first call.
        """
        self.num_val_batches: list[float] = []
        self.train_dataloader: Any = None
        self.loggers: list[Any] = []
        """Proxies of the driver's loggers, see LoggerView; with num_workers=0 the loggers themselves."""
        self.val_dataloaders: Any = None
        """The loader, or a list where there are several."""
        self.test_dataloaders: Any = None
        self.predict_dataloaders: Any = None
        self.fit_loop: Any = None
        self.predict_loop: Any = None
        self.saving: Any = None
        """Captures this rank's state for a checkpoint."""
        self.strategy: Any = None
        self.profiler = job.profiler or PassThroughProfiler()

    def receive(self, metrics: Metrics) -> None:
        """Add reduced metrics."""
        self._reduced.update({name: metric.value for name, metric in metrics.items()})
        self._logged.update({name: metric.value for name, metric in metrics.items() if metric.logger})

    def metrics_state(self) -> dict[str, Any]:
        """Return the reduced metrics for a checkpoint."""
        return {
            "values": dict(self._reduced),
            "logged": list(self._logged),
            "num_evaluated": dict(self.num_evaluated),
        }

    def load_metrics_state(self, state: dict[str, Any]) -> None:
        """Load the reduced metrics of a checkpoint."""
        self._reduced = dict(state.get("values", {}))
        self.num_evaluated = Counter(state.get("num_evaluated", {}))
        self._logged = {name: self._reduced[name] for name in state.get("logged", [])}

    @property
    def progress(self) -> Progress:
        """The position as a message to the driver."""
        return Progress(
            epoch=self.current_epoch,
            batch=self.num_batches_done,
            batch_in_all=self.total_batches,
            global_step=self.global_step,
            window=self.num_windows,
            validated_batch=self.validated_batch,
            is_epoch_ended=self.is_epoch_ended,
        )

    def move_to(self, progress: Progress) -> None:
        """Set the position to that of a checkpoint."""
        self.current_epoch = progress.epoch
        self.num_batches_done = progress.batch
        self.total_batches = progress.batch_in_all
        self.global_step = progress.global_step
        self.num_windows = progress.window
        self.validated_batch = progress.validated_batch
        self.is_epoch_ended = progress.is_epoch_ended

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The last reduced values, and this rank's own values where it has logged since."""
        return {name: torch.tensor(value) for name, value in self.metric_values().items()}

    def metric_values(self) -> dict[str, float]:
        """Return `callback_metrics` as numbers."""
        return {**self._reduced, **(self.metrics.latest() if self.metrics is not None else {})}

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self._logged.items()}

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The values that this rank would show in a progress bar."""
        return self._job.module.get_progress_bar_dict()

    @property
    def enable_validation(self) -> bool:
        return sum(self.num_val_batches) > 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Call `print` on rank 0 only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def all_gather(self, data: Any, *, group: Any = None, sync_grads: bool = False) -> Any:
        """Gather tensors of all ranks; see `LightningModule.all_gather`. Collective."""
        if self._context.world_size == 1:
            return data
        # Training batches have one size except at an epoch's end, so their shapes need not be compared.
        is_even = self.metrics is not None and self.metrics.is_training_batch and not self.is_uneven
        return all_gather_nested(
            data, group=group, with_gradients=sync_grads, device=self._job.module.device, is_even=is_even
        )

    def save_checkpoint(self, filepath: Any, weights_only: bool = False) -> None:
        """Write the run's current state to a path on rank 0's host. Collective: every rank calls it.

        The states of driver callbacks are those from the workers' last pause.

        Args:
            filepath: Path or URL of the checkpoint.
            weights_only: Leave out optimizers, callbacks and position.

        Raises:
            CheckpointError: Writing failed.
        """
        self.saving.wait_for_all_ranks()
        self.saving.write(filepath, is_weights_only=bool(weights_only))

    def save_own_checkpoint(self, filepath: Any) -> None:
        """Write a checkpoint from this rank alone, in an exception's hook where other ranks cannot take part.

        It lacks what only the other ranks have: their random states and data positions.
        """
        self.saving.write_alone(filepath)

    @property
    def state(self) -> TrainerState:
        """The entry point that runs (`fn`) and the loop (`stage`)."""
        return TrainerState(fn=self._entry, stage=self._loop_name, status="running")

    @property
    def is_last_batch(self) -> bool:
        """True if the current training batch is the epoch's last; False where the loader has no length."""
        return self.batch_idx + 1 >= self.num_training_batches

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole fit, one per accumulation window, for schedulers that step with the optimizer.

        Infinite where neither max_steps nor the data limits it. Every rank must read it: in `setup` and
        `configure_optimizers` it builds the training loader, which is collective.
        """
        if self.count_training_batches is None:
            raise ConfigError(f"estimated_stepping_batches is about a fit, there is none in {self._entry}")
        return self._plan.num_windows(self.count_training_batches())

    @property
    def is_logging_step(self) -> bool:
        """True if the metrics of the current optimizer step will go to the loggers."""
        every = self._plan.reporting.log_every_n_steps
        return every > 0 and (self.num_windows + 1) % every == 0

    @property
    def logger(self) -> Any:
        """The first of `loggers`; None where there is none."""
        return self.loggers[0] if self.loggers else None

    @property
    def lightning_module(self) -> Any:
        return self._job.module

    @property
    def model(self) -> Any:
        return self._job.module

    @property
    def datamodule(self) -> Any:
        return self._job.datamodule

    @property
    def callbacks(self) -> list[Any]:
        return list(self._job.callbacks)

    @property
    def training(self) -> bool:
        return self.stage == "fit"

    @property
    def validating(self) -> bool:
        return self.stage == "validate"

    @property
    def testing(self) -> bool:
        return self.stage == "test"

    @property
    def predicting(self) -> bool:
        return self.stage == "predict"

    @property
    def global_rank(self) -> int:
        return self._context.rank

    @property
    def local_rank(self) -> int:
        return self._context.local_rank

    @property
    def node_rank(self) -> int:
        return self._context.node_rank

    @property
    def world_size(self) -> int:
        return self._context.world_size

    @property
    def num_devices(self) -> int:
        """Number of workers on this worker's host."""
        return self._context.local_world_size

    @property
    def num_nodes(self) -> int:
        return self._context.num_nodes

    @property
    def is_global_zero(self) -> bool:
        return self._context.rank == 0

    @property
    def accumulate_grad_batches(self) -> int:
        return self._plan.optimization.window_in(self.current_epoch)

    @property
    def log_dir(self) -> str:
        return self._job.log_dir

    @property
    def ckpt_path(self) -> str | None:
        """Path of the checkpoint that the run continues or evaluates."""
        return self._job.ckpt_path

    def __getattr__(self, name: str) -> Any:
        """Raise an AttributeError that says where the attribute is."""
        if name in _DRIVER_ATTRIBUTES:
            raise AttributeError(
                f"self.trainer.{name}: it lives in the driver. Read it there after the run (trainer.{name}), or have a "
                "DriverCallback, whose hooks run there"
            )
        raise AttributeError(f"the view of the run that hooks have has no {name!r}")

    @property
    def _loop_name(self) -> str:
        if self.sanity_checking:
            return "sanity_check"
        return "train" if self.stage in ("fit", None) else self.stage

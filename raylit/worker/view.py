"""TrainerView: the `trainer` that hooks and callbacks see. A light view of the worker's run. Worker."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raylit.config.plan import Plan, PlanProperties
from raylit.errors import ConfigError
from raylit.profilers import PassThroughProfiler
from raylit.protocol.messages import Metrics
from raylit.protocol.state import Progress, Stage, TrainerState
from raylit.worker.distributed.collectives import all_gather_nested
from raylit.worker.job import Job, WorkerContext
from raylit.worker.metrics.buffer import MetricBuffer

_IN_THE_DRIVER = (
    *("checkpoint_callback", "checkpoint_callbacks", "early_stopping_callback", "early_stopping_callbacks"),
    *("progress_bar_callback", "interrupted", "received_sigterm", "tuner", "fit", "validate", "test", "predict"),
)


class TrainerView(PlanProperties):
    """Where the run stands, as this worker knows it. Setting `should_stop` asks for the end of training."""

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
        """Of the training batch under way, or the last one."""
        self.is_uneven = False
        """The training batch under way has not as many samples on every rank."""
        self.num_batches_in_all = 0
        self.num_windows = 0
        self.validated_batch = 0
        self.num_evaluated: Counter[int] = Counter()
        """Batches of each loader in the evaluations so far: where their values stand in the logs."""
        self.is_epoch_ended = False
        self.is_epoch_cut_short = False
        """In `on_train_epoch_end`: the run ends before the epoch's last batch. If it is continued from a checkpoint,
        the hook comes again when the epoch is complete."""
        self.stage: Stage | None = stage
        self.sanity_checking = False
        self.should_stop = False
        self.metrics: MetricBuffer | None = None
        self.optimizers: list[torch.optim.Optimizer] = []
        self.handles: Any = None
        """What the module's optimization methods reach."""
        self.lr_schedulers: list[Any] = []
        self.lr_scheduler_configs: list[Any] = []
        """Each scheduler with its interval, frequency, monitor and name; what is taken out no longer steps."""
        self.num_training_batches: float = 0
        self.count_training_batches: Callable[[], float] | None = None
        """An epoch's, of loaders that need not be there yet; only in a fit. Collective when it is called first."""
        self.num_val_batches: list[float] = []
        self.train_dataloader: Any = None
        self.loggers: list[Any] = []
        """Stand-ins for the driver's, whose calls are made there: see LoggerView. With num_workers=0 its own."""
        self.val_dataloaders: Any = None
        """The loader, or a list where there are several."""
        self.test_dataloaders: Any = None
        self.predict_dataloaders: Any = None
        self.fit_loop: Any = None
        self.predict_loop: Any = None
        self.saving: Any = None
        """Takes this rank's state for a checkpoint."""
        self.strategy: Any = None
        self.profiler = job.profiler or PassThroughProfiler()

    def receive(self, metrics: Metrics) -> None:
        """Take reduced metrics in."""
        self._reduced.update({name: metric.value for name, metric in metrics.items()})
        self._logged.update({name: metric.value for name, metric in metrics.items() if metric.logger})

    def metrics_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "values": dict(self._reduced),
            "logged": list(self._logged),
            "num_evaluated": dict(self.num_evaluated),
        }

    def load_metrics_state(self, state: dict[str, Any]) -> None:
        self._reduced = dict(state.get("values", {}))
        self.num_evaluated = Counter(state.get("num_evaluated", {}))
        self._logged = {name: self._reduced[name] for name in state.get("logged", [])}

    @property
    def progress(self) -> Progress:
        """The position as a message takes it."""
        return Progress(
            epoch=self.current_epoch,
            batch=self.num_batches_done,
            batch_in_all=self.num_batches_in_all,
            global_step=self.global_step,
            window=self.num_windows,
            validated_batch=self.validated_batch,
            is_epoch_ended=self.is_epoch_ended,
        )

    def move_to(self, progress: Progress) -> None:
        """Take up a position from a checkpoint."""
        self.current_epoch = progress.epoch
        self.num_batches_done = progress.batch
        self.num_batches_in_all = progress.batch_in_all
        self.global_step = progress.global_step
        self.num_windows = progress.window
        self.validated_batch = progress.validated_batch
        self.is_epoch_ended = progress.is_epoch_ended

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """The last reduced values and, where this worker has logged anything since, its own."""
        return {name: torch.tensor(value) for name, value in self.metric_values().items()}

    def metric_values(self) -> dict[str, float]:
        """`callback_metrics` as numbers."""
        return {**self._reduced, **(self.metrics.latest() if self.metrics is not None else {})}

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        return {name: torch.tensor(value) for name, value in self._logged.items()}

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """What this worker would show."""
        return self._job.module.get_progress_bar_dict()

    @property
    def enable_validation(self) -> bool:
        return sum(self.num_val_batches) > 0

    def print(self, *args: Any, **kwargs: Any) -> None:
        """`print` on rank 0 only."""
        if self.is_global_zero:
            print(*args, **kwargs)

    def all_gather(self, data: Any, *, group: Any = None, sync_grads: bool = False) -> Any:
        """See LightningModule.all_gather."""
        if self._context.world_size == 1:
            return data
        # Batches of training have one size, but at the end of an epoch, so that nothing needs to be asked about them.
        is_even = self.metrics is not None and self.metrics.is_training_batch and not self.is_uneven
        return all_gather_nested(
            data, group=group, with_gradients=sync_grads, device=self._job.module.device, is_even=is_even
        )

    def save_checkpoint(self, filepath: Any, weights_only: bool = False) -> None:
        """Write the run as it stands now to a path that rank 0's host has. Collective: every rank calls it.

        What callbacks in the driver keep is as it was when the workers last stood still.
        """
        self.saving.meet()
        self.saving.write(filepath, is_weights_only=bool(weights_only))

    def save_own_checkpoint(self, filepath: Any) -> None:
        """`save_checkpoint` by this rank alone, in an exception's hook where the others cannot take part: without what
        only they have, their random state."""
        self.saving.write_alone(filepath)

    @property
    def state(self) -> TrainerState:
        """What runs: `fn` the entry point, `stage` the loop."""
        return TrainerState(fn=self._entry, stage=self._loop_name, status="running")

    @property
    def is_last_batch(self) -> bool:
        """The training batch under way is the epoch's last; False where the loader has no length."""
        return self.batch_idx + 1 >= self.num_training_batches

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole fit, each window of accumulated batches one: what a scheduler that steps with
        the optimizer needs to know. Infinite where neither max_steps nor the data says. Read by all ranks: in `setup`
        and `configure_optimizers` it has the training loader made."""
        if self.count_training_batches is None:
            raise ConfigError(f"estimated_stepping_batches is about a fit, there is none in {self._entry}")
        return self._plan.num_windows(self.count_training_batches())

    @property
    def is_logging_step(self) -> bool:
        """The metrics of the optimizer step under way go to the loggers once it is done."""
        every = self._plan.reporting.log_every_n_steps
        return every > 0 and (self.num_windows + 1) % every == 0

    @property
    def logger(self) -> Any:
        """The first of `loggers`, None where there are none."""
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
        """Workers of this one's host."""
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
        """Where the checkpoint was read that the run continues or evaluates."""
        return self._job.ckpt_path

    def __getattr__(self, name: str) -> Any:
        """Only for what is not here."""
        if name in _IN_THE_DRIVER:
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

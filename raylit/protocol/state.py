"""Where a run stands: Progress (frozen, on both sides, in checkpoints) and RunState (the driver's, one writer)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raylit.protocol.summary import Summary

Stage = Literal["fit", "validate", "test", "predict"]
RunStatus = Literal["initializing", "running", "finished", "interrupted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """What `trainer.state` says, in Lightning's words."""

    fn: Stage | None = None
    """The entry point."""
    stage: str | None = None
    """The loop: "train", "validate", "sanity_check", "test" or "predict"."""
    status: RunStatus = "initializing"

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @property
    def stopped(self) -> bool:
        return self.status in ("finished", "interrupted")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """A position in the training; what a worker reports and a checkpoint stores."""

    epoch: int = 0
    """Index of the epoch under way; once `is_epoch_ended`, of the one just finished."""
    batch: int = 0
    """Batches of this epoch that each worker has finished."""
    batch_in_all: int = 0
    """Batches that each worker has finished, over all epochs."""
    global_step: int = 0
    """Optimizer steps so far, of all optimizers."""
    window: int = 0
    """Batches, or windows of accumulated batches, after which there was a step; what `log_every_n_steps` counts."""
    validated_batch: int = 0
    """`batch` at the last validation inside this epoch, so that a resumed run does not repeat it."""
    is_epoch_ended: bool = False
    """The epoch's last hooks and schedulers have run; the next batch belongs to `epoch + 1`."""

    @property
    def batches_before(self) -> int:
        """Batches of the epochs before this one."""
        return self.batch_in_all - self.batch

    @property
    def is_inside_epoch(self) -> bool:
        """Some of the epoch's batches are done, and its end has not come."""
        return self.batch > 0 and not self.is_epoch_ended

    def at_next_batch(self) -> "Progress":
        """Where the next batch belongs: this epoch, or the start of the next one."""
        if not self.is_epoch_ended:
            return self
        return replace(self, epoch=self.epoch + 1, batch=0, validated_batch=0, is_epoch_ended=False)

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class RunState:
    """What the driver knows of the run under way. Written by the coordinator only; callbacks read it."""

    stage: Stage
    progress: Progress = field(default_factory=Progress)
    num_training_batches: float = math.inf
    """Per worker and epoch; infinite where the loader has no length."""
    num_val_batches: tuple[float, ...] = ()
    """Per worker, for each loader."""
    is_sanity_checking: bool = False
    has_validation: bool = False
    """A validation loop exists and is not limited away."""
    callback_metrics: dict[str, float] = field(default_factory=dict)
    """The latest reduced value of every metric, whatever was asked of it."""
    logged_metrics: dict[str, float] = field(default_factory=dict)
    progress_bar_metrics: dict[str, float | str] = field(default_factory=dict)
    summary: Summary | None = None
    """Of a fit's model as it starts, where the plan asks for one."""
    stop_reason: str | None = None
    """Why the run is to end early; None: it is not."""
    is_interrupted: bool = False
    is_epoch_cut_short: bool = False
    """The run has ended inside its last epoch: the hooks at the epoch's end have run, and a run that is continued from
    here does the rest of the epoch."""
    metric_steps: dict[str, int] = field(default_factory=dict)
    """For each of `callback_metrics` that this run has logged, the optimizer steps that were done then."""

    @property
    def num_epochs(self) -> int:
        """Epochs run, the last one perhaps only in part: Lightning's `current_epoch` after a fit."""
        return self.progress.epoch + (self.progress.is_epoch_ended or self.is_epoch_cut_short)

    def is_stale(self, name: str) -> bool:
        """The metric's value is there, but belongs to the weights of an earlier step."""
        return name in self.callback_metrics and self.metric_steps.get(name) != self.progress.global_step

    @property
    def log_step(self) -> int:
        """The loggers' x axis: in a fit the index of the last finished optimizer step, counted from 0; after it their
        number."""
        return max(0, self.progress.global_step - (self.stage == "fit"))

    @property
    def log_epoch(self) -> float:
        """Beside it: in a fit the epoch under way, after it their number."""
        return float(self.progress.epoch if self.stage == "fit" else self.num_epochs)

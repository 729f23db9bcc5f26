"""Position and state of a run: Progress (frozen, sent and saved) and RunState (the driver's, with one writer)."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from raylit.protocol.summary import Summary

Stage = Literal["fit", "validate", "test", "predict"]
RunStatus = Literal["initializing", "running", "finished", "interrupted"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """Value of `trainer.state`, with Lightning's names."""

    fn: Stage | None = None
    """The entry point."""
    stage: str | None = None
    """The loop: "train", "validate", "sanity_check", "test" or "predict"."""
    status: RunStatus = "initializing"

    @property
    def finished(self) -> bool:
        """True if the run ended without interruption."""
        return self.status == "finished"

    @property
    def stopped(self) -> bool:
        """True if the run ended, interrupted or not."""
        return self.status in ("finished", "interrupted")


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Position in the training; workers report it and checkpoints store it."""

    epoch: int = 0
    """Index of the current epoch; if `is_epoch_ended`, of the one just finished."""
    batch: int = 0
    """Number of batches of this epoch that each worker has finished."""
    batch_in_all: int = 0
    """Number of batches that each worker has finished, over all epochs."""
    global_step: int = 0
    """Number of optimizer steps so far, of all optimizers."""
    window: int = 0
    """Number of accumulation windows after which there was a step; `log_every_n_steps` counts these."""
    validated_batch: int = 0
    """`batch` at the last validation inside this epoch, so that a resumed run does not repeat it."""
    is_epoch_ended: bool = False
    """The epoch's last hooks and schedulers have run; the next batch belongs to `epoch + 1`."""

    @property
    def batches_before(self) -> int:
        """Number of batches of the epochs before this one."""
        return self.batch_in_all - self.batch

    @property
    def is_inside_epoch(self) -> bool:
        """True if some of the epoch's batches are done and it has not ended."""
        return self.batch > 0 and not self.is_epoch_ended

    def at_next_batch(self) -> "Progress":
        """Return the position of the next batch: in this epoch, or at the start of the next one."""
        if not self.is_epoch_ended:
            return self
        return replace(self, epoch=self.epoch + 1, batch=0, validated_batch=0, is_epoch_ended=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for a checkpoint."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class RunState:
    """The driver's state of the current run. Only the coordinator writes it; callbacks read it."""

    stage: Stage
    progress: Progress = field(default_factory=Progress)
    num_training_batches: float = math.inf
    """Batches per worker and epoch; infinite if the loader has no length."""
    num_val_batches: tuple[float, ...] = ()
    """Batches per worker, for each loader."""
    is_sanity_checking: bool = False
    has_validation: bool = False
    """A validation loop exists and is not disabled by limits."""
    callback_metrics: dict[str, float] = field(default_factory=dict)
    """The latest reduced value of every metric, whatever its options."""
    logged_metrics: dict[str, float] = field(default_factory=dict)
    progress_bar_metrics: dict[str, float | str] = field(default_factory=dict)
    slowest_rank: str = ""
    """The rank that was well behind the others in the last logging interval, and with what; empty: none was."""
    summary: Summary | None = None
    """Summary of a fit's model at the start, if the plan requests one."""
    stop_reason: str | None = None
    """Reason to end the run early; None if it is not to end."""
    is_interrupted: bool = False
    is_epoch_cut_short: bool = False
    """The run has ended inside its last epoch.

    The hooks at the epoch's end have run, and a run that is continued from here does the rest of the epoch.
    """
    metric_steps: dict[str, int] = field(default_factory=dict)
    """For each of `callback_metrics` that this run has logged, the number of optimizer steps at that time."""

    @property
    def num_epochs(self) -> int:
        """Number of epochs run, the last one perhaps only in part: Lightning's `current_epoch` after a fit."""
        return self.progress.epoch + (self.progress.is_epoch_ended or self.is_epoch_cut_short)

    def is_stale(self, name: str) -> bool:
        """Return whether the metric exists but belongs to the weights of an earlier step."""
        return name in self.callback_metrics and self.metric_steps.get(name) != self.progress.global_step

    @property
    def log_step(self) -> int:
        """The loggers' x axis: in a fit the index of the last optimizer step, from 0; after it the number of steps."""
        return max(0, self.progress.global_step - (self.stage == "fit"))

    @property
    def log_epoch(self) -> float:
        """The epoch that is logged with the metrics: in a fit the current one, after it the number of epochs."""
        return float(self.progress.epoch if self.stage == "fit" else self.num_epochs)

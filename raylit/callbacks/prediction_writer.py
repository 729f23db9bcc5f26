"""BasePredictionWriter: writes predictions on the workers that make them. Runs on every worker."""

import enum
from collections.abc import Sequence
from typing import Any, Literal

from raylit.callbacks.base import Callback
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError


class WriteInterval(str, enum.Enum):
    """Times at which predictions are written."""

    BATCH = "batch"
    EPOCH = "epoch"
    BATCH_AND_EPOCH = "batch_and_epoch"

    @property
    def on_batch(self) -> bool:
        """True if predictions are written after each batch."""
        return self in (self.BATCH, self.BATCH_AND_EPOCH)

    @property
    def on_epoch(self) -> bool:
        """True if predictions are written at the end of the loop."""
        return self in (self.EPOCH, self.BATCH_AND_EPOCH)


class BasePredictionWriter(Callback):
    """Base of callbacks that write predictions: override `write_on_batch_end`, `write_on_epoch_end` or both.

    Every worker writes its own share of the batches. Indices are those of the samples in the data set; an empty list if
    they cannot be known: for iterable data sets, and for samplers that split the data themselves. With
    `trainer.predict(..., return_predictions=False)` no predictions are sent to the driver.

    Args:
        write_interval: Which of the two methods are called: "batch", "epoch" or "batch_and_epoch".

    Raises:
        ConfigError: if the interval is unknown.
    """

    def __init__(self, write_interval: Literal["batch", "epoch", "batch_and_epoch"] = "batch") -> None:
        try:
            self.interval = WriteInterval(write_interval)
        except ValueError:
            allowed = ", ".join(repr(interval.value) for interval in WriteInterval)
            raise ConfigError(
                f"{type(self).__name__}(write_interval={write_interval!r}): must be one of {allowed}"
            ) from None

    def write_on_batch_end(
        self,
        trainer: TrainerView,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the predictions of one batch.

        Args:
            trainer: The worker's view of the run.
            pl_module: The module.
            prediction: The result of `predict_step` for the batch.
            batch_indices: Indices of the batch's samples in the data set.
            batch: The batch.
            batch_idx: Counts this worker's batches.
            dataloader_idx: Index of the loader.
        """
        raise NotImplementedError(f"{type(self).__name__} writes on batches: define write_on_batch_end")

    def write_on_epoch_end(
        self, trainer: TrainerView, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write the predictions of all this worker's batches.

        Args:
            trainer: The worker's view of the run.
            pl_module: The module.
            predictions: Results of `predict_step` on the CPU, one for each batch; a list for each loader if there are
                several.
            batch_indices: For each loader the indices of each batch.
        """
        raise NotImplementedError(f"{type(self).__name__} writes on epochs: define write_on_epoch_end")

    def on_predict_batch_end(
        self,
        trainer: TrainerView,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.interval.on_batch:
            indices = trainer.predict_loop.current_batch_indices
            self.write_on_batch_end(trainer, pl_module, outputs, indices, batch, batch_idx, dataloader_idx)

    def on_predict_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        if self.interval.on_epoch:
            loop = trainer.predict_loop
            self.write_on_epoch_end(trainer, pl_module, loop.predictions, loop.epoch_batch_indices)

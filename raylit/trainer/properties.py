"""The Trainer's properties: settings, state and results of its last run; and saving that run. Driver."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.progress_bar import ProgressBar
from raylit.checkpoint import files, format
from raylit.config import Plan, PlanProperties
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.core.weights import write_weights
from raylit.driver.loop.goodput import Goodput, GoodputLedger
from raylit.errors import CheckpointError, ConfigError
from raylit.loggers import Logger
from raylit.precision import build_precision
from raylit.profilers import PassThroughProfiler, Profiler
from raylit.protocol.messages import Saved
from raylit.protocol.state import Progress, RunState, RunStatus, TrainerState


def write_last_run(
    path: str | os.PathLike[str],
    *,
    module: Any,
    datamodule: Any,
    progress: Progress,
    newest: str,
    is_weights_only: bool,
) -> None:
    """Write the last run as a checkpoint.

    The driver has the weights, but no optimizer and random states. These come from the run's `newest` checkpoint if
    that is of the same step. Otherwise, or with `is_weights_only`, the file has weights and hyper-parameters only.

    Raises:
        CheckpointError: If the weights are on the meta device and no checkpoint is of the run's last step.
    """
    weights = format.checkpoint_from_weights(module.state_dict(), progress, module=module, datamodule=datamodule)
    whole = files.read(newest) if newest and not is_weights_only and files.exists(newest) else {}
    is_of_this_step = "optimizer_states" in whole and format.read_progress(whole) == progress
    if any(isinstance(value, Tensor) and value.is_meta for value in weights["state_dict"].values()):
        if "optimizer_states" not in whole or format.read_progress(whole).global_step != progress.global_step:
            raise CheckpointError(
                "the model's weights are on the meta device, without numbers, and no checkpoint is of the run's last "
                "step: leave out FSDPStrategy(gather_weights=False), or use the checkpoints that the run has saved"
            )
        files.write(whole, path)
    elif is_of_this_step:
        files.write({**whole, "state_dict": weights["state_dict"]}, path)
    else:
        files.write(format.merge([Saved(rank=0, checkpoint=weights, of_rank={})], {}), path)


class TrainerProperties(PlanProperties):
    """Properties of the Trainer, which writes the fields below; users read the properties."""

    loggers: list[Logger]
    ckpt_path: str | None
    """Path from which the last run's checkpoint was read; None: it had none."""
    _plan: Plan
    _state: RunState
    _status: RunStatus
    _ledger: GoodputLedger | None
    _progress_of_weights: Progress
    """Position in the last fit that the driver's weights are of: the start, if an error kept the workers from sending
    theirs."""
    _callbacks: list[Callback]
    _driver_callbacks: list[DriverCallback]
    _profiler: Profiler | None
    _model: LightningModule | None
    _datamodule: DataModule | None

    @property
    def plan(self) -> Plan:
        """The frozen settings of the run, as every worker gets them. Internal."""
        return self._plan

    @property
    def goodput(self) -> Goodput | None:
        """Wall time of the last run by cause, with the share of its steps; None before the first run."""
        return None if self._ledger is None else self._ledger.read()

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """Last value of every metric, as 0-dim tensors."""
        return {name: torch.tensor(value) for name, value in self._state.callback_metrics.items()}

    @property
    def logged_metrics(self) -> dict[str, Tensor]:
        """Last values that were sent to the loggers, as 0-dim tensors."""
        return {name: torch.tensor(value) for name, value in self._state.logged_metrics.items()}

    @property
    def progress_bar_metrics(self) -> dict[str, float | str]:
        """Last values that the progress bar has shown."""
        return dict(self._state.progress_bar_metrics)

    @property
    def current_epoch(self) -> int:
        """Index of the epoch during a fit; afterwards the number of epochs run, the last one perhaps only in part."""
        return self._state.num_epochs

    @property
    def global_step(self) -> int:
        """Number of optimizer steps."""
        return self._state.progress.global_step

    @property
    def num_training_batches(self) -> float:
        """Batches per worker and epoch of the last fit; infinite if the loader has no length."""
        return self._state.num_training_batches

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the last fit up to its limits; hooks read it from their own `trainer`."""
        if self._status == "initializing":
            raise ConfigError(
                "estimated_stepping_batches is known once fit has made the loaders: read self.trainer."
                "estimated_stepping_batches in the module's setup or configure_optimizers"
            )
        return self._plan.num_windows(self._state.num_training_batches)

    @property
    def state(self) -> TrainerState:
        """Stage of the last run and how it ended."""
        return TrainerState(fn=self._state.stage, status=self._status)

    @property
    def interrupted(self) -> bool:
        """True if the last run ended by Ctrl-C, SIGTERM or SIGHUP."""
        return self._state.is_interrupted

    @property
    def callbacks(self) -> list[Callback | DriverCallback]:
        return [*self._callbacks, *self._driver_callbacks]

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        return next(iter(self.checkpoint_callbacks), None)

    @property
    def checkpoint_callbacks(self) -> list[ModelCheckpoint]:
        return [callback for callback in self._driver_callbacks if isinstance(callback, ModelCheckpoint)]

    @property
    def early_stopping_callback(self) -> EarlyStopping | None:
        return next(iter(self.early_stopping_callbacks), None)

    @property
    def early_stopping_callbacks(self) -> list[EarlyStopping]:
        return [callback for callback in self._driver_callbacks if isinstance(callback, EarlyStopping)]

    @property
    def progress_bar_callback(self) -> ProgressBar | None:
        return next((callback for callback in self._driver_callbacks if isinstance(callback, ProgressBar)), None)

    @property
    def logger(self) -> Logger | None:
        return self.loggers[0] if self.loggers else None

    @property
    def profiler(self) -> Profiler:
        """The profiler, with the last run's `profiles`; in hooks `self.trainer.profiler` is the worker's own copy."""
        return self._profiler or PassThroughProfiler()

    @property
    def log_dir(self) -> str:
        """Directory or URL that the first logger writes to; without a logger the root directory."""
        return next((log.log_dir for log in self.loggers if log.log_dir is not None), self._plan.default_root_dir)

    @property
    def num_workers(self) -> int:
        return self._plan.workers.num_workers

    @property
    def world_size(self) -> int:
        return self._plan.workers.world_size

    @property
    def num_nodes(self) -> int:
        return self._plan.workers.num_nodes or 1

    @property
    def accumulate_grad_batches(self) -> int:
        """Batches per optimizer step in the first epoch, or after a fit in its last epoch."""
        return self._plan.optimization.window_in(self._state.progress.epoch)

    @property
    def global_rank(self) -> int:
        """Rank of this process: 0, as the driver is one process and prints and writes once."""
        return 0

    @property
    def is_global_zero(self) -> bool:
        return True

    local_rank = node_rank = global_rank

    @contextmanager
    def init_module(self, empty_init: bool | None = None) -> Iterator[None]:
        """Build a model inside this context manager with weights of the run's precision, on the CPU.

        Workers move their copies to their devices.

        Args:
            empty_init: With strategy="fsdp" True builds the model on the meta device, without memory.
        """
        is_on_meta = bool(empty_init) and self._plan.strategy.is_sharding
        precision = build_precision(
            self._plan.optimization.precision, torch.device("cpu"), build_scaler=lambda device: GradScaler(device.type)
        )
        with precision.around_making(), torch.device("meta" if is_on_meta else "cpu"):
            yield

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print as the builtin does; in hooks `self.trainer.print` prints on rank 0 only."""
        print(*args, **kwargs)

    @property
    def num_val_batches(self) -> list[float]:
        """Validation batches per worker, for each loader of the last run."""
        return list(self._state.num_val_batches)

    @property
    def enable_validation(self) -> bool:
        """True if the last fit has validation."""
        return self._state.has_validation

    @property
    def sanity_checking(self) -> bool:
        return self._state.is_sanity_checking

    @property
    def datamodule(self) -> DataModule | None:
        """DataModule of the last run."""
        return self._datamodule

    @property
    def model(self) -> LightningModule | None:
        return self._model

    @property
    def lightning_module(self) -> LightningModule | None:
        """Module of the last run."""
        return self._model

    def save_checkpoint(self, filepath: str | os.PathLike[str], weights_only: bool = False) -> None:
        """Write a checkpoint of the last run; inside a run hooks save with their own `trainer`.

        It holds the whole run if this Trainer's newest checkpoint is of the same step, else weights and
        hyper-parameters.

        Args:
            filepath: A path or a URL that fsspec knows.
            weights_only: Write weights and hyper-parameters only.

        Raises:
            ConfigError: If nothing has run yet.
        """
        if self._model is None:
            raise ConfigError("save_checkpoint needs a model: call fit on this Trainer before")
        newest = "" if self.checkpoint_callback is None else self.checkpoint_callback.newest_model_path
        owners: Any = {"module": self._model, "datamodule": self._datamodule, "progress": self._progress_of_weights}
        write_last_run(filepath, **owners, newest=newest, is_weights_only=weights_only)

    def save_weights(self, filepath: str | os.PathLike[str]) -> None:
        """Write the last run's weights as a safetensors file, for other programs and for `load_weights`.

        Args:
            filepath: A path or a URL that fsspec knows.

        Raises:
            ConfigError: If nothing has run yet.
        """
        if self._model is None:
            raise ConfigError(
                "save_weights needs a model: call fit on this Trainer before, or model.save_weights(path)"
            )
        write_weights(self._model, filepath)

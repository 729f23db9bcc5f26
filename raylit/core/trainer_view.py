"""The types through which user code reaches the run: TrainerView, OptimizerMethods and MetricLog.

The worker implements them (`raylit/worker/view.py`, `raylit/worker/optimization/handles.py`,
`raylit/worker/metrics/buffer.py`); modules and callbacks, which lie below the worker, only name them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from raylit.config import PlanProperties
from raylit.protocol.state import TrainerState


class MetricLog(Protocol):
    """Logged values of the loop under way; `LightningModule.log` writes to it."""

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool,
        logger: bool | None,
        on_step: bool | None,
        on_epoch: bool | None,
        reduce_fx: Any,
        batch_size: int | Tensor | None,
        add_dataloader_idx: bool,
    ) -> None: ...
    def log_step(self, name: str, value: Any) -> None:
        """Log a value of this step alone, for the loggers."""
        ...

    def latest(self, *, only_prog_bar: bool = False) -> dict[str, float]:
        """Return this rank's own last values. Waits for the device."""
        ...


class OptimizerMethods(Protocol):
    """The optimizers of a fit and the operations on them that `LightningModule` offers."""

    @property
    def optimizers(self) -> Sequence[Any]:
        """A stand-in for each optimizer, whose `step` runs hooks and the gradient scaler and counts the step."""
        ...

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None: ...
    def clip(self, optimizer: Any, *, limit: float, algorithm: Any) -> None:
        """Clip by norm ("norm") or by value ("value")."""
        ...

    def toggle(self, optimizer: Any) -> None: ...
    def toggle_context(self, optimizer: Any) -> AbstractContextManager[None]: ...
    def untoggle(self, optimizer: Any) -> None: ...


class TrainerView(PlanProperties, Protocol):
    """The `trainer` that hooks and callbacks get: what this worker knows of the run.

    It has no entry points such as `fit`, and nothing that lives in the driver. Setting `should_stop` on any rank asks
    for the end of training. Arguments of the Trainer that are in the plan, such as `max_epochs` and `precision`, can be
    read as properties.
    """

    current_epoch: int
    global_step: int
    """Optimizer steps so far, of all optimizers."""
    num_windows: int
    """Batches, or windows of accumulated batches, after which there was a step."""
    should_stop: bool
    sanity_checking: bool
    is_epoch_ended: bool
    is_epoch_cut_short: bool
    """In `on_train_epoch_end`: the run ends before the epoch's last batch."""
    metrics: MetricLog | None
    optimizers: list[torch.optim.Optimizer]
    handles: OptimizerMethods
    """What the module's optimization methods call; only during a fit."""
    lr_schedulers: list[Any]
    lr_scheduler_configs: list[Any]
    """Each scheduler with its interval, frequency, monitor and name."""
    num_training_batches: float
    """Batches of an epoch on this worker; infinite where the loader has no length."""
    num_val_batches: list[float]
    train_dataloader: Any
    val_dataloaders: Any
    test_dataloaders: Any
    predict_dataloaders: Any
    loggers: list[Any]
    """Stand-ins for the driver's loggers; with num_workers=0 the loggers themselves."""
    fit_loop: Any
    predict_loop: Any
    saving: Any
    strategy: Any
    profiler: Any

    @property
    def state(self) -> TrainerState: ...
    @property
    def lightning_module(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def datamodule(self) -> Any: ...
    @property
    def callbacks(self) -> list[Any]: ...
    @property
    def logger(self) -> Any: ...
    @property
    def log_dir(self) -> str: ...
    @property
    def ckpt_path(self) -> str | None: ...
    @property
    def callback_metrics(self) -> dict[str, Tensor]: ...
    @property
    def logged_metrics(self) -> dict[str, Tensor]: ...
    @property
    def progress_bar_metrics(self) -> dict[str, Any]: ...
    @property
    def estimated_stepping_batches(self) -> float: ...
    @property
    def accumulate_grad_batches(self) -> int: ...
    @property
    def enable_validation(self) -> bool: ...
    @property
    def is_last_batch(self) -> bool: ...
    @property
    def is_logging_step(self) -> bool: ...
    @property
    def training(self) -> bool: ...
    @property
    def validating(self) -> bool: ...
    @property
    def testing(self) -> bool: ...
    @property
    def predicting(self) -> bool: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    @property
    def node_rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def is_global_zero(self) -> bool: ...
    def metric_values(self) -> dict[str, float]:
        """Return `callback_metrics` as numbers."""
        ...

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on rank 0 only."""
        ...

    def all_gather(self, data: Any, *, group: Any = None, sync_grads: bool = False) -> Any:
        """See LightningModule.all_gather. Collective."""
        ...

    def save_checkpoint(self, filepath: Any, weights_only: bool = False) -> None:
        """Write the run as it stands now to a path or URL. Collective: every rank calls it."""
        ...

    def save_own_checkpoint(self, filepath: Any) -> None:
        """Write the run from this rank alone, for a hook after an exception."""
        ...

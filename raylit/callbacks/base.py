"""Callback and DriverCallback, the two kinds of callback, and LambdaCallback."""

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from raylit.config import Plan
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError
from raylit.protocol.state import RunState

if TYPE_CHECKING:
    from raylit.checkpoint.index import Publication
    from raylit.errors import CheckpointError
    from raylit.loggers.base import Logger


class Callback:
    """Base of the callbacks that are called in the training loop, on every worker, with Lightning's hook names.

    `trainer` is the worker's view of the run: epoch, step, metrics, optimizers, `should_stop`. The hooks have
    Lightning's arguments. After the run rank 0's attributes of the callback are copied back to the driver's object.
    They persist into a further run, as in Lightning: set what belongs to one run in `setup` or `on_fit_start`. raylit's
    own callbacks reset themselves at the start of every fit.

    `trainer.should_stop = True`, on any rank, ends the training after the batch: immediately with one worker; with
    several at the next step at which metrics are logged (`log_every_n_steps`), because the ranks communicate only then,
    or at the next validation or epoch end, whichever comes first.

    If a run ends inside an epoch (`max_steps`, `max_time`, a stop), `on_train_epoch_end` is called for the part of the
    epoch that was done (`trainer.is_epoch_cut_short`), as in Lightning. A run that is continued from there calls it
    again when the epoch is complete.
    """

    def setup(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None: ...
    def teardown(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None: ...
    def on_fit_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_fit_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_sanity_check_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_sanity_check_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_train_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_train_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_train_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_train_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None: ...
    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None: ...
    def on_before_zero_grad(self, trainer: TrainerView, pl_module: LightningModule, optimizer: Optimizer) -> None: ...
    def on_before_backward(self, trainer: TrainerView, pl_module: LightningModule, loss: Tensor) -> None: ...
    def on_after_backward(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_before_optimizer_step(
        self, trainer: TrainerView, pl_module: LightningModule, optimizer: Optimizer
    ) -> None: ...
    def on_validation_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_validation_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_validation_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_validation_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_validation_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_validation_batch_end(
        self,
        trainer: TrainerView,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None: ...
    def on_test_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_test_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_test_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_test_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_test_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_batch_end(
        self,
        trainer: TrainerView,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None: ...
    def on_predict_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_predict_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_predict_epoch_start(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_predict_epoch_end(self, trainer: TrainerView, pl_module: LightningModule) -> None: ...
    def on_predict_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_batch_end(
        self,
        trainer: TrainerView,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None: ...
    def on_save_checkpoint(
        self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None: ...
    def on_load_checkpoint(
        self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None: ...
    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None: ...
    def on_keyboard_interrupt(self, trainer: TrainerView, pl_module: LightningModule) -> None:
        """React to Ctrl-C, which has ended the run after the current step; `on_exception` follows."""

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors to store in the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def _generate_state_key(self, **kwargs: Any) -> str:
        """Return a `state_key` with arguments that distinguish several callbacks of this class."""
        return f"{type(self).__qualname__}{kwargs!r}"


class Run(Protocol):
    """View of a run that DriverCallbacks get, and the requests that they can make. The coordinator implements it."""

    @property
    def plan(self) -> Plan: ...
    @property
    def state(self) -> RunState: ...
    @property
    def loggers(self) -> "list[Logger]": ...
    @property
    def log_dir(self) -> str:
        """Directory of the run's files: the first logger's directory, else the plan's root directory."""
        ...

    @property
    def is_idle(self) -> bool:
        """True while the workers are paused and can be asked to save; False once one of their hooks has raised."""
        ...

    def stop(self, reason: str) -> None:
        """Request the end of training after the current step; min_epochs and min_steps are still honoured."""
        ...

    def save_checkpoint(self, path: str, *, is_weights_only: bool = False, then: "Publication | None" = None) -> None:
        """Capture the run's current state, write it to `path` as a whole or not at all, and then carry out `then`.

        With `checkpoint_async` this returns once the state is copied, and training continues while the file is written;
        `on_save_end` reports the result to the callback. A save of a later state waits for an unfinished one: at most
        one state is being written. Saves of the same state share it, including what the hooks' `on_save_checkpoint`
        added at the first save; but full and weights-only saves wait for each other.
        """
        ...

    def finish_saves(self, *, is_earlier_only: bool = False) -> None:
        """Wait until all requested files are written.

        `is_earlier_only` does not wait for saves of the current state, which the next save can share.
        """
        ...

    def is_saving_to(self, path: str) -> bool:
        """Return whether a save to this path has been requested, so that the file exists or will exist."""
        ...


class DriverCallback:
    """Base of the callbacks that control a run from the driver.

    They see the run's state and the reduced metrics, and can request a stop or a save. Every hook is called while the
    workers are paused, except `on_tick` and `on_step_metrics`, which are called while they run, and `on_save_end`,
    which may be.
    """

    def on_start(self, run: Run) -> None:
        """React to the stage's workers being set up, before the sanity check; the sizes of the loaders are known."""

    def on_train_start(self, run: Run) -> None: ...
    def on_train_epoch_start(self, run: Run) -> None: ...
    def on_tick(self, run: Run, batch: int, dataloader_idx: int) -> None:
        """React to progress of the current loop: `batch` batches of it are done. At most several times a second."""

    def on_step_metrics(self, run: Run) -> None:
        """React to the metrics of a logging step, which are in the state now."""

    def on_train_pause(self, run: Run) -> None:
        """React to a pause of training between two batches, requested by `next_pause_step` or by something else."""

    def on_evaluation_start(self, run: Run, stage: str) -> None: ...
    def on_validation_end(self, run: Run) -> None:
        """React to the end of a validation inside fit, not of the sanity check (`run.state.is_sanity_checking`)."""

    def on_evaluation_end(self, run: Run, stage: str) -> None:
        """React to the end of any evaluation loop: validation inside fit, sanity check, validate, test and predict."""

    def on_train_epoch_end(self, run: Run) -> None:
        """React to the end of a training epoch.

        Also called if the run ends inside the epoch (`run.state.is_epoch_cut_short`); a run that is continued from
        there calls it again when the epoch is complete.
        """

    def on_train_end(self, run: Run) -> None: ...
    def on_save_end(self, run: Run, path: str, error: "CheckpointError | None") -> None:
        """React to the end of a save that this callback requested: the file exists, or `error` says why not."""

    def on_end(self, run: Run) -> None:
        """Release resources at the end of the stage, successful or not. Called exactly once after `on_start`."""

    def on_interrupt(self, run: Run) -> None:
        """React to a signal that ends a fit between two batches: the last chance to save. `on_exception` follows."""

    def on_exception(self, run: Run, error: BaseException) -> None: ...

    def next_pause_step(self, run: Run) -> int | None:
        """Return the optimizer step at which this callback next needs the workers to pause; None for no request."""
        return None

    def reset_state(self) -> None:
        """Discard what earlier runs have left, as a fit begins, perhaps not this Trainer's first.

        For a run that is continued, `load_state_dict` follows. Keep arguments, and results that belong to no run.
        """

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


_STATE = frozenset({"state_key", "state_dict", "load_state_dict"})
_HOOKS = tuple(name for name in vars(Callback) if not name.startswith("_") and name not in _STATE)


class LambdaCallback(Callback):
    """Callback made of functions, one for each hook by name, which get the hook's arguments.

    With Ray workers the functions are copies, and so are the objects that they close over.

    Args:
        **hooks: Functions by hook name; None for no function.

    Raises:
        ConfigError: if there is no hook of a name, or a value is not callable.

    Example:
        LambdaCallback(on_train_epoch_end=lambda trainer, pl_module: print(trainer.current_epoch))
    """

    def __init__(self, **hooks: Callable[..., Any] | None) -> None:
        for name, hook in hooks.items():
            if name not in _HOOKS:
                near = difflib.get_close_matches(name, _HOOKS, n=1)
                hint = f"; did you mean {near[0]}?" if near else f": allowed are {', '.join(_HOOKS)}"
                raise ConfigError(f"LambdaCallback({name}=...): no such hook{hint}")
            if hook is not None and not callable(hook):
                raise ConfigError(f"LambdaCallback({name}={hook!r}): must be a function with the hook's arguments")
            if hook is not None:
                setattr(self, name, hook)

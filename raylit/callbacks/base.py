"""Callback and DriverCallback, the two kinds of callback, and LambdaCallback."""

import difflib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from raylit.config.plan import Plan
from raylit.errors import ConfigError
from raylit.protocol.state import RunState

if TYPE_CHECKING:
    from raylit.checkpoint.pending import Publication
    from raylit.errors import CheckpointError
    from raylit.loggers.base import Logger


class Callback:
    """Hooks of the training loop, with Lightning's names and arguments, called on every worker.

    `trainer` is the worker's view of the run: epoch, step, metrics, optimizers, `should_stop`. After the run rank 0's
    attributes of the callback are copied back to the driver's object. They stay in a further run, as in Lightning: what
    belongs to one run is to be set in `setup` or `on_fit_start`. raylit's own callbacks begin every fit anew.

    `trainer.should_stop = True`, on any rank, ends the training after the batch: at once where there is one worker;
    with more of them at the next step of which metrics are logged (`log_every_n_steps`), as the ranks tell each other
    then and in no other step, or at the next validation or epoch's end, whichever comes first.

    Where a run ends inside an epoch (`max_steps`, `max_time`, a stop), `on_train_epoch_end` is called for the part of
    it that was done (`trainer.is_epoch_cut_short`), as in Lightning; a run that is continued from there calls it again
    when the epoch is complete.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None: ...
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None: ...
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None: ...
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None: ...
    def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...
    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None: ...
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None: ...
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None: ...
    def on_validation_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_test_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_predict_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_predict_epoch_start(self, trainer: Any, pl_module: Any) -> None: ...
    def on_predict_epoch_end(self, trainer: Any, pl_module: Any) -> None: ...
    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None: ...
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None: ...
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None: ...
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None: ...
    def on_keyboard_interrupt(self, trainer: Any, pl_module: Any) -> None:
        """Ctrl-C has ended the run, after the step; `on_exception` follows."""

    @property
    def state_key(self) -> str:
        """The key of this callback's state in a checkpoint."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors to keep in the checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def _generate_state_key(self, **kwargs: Any) -> str:
        """A `state_key` of arguments that tell several callbacks of this class apart."""
        return f"{type(self).__qualname__}{kwargs!r}"


class Run(Protocol):
    """What a DriverCallback may see of a run and ask of it. The coordinator is one."""

    @property
    def plan(self) -> Plan: ...
    @property
    def state(self) -> RunState: ...
    @property
    def loggers(self) -> "list[Logger]": ...
    @property
    def log_dir(self) -> str:
        """Where the run's files go: the first logger's directory, else the plan's root directory."""
        ...

    @property
    def is_idle(self) -> bool:
        """The workers stand still and can be asked to save; not after one of their hooks has raised."""
        ...

    def stop(self, reason: str) -> None:
        """Ask for the end of training after the step under way; min_epochs and min_steps are still honoured."""
        ...

    def save_checkpoint(self, path: str, *, is_weights_only: bool = False, then: "Publication | None" = None) -> None:
        """Take the run as it stands now and write it to `path`, whole or not at all, and then what follows that.

        With `checkpoint_async` this returns once the state is copied, and the writing goes on beside the training;
        `on_save_end` tells the callback of its end. A save of a later moment that comes before that waits for it: at
        most one state is on its way. Saves of the same moment share it, with the hooks' `on_save_checkpoint` of the
        first; but whole ones and such of weights only wait for each other.
        """
        ...

    def finish_saves(self, *, is_earlier_only: bool = False) -> None:
        """Wait until what was saved is written; `is_earlier_only`: but for saves of this moment, which the next can
        share."""
        ...

    def is_saving_to(self, path: str) -> bool:
        """A file will be there, if it is not yet."""
        ...


class DriverCallback:
    """Steers from the driver: sees the run's state and the reduced metrics, may ask for a stop or a save.

    Every hook is called while the workers stand still, except `on_tick` and `on_step_metrics`, which are called while
    they run, and `on_save_end`, which may be.
    """

    def on_start(self, run: Run) -> None:
        """The stage's workers are set up; sizes of the loaders are known. Before the sanity check."""

    def on_train_start(self, run: Run) -> None: ...
    def on_train_epoch_start(self, run: Run) -> None: ...
    def on_tick(self, run: Run, batch: int, dataloader_idx: int) -> None:
        """A sign of life from the loop under way: `batch` batches of it are done. Several times a second at most."""

    def on_step_metrics(self, run: Run) -> None:
        """A logging step's metrics have arrived in the state."""

    def on_train_pause(self, run: Run) -> None:
        """Training stands at a batch border: one that was asked for by `next_pause_step`, or another."""

    def on_evaluation_start(self, run: Run, stage: str) -> None: ...
    def on_validation_end(self, run: Run) -> None:
        """After each validation inside fit, not after the sanity check (`run.state.is_sanity_checking`)."""

    def on_evaluation_end(self, run: Run, stage: str) -> None:
        """After any evaluation loop: validation inside fit, the sanity check, validate, test and predict."""

    def on_train_epoch_end(self, run: Run) -> None:
        """Also where the run ends inside the epoch (`run.state.is_epoch_cut_short`); a run that is continued from there
        comes here again when the epoch is complete."""

    def on_train_end(self, run: Run) -> None: ...
    def on_save_end(self, run: Run, path: str, error: "CheckpointError | None") -> None:
        """A save that this callback has asked for is over: the file is there, or the error says why not."""

    def on_end(self, run: Run) -> None:
        """The stage is over, well or not: release what is held. Called exactly once after `on_start`."""

    def on_interrupt(self, run: Run) -> None:
        """A signal ends a fit that stands at a batch border: the last time to save. `on_exception` follows."""

    def on_exception(self, run: Run, error: BaseException) -> None: ...

    def next_pause_step(self, run: Run) -> int | None:
        """The optimizer step at which this callback next needs the workers to stand still, None: no wish."""
        return None

    def reset_state(self) -> None:
        """A fit begins, perhaps not this Trainer's first: forget what earlier runs have left. Of a run that is
        continued, `load_state_dict` follows. Arguments stay, and so do results that belong to no run."""

    @property
    def state_key(self) -> str:
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


_STATE = frozenset({"state_key", "state_dict", "load_state_dict"})
_HOOKS = tuple(name for name in vars(Callback) if not name.startswith("_") and name not in _STATE)


class LambdaCallback(Callback):
    """`LambdaCallback(on_train_epoch_end=lambda trainer, pl_module: ...)`: each hook by its name, with its arguments.

    With Ray workers the functions are copies, and so is what they close over.
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

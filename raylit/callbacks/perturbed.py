"""PerturbedHyperparameters: a trial continues another's checkpoint with its own optimizer settings. Worker."""

from typing import Any

from raylit.callbacks.base import Callback
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView


class PerturbedHyperparameters(Callback):
    """Callback that keeps new optimizer settings when a checkpoint is loaded.

    Population based training copies a better trial's checkpoint and changes the config. Optimizers and schedulers store
    their settings (lr, momentum, ...) in their state, so that loading it would undo the change. This callback makes the
    settings win that `configure_optimizers` has just made. A scheduled learning rate keeps its position in the
    schedule.
    """

    def on_load_checkpoint(self, trainer: TrainerView, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Change the saved states of optimizers and schedulers before they are loaded."""
        for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                rate = _scale_rate(group, saved)
                saved.update({name: value for name, value in group.items() if name != "params"})
                saved["lr"] = rate
        for scheduler, state in zip(trainer.lr_schedulers, checkpoint["lr_schedulers"], strict=True):
            if "base_lrs" in state:
                state["base_lrs"] = list(scheduler.base_lrs)


def _scale_rate(group: dict[str, Any], saved: dict[str, Any]) -> Any:
    """Return the new learning rate at the schedule's current position; without a schedule the new one itself."""
    if not saved.get("initial_lr"):
        return group["lr"]
    return saved["lr"] * (group.get("initial_lr", group["lr"]) / saved["initial_lr"])

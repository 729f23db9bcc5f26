"""PerturbedHyperparameters: a checkpoint of another config, continued with this one's optimizer settings. Worker."""

from typing import Any

from raylit.callbacks.base import Callback


class PerturbedHyperparameters(Callback):
    """Population based training copies a better trial's checkpoint and changes the config. Optimizers and schedulers
    keep their settings (lr, momentum, ...) in their state, so that loading it would undo the change: those that
    `configure_optimizers` has just made win. A scheduled learning rate keeps its place in the schedule."""

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Before the optimizers load their states, which are changed here."""
        for optimizer, state in zip(trainer.optimizers, checkpoint["optimizer_states"], strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                rate = _rate(group, saved)
                saved.update({name: value for name, value in group.items() if name != "params"})
                saved["lr"] = rate
        for scheduler, state in zip(trainer.lr_schedulers, checkpoint["lr_schedulers"], strict=True):
            if "base_lrs" in state:
                state["base_lrs"] = list(scheduler.base_lrs)


def _rate(group: dict[str, Any], saved: dict[str, Any]) -> Any:
    """The new learning rate where the schedule stands; without a schedule the new one."""
    if not saved.get("initial_lr"):
        return group["lr"]
    return saved["lr"] * (group.get("initial_lr", group["lr"]) / saved["initial_lr"])

"""Options: what `configure_optimizers` has set, put back over the options of a checkpoint. Worker."""

from collections.abc import Sequence
from typing import Any

from raylit.worker.optimization.configured import Schedule


class Options:
    """Of the optimizers and schedulers as they are configured, before a checkpoint is applied to them.

    For population based training: state goes on, options are those of the new config. A learning rate that schedulers
    have moved keeps its place between the base rate and what they have made of it.
    """

    def __init__(self, optimizers: Sequence[Any], schedules: Sequence[Schedule]) -> None:
        self._optimizers = optimizers
        self._schedulers = [schedule.scheduler for schedule in schedules]
        self._groups = [[_options(group) for group in optimizer.param_groups] for optimizer in optimizers]
        self._base_lrs = [getattr(scheduler, "base_lrs", None) for scheduler in self._schedulers]

    def put_back(self) -> None:
        for optimizer, configured in zip(self._optimizers, self._groups, strict=True):
            for group, options in zip(optimizer.param_groups, configured, strict=False):
                base, lr = group.get("initial_lr"), group.get("lr")
                group.update(options)
                if base and "initial_lr" in options:
                    group["lr"] = options["initial_lr"] * (lr / base)
        for scheduler, base_lrs in zip(self._schedulers, self._base_lrs, strict=True):
            if base_lrs is not None:
                scheduler.base_lrs = base_lrs
                scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}

"""GradientAccumulationScheduler: how many batches make a step, epoch by epoch. Driver only."""

from raylit.callbacks.base import DriverCallback
from raylit.errors import ConfigError


class GradientAccumulationScheduler(DriverCallback):
    """`scheduling={0: 8, 4: 4}`: from the epoch on, so many batches in a window. The Trainer puts it in its plan, as
    it does accumulate_grad_batches={...}: the callback itself has nothing to do in a run."""

    def __init__(self, scheduling: dict[int, int]) -> None:
        if not scheduling or not isinstance(scheduling, dict):
            raise ConfigError(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}): must be a dict of the batches in a window "
                "by the epoch from which on it is so: {0: 1, 4: 8}"
            )
        for number in [*scheduling, *scheduling.values()]:
            if isinstance(number, bool) or not isinstance(number, int):
                raise ConfigError(f"GradientAccumulationScheduler(scheduling={scheduling!r}): {number!r} is not an int")
        if min(scheduling) < 0 or min(scheduling.values()) < 1:
            raise ConfigError(
                f"GradientAccumulationScheduler(scheduling={scheduling!r}): epochs must be at least 0, batches 1"
            )
        self.scheduling = {0: 1, **scheduling}

    def going_to_accumulate_grad_batches(self) -> bool:
        return any(window > 1 for window in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Batches in a window of that epoch."""
        return self.scheduling[max(first for first in self.scheduling if first <= epoch)]

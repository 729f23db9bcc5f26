"""GradientAccumulationScheduler: number of batches per optimizer step, by epoch. Driver only."""

from raylit.callbacks.base import DriverCallback
from raylit.errors import ConfigError


class GradientAccumulationScheduler(DriverCallback):
    """Driver callback that sets the length of the accumulation window by epoch.

    The Trainer puts it into its plan, as it does accumulate_grad_batches={...}; during a run the callback does nothing.

    Args:
        scheduling: Number of batches per window, by the epoch (from 0) from which on it applies: `{0: 8, 4: 4}`. Epochs
            before the first one use 1.

    Raises:
        ConfigError: if it is not a dict of ints, an epoch is negative, or a number below 1.
    """

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
        """Return whether any epoch has more than one batch per window."""
        return any(window > 1 for window in self.scheduling.values())

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        """Return the number of batches per window of that epoch."""
        return self.scheduling[max(first for first in self.scheduling if first <= epoch)]

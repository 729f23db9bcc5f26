"""Callbacks that stand for an argument of the Trainer: its model summary, searches and accumulation. Driver only."""

from typing import Any, Literal

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import ConfigError
from raylit.text_table import printable


class ModelSummary(DriverCallback):
    """Driver callback that prints the model's layers after `setup` and `configure_model` have run.

    If the module has an `example_input_array`, the layers' input and output sizes are shown as well.

    Args:
        max_depth: Depth of the layers to print; 0 prints only the totals, -1 all layers.

    Raises:
        ConfigError: if it is less than -1 or not an int.
    """

    def __init__(self, max_depth: int = 1) -> None:
        if isinstance(max_depth, bool) or not isinstance(max_depth, int) or max_depth < -1:
            raise ConfigError(f"ModelSummary(max_depth={max_depth!r}): must be -1 (all layers), 0 (none) or more")
        self.max_depth = max_depth

    def on_start(self, run: Run) -> None:
        if run.state.summary is not None:
            print(printable(str(run.state.summary)))


class LearningRateFinder(DriverCallback):
    """Driver callback that makes `fit` begin with `Tuner.lr_find`, once for each model.

    The arguments are those of `Tuner.lr_find`, where `num_training_steps` is called `num_training`. During the run
    itself the callback does nothing. `optimal_lr` keeps the result.
    """

    def __init__(
        self,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training_steps: int = 100,
        mode: Literal["exponential", "linear"] = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> None:
        self.arguments: dict[str, Any] = {
            "min_lr": min_lr,
            "max_lr": max_lr,
            "num_training": num_training_steps,
            "mode": mode,
            "early_stop_threshold": early_stop_threshold,
            "update_attr": update_attr,
            "attr_name": attr_name,
        }
        self.optimal_lr: Any = None
        """The result of `lr_find`, with `results`, `suggestion()` and `plot()`; None before the search."""


class BatchSizeFinder(DriverCallback):
    """Driver callback that makes `fit` begin with `Tuner.scale_batch_size`, once for each model.

    The arguments are those of `Tuner.scale_batch_size`. `optimal_batch_size` keeps the result.
    """

    def __init__(
        self,
        mode: Literal["power", "binsearch", "throughput"] = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
    ) -> None:
        self.arguments: dict[str, Any] = {
            "mode": mode,
            "steps_per_trial": steps_per_trial,
            "init_val": init_val,
            "max_trials": max_trials,
            "batch_arg_name": batch_arg_name,
            "margin": margin,
            "max_val": max_val,
        }
        self.optimal_batch_size: int | None = None


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

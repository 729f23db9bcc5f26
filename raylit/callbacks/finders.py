"""LearningRateFinder and BatchSizeFinder: callbacks that request the Tuner's searches. Driver only."""

from typing import Any, Literal

from raylit.callbacks.base import DriverCallback


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

"""LearningRateFinder and BatchSizeFinder: the Trainer's searches, asked for by a callback. Driver only."""

from typing import Any, Literal

from raylit.callbacks.base import DriverCallback


class LearningRateFinder(DriverCallback):
    """Has `fit` begin with `Tuner.lr_find`, once for each model; the arguments are its own, `num_training_steps` is
    called `num_training` there. In the run itself it has nothing to do, and `optimal_lr` outlasts it."""

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
        """What `lr_find` has returned, with `results`, `suggestion()` and `plot()`."""


class BatchSizeFinder(DriverCallback):
    """Has `fit` begin with `Tuner.scale_batch_size`, once for each model; the arguments are its own."""

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

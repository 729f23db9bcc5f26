"""The learning-rate range test: RateSweep runs it beside the model, LearningRateFinder holds its curve. Both sides.

The test raises the rate from step to step and looks at the loss: Smith, "Cyclical Learning Rates for Training Neural
Networks", 2015, https://arxiv.org/abs/1506.01186. To smooth the curve, to give up where it diverges and to suggest the
rate of its steepest descent are from fastai's `lr_find`.
"""

import math
import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raylit.callbacks.base import Callback
from raylit.errors import ConfigError

SweepMode = Literal["exponential", "linear"]

_SMOOTHING = 0.98
_HIGH = 0.9
"""Of the way from the minimum to the usual level."""


class LearningRateFinder:
    """The curve of a range test."""

    def __init__(self, *, lrs: list[float], losses: list[float]) -> None:
        self.results = {"lr": lrs, "loss": losses}
        """The rates in rising order, and the smoothed loss at each."""

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """The rate at which the loss falls most steeply, the first and last points left out; None, with a warning,
        where too few finite ones are left.

        The smoothed curve's beginning is the mean of few losses and jumps: what counts is the fall from where it was
        last near its usual level down to its minimum.
        """
        lrs, losses = (np.array(self.results[name][skip_begin : -skip_end or None]) for name in ("lr", "loss"))
        lrs, losses = lrs[np.isfinite(losses)], losses[np.isfinite(losses)]
        if len(losses) < 2:
            warnings.warn(
                f"the range test has too few points for a suggestion ({len(self.results['lr'])}): raise num_training, "
                "or lower max_lr",
                stacklevel=2,
            )
            return None
        lowest = max(1, int(np.argmin(losses)))
        falling = losses[: lowest + 1]
        high = losses[lowest] + _HIGH * (np.median(falling) - losses[lowest])
        first = int(np.flatnonzero(falling[:-1] >= high)[-1]) if (falling[:-1] >= high).any() else 0
        return float(lrs[first + np.argmin(np.gradient(falling)[first:])])

    def plot(self, suggest: bool = False, show: bool = False, ax: Any = None) -> Any:
        """A matplotlib figure of the curve, or None where `ax` is given to draw on; `suggest` marks the suggestion."""
        try:
            # Optional, and slow to import.
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ConfigError("plot needs matplotlib: pip install matplotlib") from error
        figure = None
        if ax is None:
            figure, ax = plt.subplots()
        ax.plot(self.results["lr"], self.results["loss"])
        ax.set(xscale="log", xlabel="learning rate", ylabel="smoothed loss")
        if suggest and (rate := self.suggestion()) is not None:
            ax.plot(rate, self.results["loss"][self.results["lr"].index(rate)], "o", color="red")
        if show:
            plt.show()
        return figure


class RateSweep(Callback):
    """Sets the rate of every optimizer before each step, and collects the smoothed loss after it. On every worker."""

    def __init__(
        self, *, min_lr: float, max_lr: float, num_steps: int, mode: SweepMode, early_stop_threshold: float | None
    ) -> None:
        spaced = np.geomspace if mode == "exponential" else np.linspace
        self.lrs: list[float] = spaced(min_lr, max_lr, num_steps).tolist()
        self.losses: list[float] = []
        self._threshold = math.inf if early_stop_threshold is None else early_stop_threshold
        self._average = 0.0
        self._num_windows = 0
        self._loss: Tensor | None = None
        """Of the last batch on this rank; None where it had no share of it."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Collective: unlike a batch's end, its start comes on every rank, also on one without a share of the batch."""
        if trainer.num_windows > self._num_windows:
            self._num_windows = trainer.num_windows
            self._take(_mean_over_ranks(self._loss, trainer, pl_module))
            trainer.should_stop = self._is_over()
        self._loss = None
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lrs[min(len(self.losses), len(self.lrs) - 1)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._loss = loss_in(outputs)

    def _take(self, loss: float) -> None:
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        # A mean of few values that starts at 0 is as much too small as their weights fall short of 1.
        self.losses.append(self._average / (1 - _SMOOTHING ** (len(self.losses) + 1)))

    def _is_over(self) -> bool:
        newest = self.losses[-1]
        has_diverged = not math.isfinite(newest) or newest > self._threshold * min(self.losses)
        return has_diverged or len(self.losses) >= len(self.lrs)

    def found(self) -> LearningRateFinder:
        return LearningRateFinder(lrs=self.lrs[: len(self.losses)], losses=self.losses)


def loss_in(outputs: Any) -> Tensor | None:
    """The loss in what `training_step` returned; of several outputs the first one's."""
    if isinstance(outputs, list):
        return next((loss for loss in map(loss_in, outputs) if loss is not None), None)
    if isinstance(outputs, dict):
        outputs = outputs.get("loss")
    elif not isinstance(outputs, torch.Tensor):
        outputs = getattr(outputs, "minimize", None)
    return outputs if isinstance(outputs, torch.Tensor) else None


def _mean_over_ranks(loss: Tensor | None, trainer: Any, module: Any) -> float:
    """Over the ranks that have one; nan where none has."""
    if loss is None:
        share = torch.zeros(2, device=module.device)
    else:
        share = torch.stack([loss.detach().float(), torch.ones_like(loss, dtype=torch.float32)])
    total, count = trainer.all_gather(share).reshape(-1, 2).sum(dim=0).tolist()
    return total / count if count else math.nan

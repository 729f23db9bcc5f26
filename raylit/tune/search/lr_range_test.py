"""The learning rate range test (Smith 2015), and its curve with the suggested rate."""

import math
import os
import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raylit.callbacks.base import Callback
from raylit.tune import figures

RangeMode = Literal["exponential", "linear"]

_SMOOTHING = 0.98


class RangeTest(Callback):
    """Sets the rate of every optimizer before each step, and collects the smoothed loss after it."""

    def __init__(
        self, *, min_lr: float, max_lr: float, num_steps: int, mode: RangeMode, early_stop_threshold: float | None
    ) -> None:
        spaced = np.geomspace if mode == "exponential" else np.linspace
        self.mode = mode
        self.lrs: list[float] = spaced(min_lr, max_lr, num_steps).tolist()
        self.losses: list[float] = []
        self._threshold = math.inf if early_stop_threshold is None else early_stop_threshold
        self._average = 0.0
        self._num_windows = 0
        self._window: list[Tensor] = []
        """The losses of this rank's batches since the last step; of some it may have no share."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Collective: unlike a batch's end, its start comes on every rank, also on one without a share of the batch."""
        if trainer.num_windows > self._num_windows:
            self._num_windows = trainer.num_windows
            self._take(_mean_over_ranks(self._window, trainer, pl_module))
            self._window = []
            trainer.should_stop = self._is_over()
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lrs[min(len(self.losses), len(self.lrs) - 1)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (loss := loss_in(outputs)) is not None:
            self._window.append(loss)

    def found(self) -> tuple[list[float], list[float]]:
        """The rates in rising order, and the smoothed loss at each."""
        return self.lrs[: len(self.losses)], self.losses

    def _take(self, loss: float) -> None:
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        # A mean of few values that starts at 0 is as much too small as their weights fall short of 1.
        self.losses.append(self._average / (1 - _SMOOTHING ** (len(self.losses) + 1)))

    def _is_over(self) -> bool:
        newest, least = self.losses[-1], min(self.losses)
        # For a positive loss: so many times its least. One that may be negative has no times.
        has_diverged = not math.isfinite(newest) or newest - least > (self._threshold - 1) * abs(least)
        return has_diverged or len(self.losses) >= len(self.lrs)


def loss_in(outputs: Any) -> Tensor | None:
    """The loss in what `training_step` returned; of several outputs the first one's."""
    if isinstance(outputs, list):
        return next((loss for loss in map(loss_in, outputs) if loss is not None), None)
    if isinstance(outputs, dict):
        outputs = outputs.get("loss")
    elif not isinstance(outputs, torch.Tensor):
        outputs = getattr(outputs, "minimize", None)
    return outputs if isinstance(outputs, torch.Tensor) else None


def _mean_over_ranks(losses: list[Tensor], trainer: Any, module: Any) -> float:
    """Of all ranks' losses; nan where none has any."""
    share = torch.zeros(2, device=module.device)
    if losses:
        kept = torch.stack([loss.detach().float() for loss in losses])
        share = torch.stack([kept.sum(), torch.full_like(kept[0], len(losses))])
    total, count = trainer.all_gather(share).reshape(-1, 2).sum(dim=0).tolist()
    return total / count if count else math.nan


_HIGH = 0.9
"""Of the way from the minimum to the usual level."""


class RangeCurve:
    """The rates of a range test and the loss at each."""

    rule = "where the smoothed loss falls most steeply, on the way from its usual level to its minimum"
    """What `suggestion()` goes by."""

    def __init__(self, *, lrs: list[float], losses: list[float], mode: str = "exponential") -> None:
        self.results: dict[str, Any] = {"lr": lrs, "loss": losses}
        """The rates in rising order, and the smoothed loss at each."""
        self._mode = mode

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

    def plot(
        self,
        suggest: bool = False,
        show: bool = False,
        ax: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """A matplotlib figure of the curve, saved under `path` if one is given; None where `ax` is given to draw on.
        `suggest` marks the suggestion."""
        figure, ax = figures.axes(ax, is_shown=show)
        ax.plot(self.results["lr"], self.results["loss"])
        scale = "log" if self._mode == "exponential" else "linear"
        ax.set(xscale=scale, xlabel="learning rate", ylabel="smoothed loss")
        if suggest and (rate := self.suggestion()) is not None:
            ax.plot(rate, self.results["loss"][self.results["lr"].index(rate)], "o", color="red", label=f"{rate:.3g}")
            ax.legend(title="suggestion")
        return figures.finish(figure, path=path, is_shown=show)

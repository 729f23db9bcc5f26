"""Learning rate range test (Smith 2015), and its curve with the suggested rate. Driver; RangeTest on workers."""

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
_FALL_START = 0.9
"""Fraction of the way from the minimum up to the usual level at which the fall starts."""


class RangeTest(Callback):
    """Callback that sets the rate of every optimizer before each step and collects the smoothed loss after it."""

    def __init__(
        self, *, min_lr: float, max_lr: float, num_steps: int, mode: RangeMode, early_stop_threshold: float | None
    ) -> None:
        make_space = np.geomspace if mode == "exponential" else np.linspace
        self.mode = mode
        self.lrs: list[float] = make_space(min_lr, max_lr, num_steps).tolist()
        self.losses: list[float] = []
        self._threshold = math.inf if early_stop_threshold is None else early_stop_threshold
        self._average = 0.0
        self._num_windows = 0
        self._window: list[Tensor] = []
        """Losses of this rank's batches since the last step; it may have no share of some batches."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Record the last step's loss and set the next rate. Collective.

        Unlike the end of a batch, its start is called on every rank, also on one without a share of the batch.
        """
        if trainer.num_windows > self._num_windows:
            self._num_windows = trainer.num_windows
            self._record_loss(_mean_over_ranks(self._window, trainer, pl_module))
            self._window = []
            trainer.should_stop = self._is_over()
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lrs[min(len(self.losses), len(self.lrs) - 1)]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (loss := find_loss(outputs)) is not None:
            self._window.append(loss)

    def collect(self) -> tuple[list[float], list[float]]:
        """Return the rates in rising order and the smoothed loss at each."""
        return self.lrs[: len(self.losses)], self.losses

    def _record_loss(self, loss: float) -> None:
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        # An average that starts at 0 is too small by as much as its weights sum up to less than 1.
        self.losses.append(self._average / (1 - _SMOOTHING ** (len(self.losses) + 1)))

    def _is_over(self) -> bool:
        newest, lowest = self.losses[-1], min(self.losses)
        # The threshold is a multiple of the minimum for a positive loss; a loss that may be negative has no multiples.
        has_diverged = not math.isfinite(newest) or newest - lowest > (self._threshold - 1) * abs(lowest)
        return has_diverged or len(self.losses) >= len(self.lrs)


class RangeCurve:
    """Result of a range test: the rates and the loss at each."""

    rule = "where the smoothed loss falls most steeply, on the way from its usual level to its minimum"
    """Rule of `suggestion()`, in words."""

    def __init__(self, *, lrs: list[float], losses: list[float], mode: str = "exponential") -> None:
        self.results: dict[str, Any] = {"lr": lrs, "loss": losses}
        """Columns: the rates in rising order, and the smoothed loss at each."""
        self._mode = mode

    def suggestion(self, skip_begin: int = 10, skip_end: int = 1) -> float | None:
        """Return the rate at which the loss falls most steeply; None, with a warning, if there are too few points.

        The beginning of the smoothed curve is the mean of few losses and jumps. Therefore only the fall counts, from
        the last point near the usual level down to the minimum.

        Args:
            skip_begin: number of points that are left out at the beginning.
            skip_end: number of points that are left out at the end.
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
        high = losses[lowest] + _FALL_START * (np.median(falling) - losses[lowest])
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
        """Plot the curve.

        Args:
            suggest: whether to mark the suggested rate.
            show: whether to show the figure.
            ax: matplotlib axes to draw on, instead of a new figure.
            path: where to save the figure.

        Returns:
            The matplotlib figure; None if `ax` is given.
        """
        figure, ax = figures.create_axes(ax, is_shown=show)
        ax.plot(self.results["lr"], self.results["loss"])
        scale = "log" if self._mode == "exponential" else "linear"
        ax.set(xscale=scale, xlabel="learning rate", ylabel="smoothed loss")
        if suggest and (rate := self.suggestion()) is not None:
            ax.plot(rate, self.results["loss"][self.results["lr"].index(rate)], "o", color="red", label=f"{rate:.3g}")
            ax.legend(title="suggestion")
        return figures.finish_figure(figure, path=path, is_shown=show)


def find_loss(outputs: Any) -> Tensor | None:
    """Return the loss among the outputs of `training_step`, the first one's of several; None if there is none."""
    if isinstance(outputs, list):
        return next((loss for loss in map(find_loss, outputs) if loss is not None), None)
    if isinstance(outputs, dict):
        outputs = outputs.get("loss")
    elif not isinstance(outputs, torch.Tensor):
        outputs = getattr(outputs, "minimize", None)
    return outputs if isinstance(outputs, torch.Tensor) else None


def _mean_over_ranks(losses: list[Tensor], trainer: Any, module: Any) -> float:
    """Return the mean of all ranks' losses; nan if no rank has any. Collective."""
    share = torch.zeros(2, device=module.device)
    if losses:
        own = torch.stack([loss.detach().float() for loss in losses])
        share = torch.stack([own.sum(), torch.full_like(own[0], len(losses))])
    total, count = trainer.all_gather(share).reshape(-1, 2).sum(dim=0).tolist()
    return total / count if count else math.nan

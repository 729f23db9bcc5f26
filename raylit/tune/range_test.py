"""RangeTest: raises the learning rate from step to step, and looks at the loss. Worker.

The test is that of Smith, "Cyclical Learning Rates for Training Neural Networks", 2015,
https://arxiv.org/abs/1506.01186, and "Super-Convergence", 2017, https://arxiv.org/abs/1708.07120. To smooth the curve
and to give up where it diverges are from fastai's `lr_find`.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from raylit.callbacks.base import Callback

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

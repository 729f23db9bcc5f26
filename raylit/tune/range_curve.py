"""RangeCurve: what a learning-rate range test has found. Driver.

The suggestion, the rate of the steepest descent, is that of fastai's `lr_find`; the test is cited in range_test.py.
"""

import os
import warnings
from typing import Any

import numpy as np

from raylit.tune import pictures

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
        figure, ax = pictures.axes(ax, is_shown=show)
        ax.plot(self.results["lr"], self.results["loss"])
        scale = "log" if self._mode == "exponential" else "linear"
        ax.set(xscale=scale, xlabel="learning rate", ylabel="smoothed loss")
        if suggest and (rate := self.suggestion()) is not None:
            ax.plot(rate, self.results["loss"][self.results["lr"].index(rate)], "o", color="red", label=f"{rate:.3g}")
            ax.legend(title="suggestion")
        return pictures.finish(figure, path=path, is_shown=show)

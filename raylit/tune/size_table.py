"""BatchSizes: what a search for the batch size has found. Driver."""

import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from raylit.arguments.searches import SizeMode
from raylit.tune import pictures
from raylit.tune.size_search import SizeTrial
from raylit.tune.windows import Windows


class BatchSizes:
    """The sizes that were tried, and the one that was chosen."""

    def __init__(self, trials: Sequence[SizeTrial], *, mode: SizeMode, windows: Windows, margin: float) -> None:
        """`margin`: of the largest size that fits, where a larger one did not."""
        self.trials = sorted(trials, key=lambda trial: trial.size)
        self.results: dict[str, list[Any]] = {
            "batch_size": [trial.size for trial in self.trials],
            "status": [trial.status for trial in self.trials],
            "samples_per_s": [trial.samples_per_s for trial in self.trials],
            "error": [trial.error for trial in self.trials],
        }
        """Ascending in the size per worker. The speed is that of all workers, 0 where the size does not fit."""
        self.effective_batch_size = windows.effective
        """Samples of an optimizer's step, over all workers; None: as many as the size makes them."""
        self._mode = mode
        self._windows = windows
        self._margin = margin if any(not trial.fits for trial in self.trials) else 0.0

    @property
    def rule(self) -> str:
        """What `suggestion()` goes by."""
        if self._mode == "throughput":
            text = "the most samples per second"
        else:
            text = "the largest that fits" + (f", less a margin of {self._margin:g}" if self._margin else "")
        if self.effective_batch_size is not None:
            text += f", of those that divide a step's {self.effective_batch_size} samples"
        return text

    def suggestion(self) -> int | None:
        """The size per worker; None where none fits."""
        fitting = [trial for trial in self.trials if trial.fits]
        if not fitting:
            return None
        if self._mode == "throughput":
            return max(fitting, key=lambda trial: trial.samples_per_s).size
        largest = fitting[-1].size
        sizes = self._windows.sizes
        return sizes[max(0, bisect_right(sizes, largest * (1 - self._margin)) - 1)]

    def plot(
        self,
        suggest: bool = False,
        show: bool = False,
        ax: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """A matplotlib figure of the speed of each size, with those that did not fit, saved under `path` if one is
        given; None where `ax` is given to draw on. `suggest` marks the chosen one."""
        figure, ax = pictures.axes(ax, is_shown=show)
        fitting = [trial for trial in self.trials if trial.fits]
        ax.plot([trial.size for trial in fitting], [trial.samples_per_s for trial in fitting], "o-")
        for trial in self.trials:
            if not trial.fits:
                ax.axvline(trial.size, color="red", linestyle=":", label=trial.status)
        if suggest and (size := self.suggestion()) is not None:
            ax.axvline(size, color="green", label=f"chosen: {size}")
        pictures.mark(ax.xaxis, [trial.size for trial in self.trials])
        ax.set(xlabel="batch size per worker", ylabel="samples per second")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
        return pictures.finish(figure, path=path, is_shown=show)

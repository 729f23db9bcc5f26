"""Search for a batch size: sizes to try, time of each, and the table of results. Driver; Stopwatch on workers."""

import itertools
import os
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Literal

from raylit.callbacks.base import Callback
from raylit.config import Plan
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError
from raylit.trainer.arguments.training import SizeMode
from raylit.tune import figures
from raylit.tune.search.trial import Outcome
from raylit.worker.data.batches import get_batch_size
from raylit.worker.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSizeChoices:
    """Batch sizes per worker that a search may try."""

    sizes: Sequence[int]
    """Allowed sizes, ascending."""
    world_size: int
    window: int
    """Batches per optimizer step of the Trainer, which stay where `effective` is None."""
    effective: int | None = None
    """Samples of an optimizer step over all workers; None: they follow from the size."""

    @classmethod
    def from_request(
        cls, requested: int | Literal["keep", "any"], job: Job, plan: Plan, *, size: Any, max_size: int
    ) -> "BatchSizeChoices":
        """Return the sizes that divide the requested samples of a step.

        `size` is the present batch size of the module.

        Raises:
            ConfigError: no size can make steps of the requested number of samples.
        """
        is_number = isinstance(requested, int) and not isinstance(requested, bool) and requested > 0
        if requested not in ("keep", "any") and not is_number:
            raise ConfigError(f"effective_batch_size={requested!r}: must be a number of samples, 'keep' or 'any'")
        if requested != "any" and not job.module.automatic_optimization:
            raise ConfigError(
                f"effective_batch_size={requested!r} with automatic_optimization = False: the module decides when to "
                "step, so give effective_batch_size='any'"
            )
        accumulation, world_size = plan.optimization.accumulation, plan.workers.world_size
        window = accumulation[0][1]
        if requested == "any":
            return cls(sizes=range(1, max_size + 1), world_size=world_size, window=window)
        if len(accumulation) > 1:
            raise ConfigError(
                f"effective_batch_size={requested!r} with an accumulation that changes from epoch to epoch: give one "
                "number as accumulate_grad_batches, or effective_batch_size='any'"
            )
        if requested == "keep" and not (isinstance(size, int) and size > 0):
            raise ConfigError(
                f"effective_batch_size='keep' of the batch size {size!r}: give the number of samples, or 'any'"
            )
        effective = window * size * world_size if requested == "keep" else requested
        assert isinstance(effective, int)
        share, rest = divmod(effective, world_size)
        if rest:
            raise ConfigError(
                f"effective_batch_size={effective} over {world_size} workers: must be a multiple of their number"
            )
        sizes = [size for size in range(1, min(share, max_size) + 1) if share % size == 0]
        return cls(sizes=sizes, world_size=world_size, window=window, effective=effective)

    @property
    def is_never_accumulating(self) -> bool:
        """Return whether a step follows each batch, whatever the size."""
        return (
            self.window == 1
            if self.effective is None
            else len(self.sizes) == 1 and self.count_batches_per_step(self.sizes[0]) == 1
        )

    def count_batches_per_step(self, size: int) -> int:
        """Return the number of batches of an optimizer step."""
        return self.window if self.effective is None else self.effective // (size * self.world_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Median times of a rank's batches of full size, data loading included."""

    num_samples: int
    batch_s: float
    """Seconds of a batch without an optimizer step."""
    step_batch_s: float
    """Seconds of a batch with an optimizer step."""

    def samples_per_s(self, window: int) -> float:
        """Return the samples per second of one rank with an optimizer step every `window` batches."""
        seconds = (window - 1) * self.batch_s + self.step_batch_s
        return window * self.num_samples / seconds if seconds > 0 else 0.0


class Stopwatch(Callback):
    """Callback that times batches for enough steps and seconds; the first step does not count."""

    def __init__(self, *, num_steps: int, min_s: float = 0.0) -> None:
        self._num_steps = max(2, num_steps)
        self._min_s = min_s
        self._last_batch_end_s = 0.0
        self._started_s = 0.0
        self._num_windows = 0
        self._times: list[tuple[int, float, bool]] = []
        """Samples and seconds of each batch, and whether it had a step."""

    def on_train_batch_start(
        self, trainer: TrainerView, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:  # the time between two epochs belongs to no batch
            self._last_batch_end_s = perf_counter()

    def on_train_batch_end(
        self, trainer: TrainerView, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.accelerator.synchronize()
        now_s = perf_counter()
        is_step = trainer.num_windows > self._num_windows
        if self._num_windows == 0:
            self._started_s = now_s  # memory is allocated and kernels are chosen until then
        else:
            self._times.append((get_batch_size(batch), now_s - self._last_batch_end_s, is_step))
        self._num_windows, self._last_batch_end_s = trainer.num_windows, now_s
        is_enough = self._num_windows >= self._num_steps and now_s - self._started_s >= self._min_s
        trainer.should_stop = trainer.should_stop or is_enough

    def collect(self) -> Timing:
        """Return the medians of this rank's batches."""
        num_samples = max((size for size, _, _ in self._times), default=0)
        full = [(seconds, is_step) for size, seconds, is_step in self._times if size == num_samples]
        with_step = [seconds for seconds, is_step in full if is_step]
        without = [seconds for seconds, is_step in full if not is_step]
        return Timing(
            num_samples=num_samples,
            batch_s=median(without or with_step or [0.0]),
            step_batch_s=median(with_step or without or [0.0]),
        )


_MIN_RELATIVE_SPEED = 0.9
"""Fraction of the best speed; sizes that are slower twice in a row end the search for larger ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeTrial:
    """Result of a trial with one batch size."""

    size: int
    status: Literal["fits", "too large", "crashed"]
    samples_per_s: float = 0.0
    """Samples per second over all workers, optimizer steps included; 0 if the size does not fit."""
    num_batches: float = 0
    """Batches of an epoch, per worker."""
    error: str = ""

    @property
    def fits(self) -> bool:
        """Return whether the size fits into memory."""
        return self.status == "fits"


SearchSteps = Generator[int, SizeTrial, None]
"""Generator that yields the next size and is sent the result of its trial."""


class SizeSearch:
    """Search that proposes batch sizes and keeps the trials' results."""

    num_at_once = 1

    def __init__(self, steps: SearchSteps, *, num_trials: int, choices: BatchSizeChoices) -> None:
        self.trials: list[SizeTrial] = []
        self.error: BaseException | None = None
        """Error of the last size that did not fit."""
        self._steps = steps
        self._next = next(steps, None)
        self._num_left = num_trials
        self._choices = choices

    def propose(self) -> int | None:
        return self._next if self._num_left > 0 else None

    def is_losing(self, value: int, step: int, loss: float) -> bool:
        return False

    def receive(self, value: int, outcome: Outcome) -> None:
        self._num_left -= 1
        if outcome.error is not None:
            self.error = outcome.error
            assert outcome.failure is not None
            trial = SizeTrial(size=value, status=outcome.failure, error=str(outcome.error).partition("\n")[0])
        else:
            per_rank = outcome.findings.samples_per_s(self._choices.count_batches_per_step(value))
            trial = SizeTrial(
                size=value,
                status="fits",
                samples_per_s=per_rank * self._choices.world_size,
                num_batches=outcome.num_batches,
            )
        self.trials.append(trial)
        try:
            self._next = self._steps.send(trial)
        except StopIteration:
            self._next = None


def search_steps(mode: SizeMode, sizes: Sequence[int], *, first: int) -> SearchSteps:
    """Return the steps of a search; `sizes` are the allowed ones, ascending."""
    functions: dict[SizeMode, Any] = {
        "power": _search_power,
        "binsearch": _search_binary,
        "throughput": _search_throughput,
    }
    steps: SearchSteps = functions[mode](sizes, first)
    return steps


def _search_power(sizes: Sequence[int], first: int) -> SearchSteps:
    yield from _double_sizes(sizes, first)


def _search_binary(sizes: Sequence[int], first: int) -> SearchSteps:
    good, bad = yield from _double_sizes(sizes, first)
    while bad - good > 1:
        middle = (good + bad) // 2
        trial = yield sizes[middle]
        if trial.fits:
            good = middle
        else:
            bad = middle


def _search_throughput(sizes: Sequence[int], first: int) -> SearchSteps:
    """Double the size as long as that is faster, then try the sizes next to the fastest."""
    trials: list[SizeTrial] = []
    doubling = _double_sizes(sizes, first)
    size = next(doubling, None)
    while size is not None and not _is_falling(trials):
        trials.append((yield size))
        try:
            size = doubling.send(trials[-1])
        except StopIteration:
            size = None
    known = sorted(trials, key=lambda trial: trial.size)
    best = max(range(len(known)), key=lambda index: known[index].samples_per_s, default=0)
    for left, right in itertools.pairwise(known[max(0, best - 1) : best + 2]):
        middle = sizes[bisect_left(sizes, (left.size + right.size) // 2)]
        if left.size < middle < right.size:
            yield middle


def _double_sizes(sizes: Sequence[int], first: int) -> Generator[int, SizeTrial, tuple[int, int]]:
    """Double from the first size until one does not fit, or halve until one fits.

    Returns the index of the largest size that fits, else -1, and that of the next one that does not; the two are
    neighbours if the whole data is one batch.
    """
    good, bad = -1, len(sizes)
    index = min(bisect_left(sizes, first), len(sizes) - 1)
    while good < index < bad:
        trial = yield sizes[index]
        if not trial.fits:
            bad = index
            index = bisect_right(sizes, sizes[index] // 2) - 1
        elif trial.num_batches <= 1:
            return index, index + 1
        else:
            good = index
            index = min(bisect_left(sizes, 2 * sizes[index]), len(sizes) - 1)
    # No size above the last one is known to fail.
    return good, bad


def _is_falling(trials: list[SizeTrial]) -> bool:
    best = max((trial.samples_per_s for trial in trials), default=0.0)
    return len(trials) >= 3 and all(
        trial.fits and trial.samples_per_s < _MIN_RELATIVE_SPEED * best for trial in trials[-2:]
    )


class BatchSizes:
    """Result of a batch size search: its trials and the suggested size."""

    def __init__(
        self, trials: Sequence[SizeTrial], *, mode: SizeMode, choices: BatchSizeChoices, margin: float
    ) -> None:
        """Store the trials; `margin` is a fraction of the largest size that fits, used if a larger one did not fit."""
        self.trials = sorted(trials, key=lambda trial: trial.size)
        self.results: dict[str, list[Any]] = {
            "batch_size": [trial.size for trial in self.trials],
            "status": [trial.status for trial in self.trials],
            "samples_per_s": [trial.samples_per_s for trial in self.trials],
            "error": [trial.error for trial in self.trials],
        }
        """Columns of the trials, ascending in the size per worker.

        The speed is that of all workers, 0 if the size does not fit.
        """
        self.effective_batch_size = choices.effective
        """Samples of an optimizer step over all workers; None: they follow from the size."""
        self._mode = mode
        self._choices = choices
        self._margin = margin if any(not trial.fits for trial in self.trials) else 0.0

    @property
    def rule(self) -> str:
        """Return in words how `suggestion()` chooses."""
        if self._mode == "throughput":
            text = "the most samples per second"
        else:
            text = "the largest that fits" + (f", less a margin of {self._margin:g}" if self._margin else "")
        if self.effective_batch_size is not None:
            text += f", of those that divide a step's {self.effective_batch_size} samples"
        return text

    def suggestion(self) -> int | None:
        """Return the suggested size per worker; None if no size fits."""
        fitting = [trial for trial in self.trials if trial.fits]
        if not fitting:
            return None
        if self._mode == "throughput":
            return max(fitting, key=lambda trial: trial.samples_per_s).size
        largest = fitting[-1].size
        sizes = self._choices.sizes
        return sizes[max(0, bisect_right(sizes, largest * (1 - self._margin)) - 1)]

    def plot(
        self,
        suggest: bool = False,
        show: bool = False,
        ax: Any = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> Any:
        """Plot the speed of each size, and mark those that did not fit.

        Args:
            suggest: whether to mark the suggested size.
            show: whether to show the figure.
            ax: matplotlib axes to draw on, instead of a new figure.
            path: where to save the figure.

        Returns:
            The matplotlib figure; None if `ax` is given.
        """
        figure, ax = figures.create_axes(ax, is_shown=show)
        fitting = [trial for trial in self.trials if trial.fits]
        ax.plot([trial.size for trial in fitting], [trial.samples_per_s for trial in fitting], "o-")
        for trial in self.trials:
            if not trial.fits:
                ax.axvline(trial.size, color="red", linestyle=":", label=trial.status)
        if suggest and (size := self.suggestion()) is not None:
            ax.axvline(size, color="green", label=f"chosen: {size}")
        figures.set_log_ticks(ax.xaxis, [trial.size for trial in self.trials])
        ax.set(xlabel="batch size per worker", ylabel="samples per second")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
        return figures.finish_figure(figure, path=path, is_shown=show)

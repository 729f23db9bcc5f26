"""The search for a batch size: sizes to try, time of each, and the table of results."""

import itertools
import os
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any, Literal

from raylit.callbacks.base import Callback
from raylit.config.plan import Plan
from raylit.errors import ConfigError
from raylit.trainer.arguments.training import SizeMode
from raylit.tune import figures
from raylit.tune.search.trial import Outcome
from raylit.worker.data.batches import batch_size_of
from raylit.worker.job import Job


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSizeChoices:
    """Per worker, for a search."""

    sizes: Sequence[int]
    """Those that are allowed, ascending."""
    world_size: int
    window: int
    """Of the Trainer; where steps have no size of their own, that stays."""
    effective: int | None = None
    """Samples of an optimizer's step, over all workers; None: as many as the size makes them."""

    @classmethod
    def of(
        cls, wanted: int | Literal["keep", "any"], job: Job, plan: Plan, *, size: Any, max_size: int
    ) -> "BatchSizeChoices":
        """ConfigError: no size can make steps of what is wanted. `size` is what the module has now."""
        is_number = isinstance(wanted, int) and not isinstance(wanted, bool) and wanted > 0
        if wanted not in ("keep", "any") and not is_number:
            raise ConfigError(f"effective_batch_size={wanted!r}: must be a number of samples, 'keep' or 'any'")
        if wanted != "any" and not job.module.automatic_optimization:
            raise ConfigError(
                f"effective_batch_size={wanted!r} with automatic_optimization = False: the module decides when to "
                "step, so give effective_batch_size='any'"
            )
        accumulation, world_size = plan.optimization.accumulation, plan.workers.world_size
        window = accumulation[0][1]
        if wanted == "any":
            return cls(sizes=range(1, max_size + 1), world_size=world_size, window=window)
        if len(accumulation) > 1:
            raise ConfigError(
                f"effective_batch_size={wanted!r} with an accumulation that changes from epoch to epoch: give one "
                "number as accumulate_grad_batches, or effective_batch_size='any'"
            )
        if wanted == "keep" and not (isinstance(size, int) and size > 0):
            raise ConfigError(
                f"effective_batch_size='keep' of the batch size {size!r}: give the number of samples, or 'any'"
            )
        effective = window * size * world_size if wanted == "keep" else wanted
        assert isinstance(effective, int)
        share, rest = divmod(effective, world_size)
        if rest:
            raise ConfigError(
                f"effective_batch_size={effective} over {world_size} workers: must be a multiple of their number"
            )
        sizes = [size for size in range(1, min(share, max_size) + 1) if share % size == 0]
        return cls(sizes=sizes, world_size=world_size, window=window, effective=effective)

    @property
    def is_always_one(self) -> bool:
        """A step follows each batch, whatever the size."""
        return self.window == 1 if self.effective is None else len(self.sizes) == 1 and self.of_size(self.sizes[0]) == 1

    def of_size(self, size: int) -> int:
        """Batches of an optimizer's step."""
        return self.window if self.effective is None else self.effective // (size * self.world_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Medians of a rank's batches of full size, data loading included."""

    num_samples: int
    batch_s: float
    """Without an optimizer's step."""
    step_batch_s: float
    """With one."""

    def samples_per_s(self, window: int) -> float:
        """Where the optimizer steps once in `window` batches."""
        seconds = (window - 1) * self.batch_s + self.step_batch_s
        return window * self.num_samples / seconds if seconds > 0 else 0.0


class Stopwatch(Callback):
    """Times batches until there are enough steps and it has taken long enough; the first step does not count."""

    def __init__(self, *, num_steps: int, least_s: float = 0.0) -> None:
        self._num_steps = max(2, num_steps)
        self._least_s = least_s
        self._since_s = 0.0
        self._started_s = 0.0
        self._num_windows = 0
        self._times: list[tuple[int, float, bool]] = []
        """Samples, seconds, and whether there was a step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:  # what lies between two epochs belongs to no batch
            self._since_s = perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.accelerator.synchronize()
        now_s = perf_counter()
        is_step = trainer.num_windows > self._num_windows
        if self._num_windows == 0:
            self._started_s = now_s  # until then memory is allocated, kernels are chosen
        else:
            self._times.append((batch_size_of(batch), now_s - self._since_s, is_step))
        self._num_windows, self._since_s = trainer.num_windows, now_s
        is_enough = self._num_windows >= self._num_steps and now_s - self._started_s >= self._least_s
        trainer.should_stop = trainer.should_stop or is_enough

    def found(self) -> Timing:
        num_samples = max((size for size, _, _ in self._times), default=0)
        full = [(seconds, is_step) for size, seconds, is_step in self._times if size == num_samples]
        with_step = [seconds for seconds, is_step in full if is_step]
        without = [seconds for seconds, is_step in full if not is_step]
        return Timing(
            num_samples=num_samples,
            batch_s=median(without or with_step or [0.0]),
            step_batch_s=median(with_step or without or [0.0]),
        )


_SLOWER = 0.9
"""Of the best speed: below it, twice in a row, larger sizes are not tried."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SizeTrial:
    """What came of a size."""

    size: int
    status: Literal["fits", "too large", "crashed"]
    samples_per_s: float = 0.0
    """Over all workers, with the optimizer's steps that the samples make due; 0 where it does not fit."""
    num_batches: float = 0
    """Of an epoch, per worker."""
    error: str = ""

    @property
    def fits(self) -> bool:
        return self.status == "fits"


SearchSteps = Generator[int, SizeTrial, None]
"""Yields the next size, is sent what came of it."""


class SizeSearch:
    """Proposes sizes; the trials so far."""

    num_at_once = 1

    def __init__(self, course: SearchSteps, *, num_trials: int, windows: BatchSizeChoices) -> None:
        self.trials: list[SizeTrial] = []
        self.error: BaseException | None = None
        """Of the last size that did not fit."""
        self._course = course
        self._next = next(course, None)
        self._num_left = num_trials
        self._windows = windows

    def propose(self) -> int | None:
        return self._next if self._num_left > 0 else None

    def is_losing(self, value: int, step: int, loss: float) -> bool:
        return False

    def receive(self, value: int, outcome: Outcome) -> None:
        self._num_left -= 1
        if outcome.error is not None:
            self.error = outcome.error
            assert outcome.verdict is not None
            trial = SizeTrial(size=value, status=outcome.verdict, error=str(outcome.error).partition("\n")[0])
        else:
            per_rank = outcome.findings.samples_per_s(self._windows.of_size(value))
            trial = SizeTrial(
                size=value,
                status="fits",
                samples_per_s=per_rank * self._windows.world_size,
                num_batches=outcome.num_batches,
            )
        self.trials.append(trial)
        try:
            self._next = self._course.send(trial)
        except StopIteration:
            self._next = None


def search_steps(mode: SizeMode, sizes: Sequence[int], *, first: int) -> SearchSteps:
    """`sizes` are those that are allowed, ascending."""
    courses: dict[SizeMode, Any] = {"power": _power, "binsearch": _binsearch, "throughput": _throughput}
    course: SearchSteps = courses[mode](sizes, first)
    return course


def _power(sizes: Sequence[int], first: int) -> SearchSteps:
    yield from _doubling(sizes, first)


def _binsearch(sizes: Sequence[int], first: int) -> SearchSteps:
    good, bad = yield from _doubling(sizes, first)
    while bad - good > 1:
        middle = (good + bad) // 2
        tried = yield sizes[middle]
        if tried.fits:
            good = middle
        else:
            bad = middle


def _throughput(sizes: Sequence[int], first: int) -> SearchSteps:
    """Doubled for as long as that is faster, then what lies beside the fastest."""
    trials: list[SizeTrial] = []
    doubling = _doubling(sizes, first)
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


def _doubling(sizes: Sequence[int], first: int) -> Generator[int, SizeTrial, tuple[int, int]]:
    """From the first size on doubled until one does not fit, or halved until one does. Returns the places of the
    largest that fits, else -1, and the next that does not; neighbours where the whole data are one batch."""
    good, bad = -1, len(sizes)
    place = min(bisect_left(sizes, first), len(sizes) - 1)
    while good < place < bad:
        tried = yield sizes[place]
        if not tried.fits:
            bad = place
            place = bisect_right(sizes, sizes[place] // 2) - 1
        elif tried.num_batches <= 1:
            return place, place + 1
        else:
            good = place
            place = min(bisect_left(sizes, 2 * sizes[place]), len(sizes) - 1)
    # Beyond the last size nothing is known to fail.
    return good, bad


def _is_falling(trials: list[SizeTrial]) -> bool:
    best = max((trial.samples_per_s for trial in trials), default=0.0)
    return len(trials) >= 3 and all(trial.fits and trial.samples_per_s < _SLOWER * best for trial in trials[-2:])


class BatchSizes:
    """The sizes that were tried, and the one that was chosen."""

    def __init__(
        self, trials: Sequence[SizeTrial], *, mode: SizeMode, windows: BatchSizeChoices, margin: float
    ) -> None:
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
        figure, ax = figures.axes(ax, is_shown=show)
        fitting = [trial for trial in self.trials if trial.fits]
        ax.plot([trial.size for trial in fitting], [trial.samples_per_s for trial in fitting], "o-")
        for trial in self.trials:
            if not trial.fits:
                ax.axvline(trial.size, color="red", linestyle=":", label=trial.status)
        if suggest and (size := self.suggestion()) is not None:
            ax.axvline(size, color="green", label=f"chosen: {size}")
        figures.mark(ax.xaxis, [trial.size for trial in self.trials])
        ax.set(xlabel="batch size per worker", ylabel="samples per second")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
        return figures.finish(figure, path=path, is_shown=show)

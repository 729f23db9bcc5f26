"""SizeSearch: which batch size to try next, from the outcomes of those before. Driver; knows nothing of who tries."""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylit.arguments.searches import SizeMode
from raylit.tune.attempt import Outcome
from raylit.tune.windows import Windows

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


Course = Generator[int, SizeTrial, None]
"""Yields the next size, is sent what came of it."""


class SizeSearch:
    """Proposes sizes; the trials so far."""

    num_at_once = 1

    def __init__(self, course: Course, *, num_trials: int, windows: Windows) -> None:
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


def course_of(mode: SizeMode, sizes: Sequence[int], *, first: int) -> Course:
    """`sizes` are those that are allowed, ascending."""
    courses: dict[SizeMode, Any] = {"power": _power, "binsearch": _binsearch, "throughput": _throughput}
    course: Course = courses[mode](sizes, first)
    return course


def _power(sizes: Sequence[int], first: int) -> Course:
    yield from _doubling(sizes, first)


def _binsearch(sizes: Sequence[int], first: int) -> Course:
    good, bad = yield from _doubling(sizes, first)
    while bad - good > 1:
        middle = (good + bad) // 2
        tried = yield sizes[middle]
        if tried.fits:
            good = middle
        else:
            bad = middle


def _throughput(sizes: Sequence[int], first: int) -> Course:
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

"""Quality: where the best that a trial has reached stands among the others. Driver."""

import math
import statistics
from collections.abc import Sequence

from raylit.tune.parameters import shown
from raylit.tune.records import Mode, TrialRecord, is_better

_OUTLYING = 4.0
"""So many times as far from the best as the median: off the scale."""
_LOG_RATIO = 100.0


class Quality:
    """A scale from 1, the best trial, to 0, the worst that is no outlier: a few that have diverged would leave all the
    others at the same place."""

    def __init__(self, trials: Sequence[TrialRecord], *, metric: str, mode: Mode) -> None:
        self._metric = metric
        self._mode: Mode = mode
        values = [value for trial in trials if (value := trial.best(metric, mode)) is not None] or [0.0]
        best = min(values) if mode == "min" else max(values)
        limit = best + _OUTLYING * (statistics.median(values) - best)
        within = [value for value in values if not is_better(limit, value, mode)]
        worst = max(within) if mode == "min" else min(within)
        self._best, self._worst = best, worst
        self._has_outliers = len(within) < len(values)
        low, high = sorted((best, worst))
        self.is_log = low > 0 and high / low > _LOG_RATIO

    def of(self, trial: TrialRecord) -> float | None:
        """None: it has reported no number."""
        value = trial.best(self._metric, self._mode)
        return None if value is None else self._place(value)

    def is_on_scale(self, trial: TrialRecord) -> bool:
        value = trial.best(self._metric, self._mode)
        return value is not None and not is_better(self._worst, value, self._mode)

    def worst_first(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """The order to draw in; those without a number come first."""
        values = {id(trial): trial.best(self._metric, self._mode) for trial in trials}
        sign = 1 if self._mode == "max" else -1

        def key(trial: TrialRecord) -> float:
            value = values[id(trial)]
            return -math.inf if value is None else sign * value

        return sorted(trials, key=key)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and round numbers; the lowest may stand for all that is worse."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        low, high = sorted((self._best, self._worst))
        found = (LogLocator() if self.is_log else MaxNLocator(6)).tick_values(low, high)
        ticks = [(self._place(value), shown(value)) for value in map(float, found) if low <= value <= high]
        if self._has_outliers:
            sign = "\N{GREATER-THAN OR EQUAL TO}" if self._mode == "min" else "\N{LESS-THAN OR EQUAL TO}"
            ticks = [tick for tick in ticks if tick[0] > 0.05] + [(0.0, f"{sign} {self._worst:.3g}")]
        return ticks or [(1.0, shown(self._best))]

    def _place(self, value: float) -> float:
        if self._best == self._worst:
            return 1.0 if value == self._best else 0.0
        if self.is_log:
            place = math.log(value / self._worst) / math.log(self._best / self._worst)
        else:
            place = (value - self._worst) / (self._best - self._worst)
        return min(max(place, 0.0), 1.0)

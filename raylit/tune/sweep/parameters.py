"""Parameters of a sweep: the search space in plain values, and the trials' values in tables and figures. Driver."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylit.core.hparams import flatten
from raylit.errors import ConfigError
from raylit.tune.records import Mode, TrialRecord, is_better, is_number

_MAX_LEVELS = 5
"""Maximum number of distinct numbers that are shown at equal distances, like words: 16, 32, 64."""
_LOG_RATIO = 50.0
_SCALES: tuple[Literal["linear", "log"], ...] = ("linear", "log")
_OUTLIER_RATIO = 4.0
"""Multiple of the median's distance from the best value; values farther away are off the scale."""
_QUALITY_LOG_RATIO = 100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """Parameter of a sweep's trials, with the axis that shows it."""

    name: str
    """Name; names of nested configs are joined by "/"."""
    values: tuple[Any, ...]
    """Value of each trial; None: its config has no such entry, or None itself."""
    scale: Literal["linear", "log", "levels"]
    levels: tuple[str, ...] = ()
    """Texts of the levels, from the bottom up."""
    low: float = 0.0
    high: float = 0.0
    """The smallest and the largest number."""

    def locate(self, value: Any) -> float:
        """Return the height of a value on the axis, from 0, the bottom, to 1."""
        if self.scale == "levels":
            return (self.levels.index(format_value(value)) + 0.5) / len(self.levels)
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def list_varying_parameters(trials: Sequence[TrialRecord]) -> list[Parameter]:
    """Return the parameters that differ between trials, in the order of the configs."""
    configs = [dict(flatten(trial.config)) for trial in trials]
    names = dict.fromkeys(name for config in configs for name in config)
    columns = [(name, tuple(config.get(name) for config in configs)) for name in names]
    return [_build_parameter(name, values) for name, values in columns if len(set(map(format_value, values))) > 1]


def find_common_values(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """Return the values that all trials have in common, by name."""
    configs = [dict(flatten(trial.config)) for trial in trials]
    first = configs[0] if configs else {}
    is_common = {
        name: all(format_value(config.get(name)) == format_value(value) for config in configs)
        for name, value in first.items()
    }
    return {name: value for name, value in first.items() if is_common[name]}


class Quality:
    """Scale of results from 1, the best trial, to 0, the worst that is no outlier.

    Without the outliers, a few diverged trials would leave all others at the same place.
    """

    def __init__(self, trials: Sequence[TrialRecord], *, metric: str, mode: Mode) -> None:
        self._metric = metric
        self._mode: Mode = mode
        values = [value for trial in trials if (value := trial.best(metric, mode)) is not None] or [0.0]
        best = min(values) if mode == "min" else max(values)
        limit = best + _OUTLIER_RATIO * (statistics.median(values) - best)
        within = [value for value in values if not is_better(limit, value, mode)]
        worst = max(within) if mode == "min" else min(within)
        self._best, self._worst = best, worst
        self._has_outliers = len(within) < len(values)
        low, high = sorted((best, worst))
        self.is_log = low > 0 and high / low > _QUALITY_LOG_RATIO

    def rate(self, trial: TrialRecord) -> float | None:
        """Return the trial's place on the scale; None if it has reported no number."""
        value = trial.best(self._metric, self._mode)
        return None if value is None else self._locate(value)

    def is_on_scale(self, trial: TrialRecord) -> bool:
        """Return whether the trial has a number that is no outlier."""
        value = trial.best(self._metric, self._mode)
        return value is not None and not is_better(self._worst, value, self._mode)

    def sort_worst_first(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Return the trials in the order of drawing, the best last; those without a number come first."""
        values = {id(trial): trial.best(self._metric, self._mode) for trial in trials}
        sign = 1 if self._mode == "max" else -1

        def key(trial: TrialRecord) -> float:
            value = values[id(trial)]
            return -math.inf if value is None else sign * value

        return sorted(trials, key=key)

    def list_ticks(self) -> list[tuple[float, str]]:
        """Return heights with round numbers as labels; the lowest may stand for everything that is worse."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        low, high = sorted((self._best, self._worst))
        candidates = (LogLocator() if self.is_log else MaxNLocator(6)).tick_values(low, high)
        ticks = [(self._locate(value), format_value(value)) for value in map(float, candidates) if low <= value <= high]
        if self._has_outliers:
            sign = "\N{GREATER-THAN OR EQUAL TO}" if self._mode == "min" else "\N{LESS-THAN OR EQUAL TO}"
            ticks = [tick for tick in ticks if tick[0] > 0.05] + [(0.0, f"{sign} {self._worst:.3g}")]
        return ticks or [(1.0, format_value(self._best))]

    def _locate(self, value: float) -> float:
        if self._best == self._worst:
            return 1.0 if value == self._best else 0.0
        if self.is_log:
            height = math.log(value / self._worst) / math.log(self._best / self._worst)
        else:
            height = (value - self._worst) / (self._best - self._worst)
        return min(max(height, 0.0), 1.0)


def format_value(value: Any) -> str:
    """Return the value as text, in at most 24 characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value.__name__ if isinstance(value, type) else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def _build_parameter(name: str, values: tuple[Any, ...]) -> Parameter:
    """Choose the scale for a parameter's values: levels for texts and few numbers, else linear or logarithmic."""
    numbers = sorted(value for value in values if is_number(value))
    distinct = sorted(set(numbers))
    is_few = len(distinct) <= min(_MAX_LEVELS, len(values) // 2)
    if len(numbers) < len(values) or is_few:
        others = dict.fromkeys(format_value(value) for value in values if not is_number(value))
        levels = (*sorted(others, reverse=True), *dict.fromkeys(map(format_value, distinct)))
        return Parameter(name=name, values=values, scale="levels", levels=levels)
    low, high = numbers[0], numbers[-1]
    linear, logarithmic = (Parameter(name=name, values=values, scale=it, low=low, high=high) for it in _SCALES)
    if low <= 0 or high / low < _LOG_RATIO:
        return linear
    # Choose the scale on which the values are spread more evenly, as the space has drawn them.
    middle = numbers[len(numbers) // 2]
    return min(linear, logarithmic, key=lambda parameter: abs(parameter.locate(middle) - 0.5))


_TAKING_A_LIST = ("choice", "grid_search")
"""Functions of ray.tune whose only argument is a list."""
_FUNCTIONS = (
    *_TAKING_A_LIST, "uniform", "loguniform", "quniform", "qloguniform",
    "randint", "lograndint", "qrandint", "qlograndint", "randn", "qrandn",
)  # fmt: skip
"""Functions of ray.tune by which a space in plain values is written."""


def parse_space(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return Ray Tune's search space for one in plain values, such as `{"lr": {"loguniform": [1e-4, 1e-1]}}`.

    Raises:
        ConfigError: If Ray Tune has no such function, or its arguments are wrong.
    """
    # Importing Ray Tune takes seconds, which only a sweep needs.
    from ray import tune

    domains = {}
    for name, domain in space.items():
        function, arguments = next(iter(domain.items())) if isinstance(domain, dict) and len(domain) == 1 else ("", [])
        if function not in _FUNCTIONS or not isinstance(arguments, list):
            raise ConfigError(
                f"space: {name}: {domain!r} is no function of ray.tune with a list of arguments, such as "
                f"{{loguniform: [0.0001, 0.1]}} or {{choice: [16, 32]}}. There are {', '.join(_FUNCTIONS)}"
            )
        if function in _TAKING_A_LIST and not arguments:
            raise ConfigError(f"space: {name}: {function} of an empty list")
        try:
            build = getattr(tune, function)
            domains[name] = build(arguments) if function in _TAKING_A_LIST else build(*arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"space: {name}: {function} with {arguments}: {error}") from error
    return domains


def sample_space(space: Mapping[str, Any]) -> dict[str, Any]:
    """Return one value of each parameter of a space that `parse_space` has returned."""
    return {
        name: domain["grid_search"][0] if isinstance(domain, dict) else domain.sample()
        for name, domain in space.items()
    }

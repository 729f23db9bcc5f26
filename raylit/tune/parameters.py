"""Parameter: what differs between the configs of trials, and on which scale that is seen best. Driver."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raylit.hparams import flattened
from raylit.tune.records import TrialRecord, is_number

_MAX_LEVELS = 5
"""So few numbers, tried again and again, stand side by side like words: 16, 32, 64."""
_LOG_RATIO = 50.0

_SCALES: tuple[Literal["linear", "log"], ...] = ("linear", "log")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    name: str
    """Of nested configs joined by "/"."""
    values: tuple[Any, ...]
    """Of each trial; None: its config has no such entry, or None itself."""
    scale: Literal["linear", "log", "levels"]
    levels: tuple[str, ...] = ()
    """What stands side by side, from the bottom up."""
    low: float = 0.0
    high: float = 0.0
    """The least and the greatest number."""

    def place(self, value: Any) -> float:
        """From 0, the bottom, to 1."""
        if self.scale == "levels":
            return (self.levels.index(shown(value)) + 0.5) / len(self.levels)
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def varying(trials: Sequence[TrialRecord]) -> list[Parameter]:
    """In the order of the configs; what is the same in all trials is left out."""
    configs = [dict(flattened(trial.config)) for trial in trials]
    names = dict.fromkeys(name for config in configs for name in config)
    columns = [(name, tuple(config.get(name) for config in configs)) for name in names]
    return [_parameter(name, values) for name, values in columns if len(set(map(shown, values))) > 1]


def constant(trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """What all trials have in common."""
    configs = [dict(flattened(trial.config)) for trial in trials]
    first = configs[0] if configs else {}
    is_common = {
        name: all(shown(config.get(name)) == shown(value) for config in configs) for name, value in first.items()
    }
    return {name: value for name, value in first.items() if is_common[name]}


def shown(value: Any) -> str:
    """In a few characters."""
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value.__name__ if isinstance(value, type) else str(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def _parameter(name: str, values: tuple[Any, ...]) -> Parameter:
    numbers = sorted(value for value in values if is_number(value))
    distinct = sorted(set(numbers))
    is_few = len(distinct) <= min(_MAX_LEVELS, len(values) // 2)
    if len(numbers) < len(values) or is_few:
        others = dict.fromkeys(shown(value) for value in values if not is_number(value))
        levels = (*sorted(others, reverse=True), *dict.fromkeys(map(shown, distinct)))
        return Parameter(name=name, values=values, scale="levels", levels=levels)
    low, high = numbers[0], numbers[-1]
    straight, bent = (Parameter(name=name, values=values, scale=it, low=low, high=high) for it in _SCALES)
    if low <= 0 or high / low < _LOG_RATIO:
        return straight
    # The scale on which they are spread more evenly, as the space has drawn them.
    middle = numbers[len(numbers) // 2]
    return min(straight, bent, key=lambda parameter: abs(parameter.place(middle) - 0.5))

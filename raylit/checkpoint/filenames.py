"""Names of checkpoint files, and which of them are kept."""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from typing_extensions import Self

from raylit.checkpoint import files
from raylit.errors import ConfigError
from raylit.protocol.state import RunState
from raylit.storage import check_stays_below, join

_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilenamePattern:
    """What the files of a directory are called."""

    directory: str
    pattern: str
    equals: str | None
    """As `fill` has it."""
    join_char: str
    extension: str

    @classmethod
    def from_options(cls, callback: Any, filename: str | None = None, *, directory: str = "") -> Self:
        """A ModelCheckpoint's; in `directory` where it has none of its own yet."""
        return cls(
            directory=callback.dirpath or directory,
            pattern=filename or callback.filename or f"{{epoch}}{callback.CHECKPOINT_JOIN_CHAR}{{step}}",
            equals=callback.CHECKPOINT_EQUALS_CHAR if callback.auto_insert_metric_name else None,
            join_char=callback.CHECKPOINT_JOIN_CHAR,
            extension=callback.FILE_EXTENSION,
        )

    @property
    def is_of_step(self) -> bool:
        """Another step is another file."""
        return "{step" in self.pattern

    def path(self, metrics: Mapping[str, Any], version: int | None = None, prefix: str | None = None) -> str:
        """A metric that is missing counts as 0. ConfigError: an unfit spec, or a name that leads out."""
        parts = [prefix, fill(self.pattern, metrics, equals=self.equals), None if version is None else f"v{version}"]
        name = self.join_char.join(part for part in parts if part is not None) + self.extension
        check_stays_below(name, f"the checkpoint's file name {name!r}, of the pattern {self.pattern!r},")
        return join(self.directory, name)


def first_free(
    path_of: Callable[[int | None], str],
    first_version: int | None,
    *,
    reusable: str = "",
    is_taken: Callable[[str], bool] = lambda path: False,
) -> str:
    """Of the paths without and with a version, the first that no file has and that is not taken otherwise; `reusable`
    may be overwritten. Without a `first_version` files are overwritten."""
    path = path_of(None)
    for version in () if first_version is None else itertools.count(first_version):
        if path == reusable or not (is_taken(path) or files.exists(path)):
            break
        path = path_of(version)
    return path


def fill(pattern: str, metrics: Mapping[str, Any], *, equals: str | None) -> str:
    """The pattern with each `{name}` or `{name:spec}` filled in, 0 where there is no such metric.

    With `equals` ("=") the metric's name comes first: `{epoch:02}` becomes `epoch=07`. ConfigError: an unfit spec.
    """

    def filled(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        try:
            value = format(metrics.get(name, 0), spec)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the checkpoint's file name {pattern!r}: {match[0]} does not fit: {error}") from error
        return value if equals is None else f"{name}{equals}{value}"

    return _FIELD.sub(filled, pattern)


def fields(state: RunState) -> dict[str, float]:
    """What a file name or `monitor` may refer to; a logged `epoch` or `step` wins over the run's."""
    metrics = dict(state.callback_metrics)
    metrics["epoch"] = int(metrics.get("epoch", state.progress.epoch))
    metrics["step"] = int(metrics.get("step", state.progress.global_step))
    return metrics


class TopK:
    """At most `count` paths (-1: any number) with their scores; the earlier one wins a tie. Touches no file."""

    def __init__(self, *, count: int, mode: Literal["min", "max"]) -> None:
        self.scores: dict[str, float] = {}
        self.worst_score = math.inf if mode == "min" else -math.inf
        self._capacity = math.inf if count == -1 else count
        self._sign = 1 if mode == "min" else -1

    @property
    def best(self) -> str:
        """Empty where there is none."""
        return min(self.scores, key=self._rank, default="")

    @property
    def next_out(self) -> str:
        """The worst, which the next one to come in replaces; empty while there is room."""
        return "" if len(self.scores) < self._capacity else max(self.scores, key=self._rank, default="")

    def admits(self, score: float) -> bool:
        """Fewer files than there is room for are as good as that."""
        rank = self._sign * self._number(score)
        return sum(self._rank(path) <= rank for path in self.scores) < self._capacity

    def make_room(self) -> list[str]:
        """Take out what has to go before one comes in."""
        out = []
        while path := self.next_out:
            del self.scores[path]
            out.append(path)
        return out

    def add(self, path: str, score: float) -> None:
        self.scores[path] = self._number(score)

    def _number(self, score: float) -> float:
        """NaN counts as the worst score, so that any number is better."""
        return self.worst_score if math.isnan(score) else score

    def _rank(self, path: str) -> float:
        return self._sign * self.scores[path]

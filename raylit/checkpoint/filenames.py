"""Names of checkpoint files, and the ranking that decides which of them are kept. Driver and workers."""

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
    """Pattern for the names of a directory's checkpoint files."""

    directory: str
    pattern: str
    equals: str | None
    """Passed to `fill_pattern`."""
    join_char: str
    extension: str

    @classmethod
    def from_options(cls, callback: Any, filename: str | None = None, *, directory: str = "") -> Self:
        """Return a ModelCheckpoint's pattern; `directory` is used if the callback has no `dirpath` yet."""
        return cls(
            directory=callback.dirpath or directory,
            pattern=filename or callback.filename or f"{{epoch}}{callback.CHECKPOINT_JOIN_CHAR}{{step}}",
            equals=callback.CHECKPOINT_EQUALS_CHAR if callback.auto_insert_metric_name else None,
            join_char=callback.CHECKPOINT_JOIN_CHAR,
            extension=callback.FILE_EXTENSION,
        )

    @property
    def contains_step(self) -> bool:
        """Return whether each optimizer step gets a file name of its own."""
        return "{step" in self.pattern

    def path(self, metrics: Mapping[str, Any], version: int | None = None, prefix: str | None = None) -> str:
        """Return the path for these metrics; a missing metric counts as 0.

        Raises:
            ConfigError: if a format spec does not fit, or the name leads out of the directory.
        """
        parts = [
            prefix,
            fill_pattern(self.pattern, metrics, equals=self.equals),
            None if version is None else f"v{version}",
        ]
        name = self.join_char.join(part for part in parts if part is not None) + self.extension
        check_stays_below(name, f"the checkpoint's file name {name!r}, of the pattern {self.pattern!r},")
        return join(self.directory, name)


def find_free_path(
    path_of: Callable[[int | None], str],
    first_version: int | None,
    *,
    reusable: str = "",
    is_taken: Callable[[str], bool] = lambda path: False,
) -> str:
    """Return the first path, without or with a version, that no file has and that is not taken otherwise.

    `reusable` may be overwritten. Without a `first_version` existing files are overwritten.
    """
    path = path_of(None)
    for version in () if first_version is None else itertools.count(first_version):
        if path == reusable or not (is_taken(path) or files.exists(path)):
            break
        path = path_of(version)
    return path


def fill_pattern(pattern: str, metrics: Mapping[str, Any], *, equals: str | None) -> str:
    """Return the pattern with each `{name}` or `{name:spec}` filled in; a missing metric counts as 0.

    With `equals` ("=") the metric's name is put in front: `{epoch:02}` becomes `epoch=07`.

    Raises:
        ConfigError: if a format spec does not fit.
    """

    def format_field(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        try:
            value = format(metrics.get(name, 0), spec)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the checkpoint's file name {pattern!r}: {match[0]} does not fit: {error}") from error
        return value if equals is None else f"{name}{equals}{value}"

    return _FIELD.sub(format_field, pattern)


def collect_fields(state: RunState) -> dict[str, float]:
    """Return the values that a file name or `monitor` may refer to; a logged `epoch` or `step` wins over the run's."""
    metrics = dict(state.callback_metrics)
    metrics["epoch"] = int(metrics.get("epoch", state.progress.epoch))
    metrics["step"] = int(metrics.get("step", state.progress.global_step))
    return metrics


class TopK:
    """Ranking of at most `count` paths (-1: any number) by score; the earlier one wins a tie. Touches no file."""

    def __init__(self, *, count: int, mode: Literal["min", "max"]) -> None:
        self.scores: dict[str, float] = {}
        self.worst_score = math.inf if mode == "min" else -math.inf
        self._capacity = math.inf if count == -1 else count
        self._sign = 1 if mode == "min" else -1

    @property
    def best(self) -> str:
        """The path with the best score; empty if there is none."""
        return min(self.scores, key=self._rank, default="")

    @property
    def next_removed(self) -> str:
        """The path with the worst score, which the next one replaces; empty while fewer than `count` are kept."""
        return "" if len(self.scores) < self._capacity else max(self.scores, key=self._rank, default="")

    def admits(self, score: float) -> bool:
        """Return whether a path with this score would be kept.

        A path with an equal score counts as better, because it came first.
        """
        rank = self._sign * self._number(score)
        return sum(self._rank(path) <= rank for path in self.scores) < self._capacity

    def make_room(self) -> list[str]:
        """Remove and return the paths that must go before another is added."""
        removed = []
        while path := self.next_removed:
            del self.scores[path]
            removed.append(path)
        return removed

    def add(self, path: str, score: float) -> None:
        """Add a path with its score."""
        self.scores[path] = self._number(score)

    def _number(self, score: float) -> float:
        """Return the score, with NaN replaced by the worst score, so that any number is better."""
        return self.worst_score if math.isnan(score) else score

    def _rank(self, path: str) -> float:
        return self._sign * self.scores[path]

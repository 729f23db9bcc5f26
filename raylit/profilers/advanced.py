"""AdvancedProfiler: cProfile's functions of each action, beside the table of times. Both sides."""

import cProfile
import marshal
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylit.errors import ConfigError
from raylit.profilers.base import Profiler
from raylit.text_table import draw_table, fitting_widths

_Row = tuple[tuple[str, int, str], tuple[int, int, float, float, Any]]
"""pstats' form: (file, line, function) and (primitive calls, calls, own seconds, cumulative seconds, callers)."""


class AdvancedProfiler(Profiler):
    """What each action's time goes into, function by function, sorted by cumulative time; imports are left out.

    `line_count_restriction`: functions shown of an action; a float is a fraction of them. `dump_stats`: cProfile's
    numbers of each action into a file for pstats or snakeviz as well. cProfile makes Python code up to twice as slow.
    For the rest see Profiler.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        line_count_restriction: float = 15,
        dump_stats: bool = False,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)
        if line_count_restriction <= 0:
            raise ConfigError(f"line_count_restriction={line_count_restriction}: must be positive")
        self.line_count_restriction = line_count_restriction
        self.dump_stats = dump_stats
        self._profiles: dict[str, cProfile.Profile] = {}
        self._under_way: list[str] = []

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        self._profiles = {}
        self._under_way = []
        super().setup(stage, local_rank, log_dir)

    def start(self, action_name: str) -> None:
        super().start(action_name)
        # There is one at a time in a thread: the action around this one pauses.
        if self._under_way:
            self._profiles[self._under_way[-1]].disable()
        self._under_way.append(action_name)
        self._profiles.setdefault(action_name, cProfile.Profile()).enable()

    def stop(self, action_name: str) -> None:
        if self._under_way:
            self._profiles[self._under_way[-1]].disable()
        super().stop(action_name)
        if action_name in self._under_way:
            del self._under_way[len(self._under_way) - 1 - self._under_way[::-1].index(action_name)]
        if self._under_way:
            self._profiles[self._under_way[-1]].enable()

    def summary(self) -> str:
        self._pause()
        longest = sorted(self.actions, key=lambda action: action.total_s, reverse=True)
        profiles = [(action.name, self._profiles[action.name]) for action in longest if action.name in self._profiles]
        return "\n\n".join(filter(None, (self._described(name, profile) for name, profile in profiles)))

    def files(self) -> Mapping[str, bytes]:
        if not self.dump_stats:
            return {}
        return {
            f"-{re.sub('[^A-Za-z0-9_.]+', '_', name)}.prof": marshal.dumps(_stats_of(profile))
            for name, profile in self._profiles.items()
        }

    def teardown(self, stage: str | None = None) -> None:
        self._pause()
        self._profiles, self._under_way = {}, []
        super().teardown(stage)

    def _pause(self) -> None:
        if self._under_way:
            self._profiles[self._under_way[-1]].disable()

    def _described(self, name: str, profile: cProfile.Profile) -> str:
        found = [row for row in _stats_of(profile).items() if not _is_noise(row)]
        found.sort(key=lambda row: row[1][3], reverse=True)
        limit = self.line_count_restriction
        shown = found[: max(1, int(len(found) * limit) if isinstance(limit, float) and limit <= 1 else int(limit))]
        if not shown:
            return ""
        header = ["Calls", "Own s", "Cumulative s", "Function"]
        rows = [
            [str(num_calls), f"{own_s:.4f}", f"{cumulative_s:.4f}", _readable(function)]
            for function, (_, num_calls, own_s, cumulative_s, _) in shown
        ]
        more = f" ({len(shown)} of {len(found)} functions)" if len(shown) < len(found) else ""
        widths = fitting_widths(header, rows)
        return "\n".join([f"{name}{more}", *draw_table(header, rows, widths, align="rrrl")])


def _stats_of(profile: cProfile.Profile) -> dict[Any, Any]:
    profile.create_stats()
    stats: dict[Any, Any] = profile.stats
    return stats


def _is_noise(row: _Row) -> bool:
    """Of the profiler itself, and of imports."""
    file, _, function = row[0]
    is_own = "_lsprof.Profiler" in function or f"{os.sep}raylit{os.sep}profilers{os.sep}" in file
    return is_own or file.startswith("<frozen importlib") or function == "<module>"


def _readable(function: tuple[str, int, str]) -> str:
    """`training_step (model.py:12)`, with the folder of a file and no more."""
    file, line, name = function
    return name if line == 0 else f"{name} ({'/'.join(Path(file).parts[-2:])}:{line})"

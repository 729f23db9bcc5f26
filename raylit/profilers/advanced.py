"""AdvancedProfiler: cProfile's functions of each action, in addition to the table of times. Driver and workers."""

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
"""An item of pstats: (file, line, function) and (primitive calls, calls, own seconds, cumulative seconds, callers)."""


class AdvancedProfiler(Profiler):
    """Profiler that lists the functions called in each action, sorted by cumulative time, without imports.

    cProfile makes Python code up to twice as slow. See Profiler for what all profilers share.

    Args:
        dirpath: Directory of the output; None: the run's log directory.
        filename: End of the output's file name; without both the table is printed.
        line_count_restriction: Number of functions to show for each action; a float up to 1 is a fraction of them.
        dump_stats: Also write cProfile's data of each action to a file for pstats or snakeviz.

    Raises:
        ConfigError: if `line_count_restriction` is not positive, or the name leads out of the directory.
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
        # A thread can have one active profile only, so the enclosing action's profile pauses.
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
        return "\n\n".join(filter(None, (self._describe_action(name, profile) for name, profile in profiles)))

    def files(self) -> Mapping[str, bytes]:
        if not self.dump_stats:
            return {}
        return {
            f"-{re.sub('[^A-Za-z0-9_.]+', '_', name)}.prof": marshal.dumps(_create_stats(profile))
            for name, profile in self._profiles.items()
        }

    def teardown(self, stage: str | None = None) -> None:
        self._pause()
        self._profiles, self._under_way = {}, []
        super().teardown(stage)

    def _pause(self) -> None:
        if self._under_way:
            self._profiles[self._under_way[-1]].disable()

    def _describe_action(self, name: str, profile: cProfile.Profile) -> str:
        functions = [row for row in _create_stats(profile).items() if not _is_noise(row)]
        functions.sort(key=lambda row: row[1][3], reverse=True)
        limit = self.line_count_restriction
        top_functions = functions[
            : max(1, int(len(functions) * limit) if isinstance(limit, float) and limit <= 1 else int(limit))
        ]
        if not top_functions:
            return ""
        header = ["Calls", "Own s", "Cumulative s", "Function"]
        rows = [
            [str(num_calls), f"{own_s:.4f}", f"{cumulative_s:.4f}", _format_function(function)]
            for function, (_, num_calls, own_s, cumulative_s, _) in top_functions
        ]
        more = f" ({len(top_functions)} of {len(functions)} functions)" if len(top_functions) < len(functions) else ""
        widths = fitting_widths(header, rows)
        return "\n".join([f"{name}{more}", *draw_table(header, rows, widths, align="rrrl")])


def _create_stats(profile: cProfile.Profile) -> dict[Any, Any]:
    profile.create_stats()
    stats: dict[Any, Any] = profile.stats
    return stats


def _is_noise(row: _Row) -> bool:
    """Return whether a row belongs to the profiler itself or to an import."""
    file, _, function = row[0]
    is_own = "_lsprof.Profiler" in function or f"{os.sep}raylit{os.sep}profilers{os.sep}" in file
    return is_own or file.startswith("<frozen importlib") or function == "<module>"


def _format_function(function: tuple[str, int, str]) -> str:
    """Format a function as `training_step (model.py:12)`, with at most one folder of the path."""
    file, line, name = function
    return name if line == 0 else f"{name} ({'/'.join(Path(file).parts[-2:])}:{line})"

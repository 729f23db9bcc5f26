"""The files that a checkpoint callback has saved and a logger has not taken yet. Driver only."""

import os
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFile:
    path: str
    score: float | None
    is_best: bool
    is_last: bool


@dataclass(slots=True)
class SavedFiles:
    """Remembers which files, as of when, have been taken."""

    _taken: dict[str, float] = field(default_factory=dict)

    def new(self, callback: Any) -> list[SavedFile]:
        """Those of a callback, the oldest first, that were not there, or were others, at the last call."""
        scores = {str(path): float(score) for path, score in getattr(callback, "best_k_models", {}).items()}
        best, last = getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", "")
        times = {path: os.path.getmtime(path) for path in {*scores, best, last} if path and os.path.exists(path)}
        new = sorted((path for path in times if self._taken.get(path) != times[path]), key=lambda path: times[path])
        self._taken.update(times)
        return [
            SavedFile(path=path, score=scores.get(path), is_best=path == best, is_last=path == last) for path in new
        ]


def is_after_each(log_model: bool | str, callback: Any) -> bool:
    """Whether files are taken when they are saved, rather than those that are left at the end."""
    return log_model == "all" or (log_model is True and getattr(callback, "save_top_k", 1) == -1)

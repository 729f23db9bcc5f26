"""Records of a sweep's trials, and the files in their directories. Driver; does not depend on Ray."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import cloudpickle

from raylit.storage import file_system, is_url

CHECKPOINT = "trial.ckpt"
_CONFIG = "config.pkl"


TrialStatus = Literal["finished", "stopped", "failed", "unfinished"]
Mode = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """Record of one trial of a sweep or a search, as it ended."""

    id: str
    config: dict[str, Any]
    """Values of the search space; the last ones if population based training has perturbed them."""
    status: TrialStatus
    """"stopped": by the scheduler, before the end of its training; "unfinished": the sweep was interrupted."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Metrics of the last report; empty if there was none."""
    history: tuple[dict[str, Any], ...] = ()
    """Metrics of each report, oldest first, with `epoch`, `step` and `time_s` since the trial's start."""
    checkpoint: str | None = None
    """Best checkpoint by the sweep's metric among those that are kept, otherwise the newest."""
    directory: str = ""
    """Directory of the trial's logs."""
    error: str | None = None
    """Traceback of the error of a failed trial, with the user's frames only; the last line is type and message."""

    def best(self, metric: str, mode: Mode) -> float | None:
        """Return the best value of a metric among the reports; None if none has a number for it."""
        values = [value for report in self.history if is_number(value := report.get(metric))]
        return None if not values else (min(values) if mode == "min" else max(values))


def find_best_trial(records: Sequence[TrialRecord], metric: str, mode: Mode) -> TrialRecord | None:
    """Return the trial with the best report, of equal ones the first; None if no report has a number."""
    scored = [(value, record) for record in records if (value := record.best(metric, mode)) is not None]
    if not scored:
        return None
    return (min if mode == "min" else max)(scored, key=lambda pair: pair[0])[1]


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number, and not a boolean."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_better(value: float, than: float, mode: Mode) -> bool:
    """Return whether a value is better than another in this mode."""
    return value < than if mode == "min" else value > than


def write_config(config: Mapping[str, Any], directory: str) -> None:
    """Write a trial's config into the directory of its checkpoint."""
    with open(os.path.join(directory, _CONFIG), "wb") as file:
        cloudpickle.dump(dict(config), file)


def read_config(checkpoint: str) -> dict[str, Any]:
    """Read the config of a trial's checkpoint, by its path or URL.

    It is unpickled, so it must come from one's own sweeps.
    """
    path = checkpoint.removesuffix(CHECKPOINT) + _CONFIG
    if is_url(path):
        files, path_there = file_system(path)
        return cloudpickle.loads(files.cat_file(path_there))
    with open(path, "rb") as file:
        return cloudpickle.load(file)

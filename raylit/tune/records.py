"""Records of a sweep's trials, and the files in their directories."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import cloudpickle

from raylit.storage import file_system, is_url

CHECKPOINT = "trial.ckpt"
_CONFIG = "config.pkl"


def write_config(config: Mapping[str, Any], directory: str) -> None:
    with open(os.path.join(directory, _CONFIG), "wb") as file:
        cloudpickle.dump(dict(config), file)


def config_of(checkpoint: str) -> dict[str, Any]:
    """Of a trial's checkpoint, by its path or URL. It is unpickled: for one's own sweeps."""
    path = checkpoint.removesuffix(CHECKPOINT) + _CONFIG
    if is_url(path):
        files, place = file_system(path)
        return cloudpickle.loads(files.cat_file(place))
    with open(path, "rb") as file:
        return cloudpickle.load(file)


TrialStatus = Literal["finished", "stopped", "failed", "unfinished"]
Mode = Literal["min", "max"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """One trial of a sweep or a search, as it ended."""

    id: str
    config: dict[str, Any]
    """The point of the space; of a perturbed trial the last one."""
    status: TrialStatus
    """"stopped": by the scheduler, before its training's end; "unfinished": the sweep was interrupted first."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Of the last report; empty where there was none."""
    history: tuple[dict[str, Any], ...] = ()
    """The metrics of each report, oldest first, with `epoch`, `step` and `time_s` since the trial's start."""
    checkpoint: str | None = None
    """The best by the sweep's metric among those that are kept, else the newest."""
    directory: str = ""
    """Where the trial's logs are."""
    error: str | None = None
    """The traceback of what ended a failed trial, the user's frames alone; the last line is type and message."""

    def best(self, metric: str, mode: Mode) -> float | None:
        """The best value of a metric among the reports; None: none has a number for it."""
        values = [value for report in self.history if is_number(value := report.get(metric))]
        return None if not values else (min(values) if mode == "min" else max(values))


def best_of(records: Sequence[TrialRecord], metric: str, mode: Mode) -> TrialRecord | None:
    """The trial with the best report, of equal ones the first."""
    scored = [(value, record) for record in records if (value := record.best(metric, mode)) is not None]
    if not scored:
        return None
    return (min if mode == "min" else max)(scored, key=lambda pair: pair[0])[1]


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_better(value: float, than: float, mode: Mode) -> bool:
    return value < than if mode == "min" else value > than

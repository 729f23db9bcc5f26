"""Histories: every report of every trial, kept in files beside the trials' checkpoints. Driver.

Tune's own log files lose what a paused trial has reported since they were last copied to the storage (Ray 2.60).
"""

import json
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from raylit.places import is_url, joined, make_directory, read_text, write_text
from raylit.tune.reporter import IS_LAST

_FILE = "reports.jsonl"
_TUNES_OWN = frozenset(
    {
        "checkpoint_dir_name", "config", "date", "done", "episodes_total", "hostname", "iterations_since_restore",
        "node_ip", "pid", "should_checkpoint", "time_since_restore", "time_this_iter_s", "time_total_s", "timestamp",
        "timesteps_since_restore", "timesteps_total", "training_iteration", "trial_id", IS_LAST,
    }
)  # fmt: skip
_ITERATION = "training_iteration"


class Histories(tune.Callback):
    """What `of` tells holds for resumed runs too."""

    def __init__(self, directory: str) -> None:
        """`directory`: of the run, with one for each trial in it."""
        self._directory = directory
        self._seen: set[str] = set()
        """Trials that have reported in this process."""
        self._unwritten: dict[str, list[str]] = {}
        """Lines for a URL, which cannot be appended to."""

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        own = {name: value for name, value in result.items() if name not in _TUNES_OWN}
        report = {_ITERATION: result.get(_ITERATION, 0), **own, "time_s": result.get("time_total_s", 0.0)}
        line = json.dumps(report, default=_plain) + "\n"
        path = self._path(trial)
        if trial.trial_id not in self._seen:
            self._seen.add(trial.trial_id)
            self._drop_repeated(path, first=report[_ITERATION])
        if is_url(path):
            self._unwritten.setdefault(path, []).append(line)
            return
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._write(self._path(trial))

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._write(self._path(trial))

    def on_experiment_end(self, trials: list[TuneTrial], **info: Any) -> None:
        for path in list(self._unwritten):
            self._write(path)

    def _path(self, trial: TuneTrial) -> str:
        directory = joined(self._directory, f"trial_{trial.trial_id}")
        if trial.trial_id not in self._seen:
            make_directory(directory)
        return joined(directory, _FILE)

    def _drop_repeated(self, path: str, *, first: int) -> None:
        """A trial that goes on from a checkpoint after a crash makes some reports again."""
        before = _reports(path)
        kept = [report for report in before if report[_ITERATION] < first]
        if len(kept) < len(before):
            write_text("".join(json.dumps(report) + "\n" for report in kept), path)

    def _write(self, path: str) -> None:
        lines = self._unwritten.pop(path, [])
        if lines:
            write_text((read_text(path) or "") + "".join(lines), path)


def history_of(trial_id: str, directory: str) -> list[dict[str, Any]]:
    """The reports of a trial, oldest first."""
    reports = _reports(joined(directory, f"trial_{trial_id}", _FILE))
    return [{name: value for name, value in report.items() if name != _ITERATION} for report in reports]


def _reports(path: str) -> list[dict[str, Any]]:
    """A line that a crash has cut off is none."""
    lines = (read_text(path) or "").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _plain(value: Any) -> Any:
    """NumPy's numbers and the like."""
    return value.item() if hasattr(value, "item") else repr(value)

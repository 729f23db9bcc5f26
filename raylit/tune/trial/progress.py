"""Progress of a sweep's trials: their reports on disk, and lines for the terminal. Driver."""

import json
import math
import os
import sys
import time
import traceback
from collections import Counter
from typing import Any

import cloudpickle
import ray
from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from raylit.compat import ray_core
from raylit.driver.ray.failures import DEATH_ERRORS, describe_death
from raylit.driver.ray.placement import (
    CapacityWait,
    ResourceRequest,
    describe_pending_capacity,
    format_hosts,
    format_resources,
    read_hosts,
)
from raylit.errors import WorkerDied
from raylit.storage import is_url, join, make_directory, read_text, write_text
from raylit.tune.records import Mode, is_better, is_number
from raylit.tune.trial.trainable import TrialFailed
from raylit.tune.trial.trial_thread import IS_LAST

_FILE = "reports.jsonl"
_TUNE_KEYS = frozenset(
    {
        "checkpoint_dir_name", "config", "date", "done", "episodes_total", "hostname", "iterations_since_restore",
        "node_ip", "pid", "should_checkpoint", "time_since_restore", "time_this_iter_s", "time_total_s", "timestamp",
        "timesteps_since_restore", "timesteps_total", "training_iteration", "trial_id", IS_LAST,
    }
)  # fmt: skip
_ITERATION = "training_iteration"


class ReportHistory(tune.Callback):
    """Tune callback that writes each trial's reports to a file, which resumed runs continue."""

    def __init__(self, directory: str) -> None:
        """Store the run's directory, which has one for each trial in it."""
        self._directory = directory
        self._seen: set[str] = set()
        """Trials that have reported in this process."""
        self._unwritten: dict[str, list[str]] = {}
        """Lines for a URL, which cannot be appended to."""

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        metrics = {name: value for name, value in result.items() if name not in _TUNE_KEYS}
        report = {_ITERATION: result.get(_ITERATION, 0), **metrics, "time_s": result.get("time_total_s", 0.0)}
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
        directory = join(self._directory, f"trial_{trial.trial_id}")
        if trial.trial_id not in self._seen:
            make_directory(directory)
        return join(directory, _FILE)

    def _drop_repeated(self, path: str, *, first: int) -> None:
        """Remove reports that a trial makes again when it goes on from a checkpoint after a crash."""
        reports = _read_reports(path)
        earlier = [report for report in reports if report[_ITERATION] < first]
        if len(earlier) < len(reports):
            write_text("".join(json.dumps(report) + "\n" for report in earlier), path)

    def _write(self, path: str) -> None:
        lines = self._unwritten.pop(path, [])
        if lines:
            write_text((read_text(path) or "") + "".join(lines), path)


class FatalErrorStopper(tune.Stopper):
    """Tune stopper that ends a run whose trials would all fail in the same way."""

    def __init__(self) -> None:
        self.is_due = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.is_due


_BETWEEN_LINES_S = 10.0


class ProgressReporter(tune.Callback):
    """Tune callback that prints how far the trials are, which have failed, and what waiting ones wait for."""

    def __init__(
        self,
        *,
        title: str,
        metric: str | None,
        mode: Mode,
        demand: ResourceRequest,
        stopper: FatalErrorStopper,
        is_shown: bool = True,
    ) -> None:
        """Store the settings; `demand` is the resource request of a trial."""
        self._title = title
        self._metric = metric
        self._mode = mode
        self._demand = demand
        self._stopper = stopper
        self._is_shown = is_shown
        self._best: float | None = None
        self._best_id = ""
        self._shown_errors: set[str] = set()
        """Last lines of errors whose traceback was shown: of equal errors it is shown once."""

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Reset the state of a run; Tune calls it again on an unpickled object when a run is resumed."""
        # A search without a fixed number of trials has the largest integer as its number.
        self._num_trials: int | None = None if total_num_samples == sys.maxsize else total_num_samples
        self._waiting = CapacityWait(timeout_s=math.inf)
        self._groups_before = _list_placed_groups()
        self._shown_at_s = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if any(trial.status == TuneTrial.RUNNING for trial in trials):
            self._waiting = CapacityWait(timeout_s=math.inf)
        elif self._is_shown and self._waiting.is_line_due and _list_placed_groups() <= self._groups_before:
            free = f"{format_resources(ray.available_resources())} of {format_hosts(read_hosts())}"
            why = describe_pending_capacity(self._demand, ray_core.read_autoscaling())
            self._waiting.say(f"room for a trial of {self._demand}; free now: {free}; {why}")

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        value = result.get(self._metric or "")
        if is_number(value) and (self._best is None or is_better(value, self._best, self._mode)):
            self._best, self._best_id = value, trial.trial_id
        self._print_if_due(trials)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        error = read_error(trial)
        if isinstance(error, TrialFailed) and error.is_fatal:
            self._stopper.is_due = True
            return
        summary = read_last_line(error)
        self._write(
            f"trial {trial.trial_id} failed with {trial.config}: "
            + (summary if summary in self._shown_errors else f"\n{format_error(error)}")
        )
        self._shown_errors.add(summary)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        error = read_error(trial)
        if isinstance(error, TrialFailed) and error.is_fatal:
            self._stopper.is_due = True
            return
        self._write(
            f"trial {trial.trial_id} is tried again, from its newest checkpoint ({trial.num_failures} of "
            f"{trial.max_failures}): {read_last_line(error)}"
        )

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._print_if_due(trials)

    def _print_if_due(self, trials: list[TuneTrial]) -> None:
        if self._is_shown and time.monotonic() - self._shown_at_s >= _BETWEEN_LINES_S:
            self._shown_at_s = time.monotonic()
            self._write(self._format_progress(trials))

    def _format_progress(self, trials: list[TuneTrial]) -> str:
        counts = Counter(trial.status for trial in trials)
        of_all = "" if self._num_trials is None else f" of {self._num_trials}"
        parts = [f"{counts[TuneTrial.TERMINATED]}{of_all} trials done", f"{counts[TuneTrial.RUNNING]} running"]
        if counts[TuneTrial.ERROR]:
            parts.append(f"{counts[TuneTrial.ERROR]} failed")
        if self._best is not None:
            parts.append(f"best {self._metric}={self._best:.4g} (trial {self._best_id})")
        return ", ".join(parts)

    def _write(self, text: str) -> None:
        sys.stderr.write(f"raylit: {self._title}: {text}\n")
        sys.stderr.flush()


def read_history(trial_id: str, directory: str) -> list[dict[str, Any]]:
    """Return the reports of a trial, oldest first."""
    reports = _read_reports(join(directory, f"trial_{trial_id}", _FILE))
    return [{name: value for name, value in report.items() if name != _ITERATION} for report in reports]


def read_error(trial: TuneTrial) -> BaseException | None:
    """Return the error that ended a failed trial; raylit's own exception if there is one."""
    error: Any = None
    # The error file is among the trial's other files only when the run is over, or in another process.
    if os.path.exists(trial.pickled_error_file or ""):
        with open(trial.pickled_error_file, "rb") as file:
            error = cloudpickle.load(file)
    error = error or trial.get_pickled_error()
    cause = getattr(error, "cause", None)
    if isinstance(cause, TrialFailed):
        return cause
    if isinstance(error, DEATH_ERRORS):
        reason = f"the process of its trial ended: {describe_death(error, None)}"
        return WorkerDied(rank=0, host=ray_core.parse_host_address(str(error)) or "?", reason=reason)
    return error


def format_error(error: BaseException | None) -> str:
    """Return the traceback, if it has any information, and the error itself."""
    if error is None or isinstance(error, TrialFailed):
        return str(error or "Tune does not say why")
    return "".join(traceback.format_exception_only(error)).strip()


def read_last_line(error: BaseException | None) -> str:
    """Return the last line of `format_error`: type and message."""
    return (format_error(error).strip().splitlines() or [""])[-1]


def _read_reports(path: str) -> list[dict[str, Any]]:
    """Read reports from a file; a line that a crash has cut off is ignored."""
    lines = (read_text(path) or "").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _plain(value: Any) -> Any:
    """Convert NumPy's numbers and the like."""
    return value.item() if hasattr(value, "item") else repr(value)


def _list_placed_groups() -> set[str]:
    """Return the ids in hex of placement groups that are created, among them those of trials whose processes start."""
    table = ray.util.placement_group_table()
    return {name for name, entry in table.items() if entry["state"] == "CREATED"}

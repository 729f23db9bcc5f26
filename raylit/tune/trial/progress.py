"""The progress of a sweep's trials: what they have reported, and lines and bars for the terminal."""

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
from raylit.driver.ray.failures import DEATHS, reason_of_death
from raylit.driver.ray.placement import cluster_hosts, describe_pending_capacity, format_hosts
from raylit.driver.ray.resource_request import CapacityWait, ResourceRequest, format_resources
from raylit.errors import WorkerDied
from raylit.storage import is_url, join, make_directory, read_text, write_text
from raylit.tune.records import Mode, is_better, is_number
from raylit.tune.trial.trainable import TrialFailed
from raylit.tune.trial.trial_thread import IS_LAST

_FILE = "reports.jsonl"
_TUNES_OWN = frozenset(
    {
        "checkpoint_dir_name", "config", "date", "done", "episodes_total", "hostname", "iterations_since_restore",
        "node_ip", "pid", "should_checkpoint", "time_since_restore", "time_this_iter_s", "time_total_s", "timestamp",
        "timesteps_since_restore", "timesteps_total", "training_iteration", "trial_id", IS_LAST,
    }
)  # fmt: skip
_ITERATION = "training_iteration"


class ReportHistory(tune.Callback):
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
        directory = join(self._directory, f"trial_{trial.trial_id}")
        if trial.trial_id not in self._seen:
            make_directory(directory)
        return join(directory, _FILE)

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
    reports = _reports(join(directory, f"trial_{trial_id}", _FILE))
    return [{name: value for name, value in report.items() if name != _ITERATION} for report in reports]


def _reports(path: str) -> list[dict[str, Any]]:
    """A line that a crash has cut off is none."""
    lines = (read_text(path) or "").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def _plain(value: Any) -> Any:
    """NumPy's numbers and the like."""
    return value.item() if hasattr(value, "item") else repr(value)


_BETWEEN_LINES_S = 10.0


class Ending(tune.Stopper):
    """Ends a run whose trials would all fail in the same way."""

    def __init__(self) -> None:
        self.is_due = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self.is_due


class ProgressReporter(tune.Callback):
    """Says how far the trials are, which have failed, and what the first of them wait for."""

    def __init__(
        self,
        *,
        title: str,
        metric: str | None,
        mode: Mode,
        demand: ResourceRequest,
        ending: Ending,
        is_shown: bool = True,
    ) -> None:
        """`demand`: what a trial asks the cluster for."""
        self._title = title
        self._metric = metric
        self._mode = mode
        self._demand = demand
        self._ending = ending
        self._is_shown = is_shown
        self._best: float | None = None
        self._best_id = ""
        self._shown_errors: set[str] = set()
        """Last lines: of the same, the traceback is shown once."""

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        """Called once more when a run is resumed, with an object that comes from the storage."""
        # A search says "until it proposes no more" by a number as large as there is.
        self._num_trials: int | None = None if total_num_samples == sys.maxsize else total_num_samples
        self._waiting = CapacityWait(timeout_s=math.inf)
        self._groups_before = _placed_groups()
        self._shown_at_s = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if any(trial.status == TuneTrial.RUNNING for trial in trials):
            self._waiting = CapacityWait(timeout_s=math.inf)
        elif self._is_shown and self._waiting.is_line_due and _placed_groups() <= self._groups_before:
            free = f"{format_resources(ray.available_resources())} of {format_hosts(cluster_hosts())}"
            why = describe_pending_capacity(self._demand, ray_core.read_autoscaling())
            self._waiting.say(f"room for a trial of {self._demand}; free now: {free}; {why}")

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        value = result.get(self._metric or "")
        if is_number(value) and (self._best is None or is_better(value, self._best, self._mode)):
            self._best, self._best_id = value, trial.trial_id
        self._say(trials)

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        error = error_of(trial)
        if isinstance(error, TrialFailed) and error.is_fatal:
            self._ending.is_due = True
            return
        summary = last_line(error)
        self._write(
            f"trial {trial.trial_id} failed with {trial.config}: "
            + (summary if summary in self._shown_errors else f"\n{text_of(error)}")
        )
        self._shown_errors.add(summary)

    def on_trial_recover(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        error = error_of(trial)
        if isinstance(error, TrialFailed) and error.is_fatal:
            self._ending.is_due = True
            return
        self._write(
            f"trial {trial.trial_id} is tried again, from its newest checkpoint ({trial.num_failures} of "
            f"{trial.max_failures}): {last_line(error)}"
        )

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._say(trials)

    def _say(self, trials: list[TuneTrial]) -> None:
        if self._is_shown and time.monotonic() - self._shown_at_s >= _BETWEEN_LINES_S:
            self._shown_at_s = time.monotonic()
            self._write(self._progress(trials))

    def _progress(self, trials: list[TuneTrial]) -> str:
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


def _placed_groups() -> set[str]:
    """Placement groups that have their room, by id in hex: beside others' those of trials whose processes start."""
    table = ray.util.placement_group_table()
    return {name for name, entry in table.items() if entry["state"] == "CREATED"}


def error_of(trial: TuneTrial) -> BaseException | None:
    """What ended a failed trial: raylit's own words where it got to say them."""
    error: Any = None
    # Beside the trial's other files only when the run is over, or in another process.
    if os.path.exists(trial.pickled_error_file or ""):
        with open(trial.pickled_error_file, "rb") as file:
            error = cloudpickle.load(file)
    error = error or trial.get_pickled_error()
    cause = getattr(error, "cause", None)
    if isinstance(cause, TrialFailed):
        return cause
    if isinstance(error, DEATHS):
        reason = f"the process of its trial ended: {reason_of_death(error, None)}"
        return WorkerDied(rank=0, host=ray_core.parse_host_address(str(error)) or "?", reason=reason)
    return error


def text_of(error: BaseException | None) -> str:
    """The traceback, as far as it says anything, and last the error itself."""
    if error is None or isinstance(error, TrialFailed):
        return str(error or "Tune does not say why")
    return "".join(traceback.format_exception_only(error)).strip()


def last_line(error: BaseException | None) -> str:
    return (text_of(error).strip().splitlines() or [""])[-1]

"""Fits that run inside a function that Ray Tune or Ray Train has called. Driver."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from raylit.callbacks.base import DriverCallback, Run
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.perturbed import PerturbedHyperparameters
from raylit.callbacks.timing import SavedReport, is_validated_by_epoch_end
from raylit.checkpoint import files
from raylit.compat import ray_core
from raylit.errors import ConfigError
from raylit.storage import absolute, join
from raylit.worker.job import Job

FILE = "checkpoint.ckpt"
"""Name of the file in a Ray Checkpoint."""

_RESERVED_NAMES = frozenset({"config", "done", "should_checkpoint", "training_iteration", "trial_id"})
"""Names in a result that Tune itself uses."""


class RaySession(Protocol):
    """Session of Tune or Train, with what raylit reads from it and reports to it."""

    name: str
    """Description for messages."""

    @property
    def world_size(self) -> int:
        """Number of processes that run the same function together."""
        ...

    @property
    def num_reports(self) -> int:
        """Number of reports by any code in this process; it only grows."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The config that the function was called with."""
        ...

    @property
    def checkpoint(self) -> Any:
        """Ray Checkpoint to continue from, or the last one that the function has reported, or None."""
        ...

    def make_checkpoint(self, directory: str) -> Any:
        """Create a Ray Checkpoint of a local directory."""
        ...

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        """Report a result with a Checkpoint or None. SystemExit: Ray wants the function to end."""
        ...


def current_session() -> RaySession | None:
    """Return the session of this process, or None.

    None: neither Tune nor Train runs this process, or Tune runs a class trainable, whose results are what its `step`
    returns.
    """
    session = ray_core.find_function_session()
    if session is not None:
        return _FunctionSession(session)
    functions = ray_core.find_train_functions()
    return None if functions is None else _TrainWorkerSession(functions)


class _FunctionSession:
    """Session of a function trainable of Tune, or of a worker of Train's first version."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._is_tune = session.world_rank is None
        self.name = "a trial of Ray Tune" if self._is_tune else "a worker of Ray Train"

    @property
    def world_size(self) -> int:
        return 1 if self._is_tune else self._session.world_size

    @property
    def num_reports(self) -> int:
        return self._session.iteration

    @property
    def config(self) -> Mapping[str, Any]:
        return ray_core.read_trial_config(self._session)

    @property
    def checkpoint(self) -> Any:
        return self._session.loaded_checkpoint

    def make_checkpoint(self, directory: str) -> Any:
        package = sys.modules["ray.tune" if self._is_tune else "ray.train"]
        return package.Checkpoint.from_directory(directory)

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        self._session.report(metrics, checkpoint=checkpoint)


class _TrainWorkerSession:
    """Session of a worker of Train's second version."""

    name = "a worker of Ray Train"

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        self._context = functions.get_context()

    @property
    def world_size(self) -> int:
        return self._context.get_world_size()

    @property
    def num_reports(self) -> int:
        return ray_core.count_train_reports()

    @property
    def config(self) -> Mapping[str, Any]:
        return {}  # it is the same whenever Train restarts the function

    @property
    def checkpoint(self) -> Any:
        return self._functions.get_checkpoint()

    def make_checkpoint(self, directory: str) -> Any:
        return sys.modules["ray.train"].Checkpoint.from_directory(directory)

    def report(self, metrics: dict[str, Any], checkpoint: Any) -> None:
        sys.modules["ray.train"].report(metrics, checkpoint=checkpoint)


class TuneReport(SavedReport):
    """Callback that reports a result to Ray Tune or Ray Train after each validation.

    Without a validation loop it reports after each epoch. A result has everything logged, `epoch`, `step`, and a
    checkpoint of the whole run. If Ray answers that the trial is to end, the fit ends there.

    A Trainer in a function that Tune or Train has called adds one by itself. That one stops reporting as soon as the
    function, a hook or a callback has reported a result: since the function's last fit, or since this callback's last
    validation. A function that reports only after its fit passes `callbacks=[pl.TuneReport(report=False)]`. Passed as a
    callback, it reports in any case; outside of Tune and Train it does nothing.
    """

    def __init__(
        self,
        metrics: str | Sequence[str] | Mapping[str, str] | None = None,
        *,
        save_checkpoints: bool = True,
        report: bool = True,
    ) -> None:
        """Choose what is reported.

        Args:
            metrics: Which metrics, under their own names or, in a dict, by the names they are to have; None: all.
            save_checkpoints: Report a checkpoint of the whole run with each result.
            report: False: the fit reports nothing, and does not continue from the checkpoint of a restored trial.
        """
        self.is_reporting = report
        self.num_reports = 0
        """Number of results that the function had reported in total after this callback's last one."""
        self._metrics = _to_name_map(metrics)
        self._is_saving = save_checkpoints
        self._session: RaySession | None = None
        self._notes: dict[str, Any] = {}
        self.is_automatic = False
        self._is_validated = False

    @classmethod
    def automatic(cls, *, report: bool, save_checkpoints: bool) -> "TuneReport":
        """Create one that stops reporting as soon as other code reports."""
        callback = cls(report=report, save_checkpoints=save_checkpoints)
        callback.is_automatic = True
        return callback

    def attach(self, session: RaySession | None, notes: dict[str, Any]) -> None:
        """Attach to the function that the next fit runs in; `notes` are saved with its checkpoints."""
        self._session, self._notes = session, notes

    def on_start(self, run: Run) -> None:
        self._is_validated = False
        session = self._session if run.state.stage == "fit" else None
        if session is None:
            return
        self.num_reports = session.num_reports
        if session.world_size > 1:
            # A report to Train waits for those of all workers, and these fits are not one training.
            self._session = None
            warnings.warn(
                f"this fit runs in {session.name}, of which there are {session.world_size}: each of them trains the "
                "whole model by itself, and none reports. Let raylit have the workers: Trainer(num_workers="
                f"{session.world_size}) without Ray Train, or in a task",
                stacklevel=2,
            )

    def on_validation_end(self, run: Run) -> None:
        self._is_validated = True
        if not is_validated_by_epoch_end(run):
            self._report(run)

    def on_train_epoch_end(self, run: Run) -> None:
        if is_validated_by_epoch_end(run) and (self._is_validated or not run.state.has_validation):
            self._report(run)

    def _report(self, run: Run) -> None:
        session = self._session
        self._is_validated = False
        if session is None or not self.is_reporting:
            return
        if self.is_automatic and session.num_reports != self.num_reports:
            self.is_reporting = False
            return
        metrics = self._select_metrics(run)
        with self._save_temporarily(run, session) as checkpoint:
            session.report(metrics, checkpoint)
        self.num_reports = session.num_reports

    def _select_metrics(self, run: Run) -> dict[str, Any]:
        logged = run.state.callback_metrics
        values = {"epoch": run.state.progress.epoch, "step": run.state.progress.global_step, **logged}
        if self._metrics is None:
            return {name: value for name, value in values.items() if name not in _RESERVED_NAMES}
        missing = [name for name in self._metrics.values() if name not in values]
        if missing:
            raise ConfigError(
                f"TuneReport: {', '.join(map(repr, missing))} has not been logged; there are: "
                f"{', '.join(sorted(values))}. Log it with self.log, or report one of these"
            )
        return {name: values[source] for name, source in self._metrics.items()}

    @contextlib.contextmanager
    def _save_temporarily(self, run: Run, session: RaySession) -> Iterator[Any]:
        """Save a Ray Checkpoint to a temporary directory, which Ray copies; yield None if none is to be saved."""
        if not self._is_saving or run.plan.is_dev_run:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="raylit-") as directory:
            path = os.path.join(directory, FILE)
            self.save(run, path)
            checkpoint = session.make_checkpoint(directory)
            checkpoint.update_metadata({"raylit": self._notes})
            yield checkpoint


def _to_name_map(metrics: str | Sequence[str] | Mapping[str, str] | None) -> dict[str, str] | None:
    if metrics is None or isinstance(metrics, Mapping):
        return None if metrics is None else dict(metrics)
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    return {name: name for name in names}


@dataclass(frozen=True, kw_only=True, slots=True)
class NestedFit:
    """Arguments of a fit after the surrounding Tune or Train session has added its own."""

    job: Job
    callbacks: list[DriverCallback]
    checkpoint: dict[str, Any] | None = None
    """Checkpoint from which the fit of a restored function continues."""


class _FitCounter(threading.local):
    """Count of the fits of a function that Ray has called; each call has a thread of its own."""

    num_started = 0
    last_report: TuneReport | None = None
    """The TuneReport of the previous fit."""


_fit_counter = _FitCounter()


def detect_tune_session(job: Job, callbacks: Sequence[DriverCallback], *, is_continued: bool) -> NestedFit:
    """Add a TuneReport if the user has given none, and find the checkpoint to continue from. Called once per fit.

    `is_continued`: the user has said which checkpoint this fit continues from.
    """
    session = current_session()
    reports = [callback for callback in callbacks if isinstance(callback, TuneReport)]
    for report in reports:
        report.attach(None, {})
    if session is None:
        return NestedFit(job=job, callbacks=list(callbacks))
    number, _fit_counter.num_started = _fit_counter.num_started, _fit_counter.num_started + 1
    if not reports:
        is_saving = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        has_reported = _has_reported_itself(session, _fit_counter.last_report)
        reports = [TuneReport.automatic(report=not has_reported, save_checkpoints=is_saving)]
    _fit_counter.last_report = reports[-1]
    for report in reports:
        report.attach(session, {"fit": number, "config": _hash_config(session.config)})
    others = [callback for callback in callbacks if not isinstance(callback, TuneReport)]
    nested_fit = NestedFit(job=job, callbacks=[*others, *reports])  # last, so that it sees the results of the others
    if number > 0 or is_continued or not any(report.is_reporting for report in reports):
        return nested_fit
    return _restore_fit(session, nested_fit)


def _has_reported_itself(session: RaySession, last_report: TuneReport | None) -> bool:
    """Return True if the function has reported a result between its last fit and this one.

    Before its first fit that is unknown: Tune keeps counting from one trial of an actor to the next.
    """
    return last_report is not None and session.num_reports != last_report.num_reports


def _restore_fit(session: RaySession, nested_fit: NestedFit) -> NestedFit:
    """Set the checkpoint that the function is restored from, if a fit has reported it."""
    checkpoint = session.checkpoint
    notes = None if checkpoint is None else checkpoint.get_metadata().get("raylit")
    if notes is None:
        return nested_fit
    if notes["fit"] > 0:
        warnings.warn(
            f"{session.name} is restored from a checkpoint of its fit number {notes['fit'] + 1} and begins anew: which "
            "fit is to go on from tune.get_checkpoint(), say by ckpt_path, and leave out those before it",
            stacklevel=4,
        )
        return nested_fit
    with checkpoint.as_directory() as directory:
        restored = files.read(os.path.join(directory, FILE))
    # Tune moves trials, and also hands out checkpoints of others: a ModelCheckpoint starts anew if its files are
    # elsewhere.
    checkpoint_callbacks = [callback for callback in nested_fit.callbacks if isinstance(callback, ModelCheckpoint)]
    directories = [
        callback.dirpath or join(absolute(nested_fit.job.log_dir), "checkpoints") for callback in checkpoint_callbacks
    ]
    for key, state in list(restored["callbacks"].items()):
        if key.startswith(ModelCheckpoint.__name__) and state.get("dirpath") not in directories:
            del restored["callbacks"][key]
    if notes["config"] == _hash_config(session.config):
        return replace(nested_fit, checkpoint=restored)
    # A better trial's checkpoint, as population based training hands out.
    job = replace(nested_fit.job, callbacks=[*nested_fit.job.callbacks, PerturbedHyperparameters()])
    return replace(nested_fit, job=job, checkpoint=restored)


def _hash_config(config: Mapping[str, Any]) -> str:
    """Return a hash that is equal for configs of equal plain values, in any process."""
    text = json.dumps(config, sort_keys=True, skipkeys=True, default=_to_json_value)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _to_json_value(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else type(value).__qualname__

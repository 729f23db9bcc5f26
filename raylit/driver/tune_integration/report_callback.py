"""Callback that reports a fit's metrics and checkpoints to Ray Tune or Ray Train. Driver."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raylit.callbacks.base import Run
from raylit.callbacks.timing import SavedReport, is_validated_by_epoch_end
from raylit.driver.tune_integration.session import RaySession
from raylit.errors import ConfigError

FILE = "checkpoint.ckpt"
"""Name of the file in a Ray Checkpoint."""

_RESERVED_NAMES = frozenset({"config", "done", "should_checkpoint", "training_iteration", "trial_id"})
"""Names in a result that Tune itself uses."""


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

"""Reporter: hands a fit's metrics over to its trial after each validation. Driver, in the trial's process."""

from dataclasses import replace
from functools import partial

from raylit.callbacks.base import Run
from raylit.callbacks.saved_report import SavedReport
from raylit.callbacks.timing import is_validated_by_epoch_end
from raylit.driver.schedule import Schedule
from raylit.tune.handover import Handover

IS_LAST = "is_last_report"
"""In a report: the training is over with it, unless something else ends it."""
NOT_LOGGED = frozenset({"epoch", "step", IS_LAST})
"""In a report beside the metrics."""


class Reporter(SavedReport):
    """A report for each validation, and the decision about it obeyed before training goes on.

    Where validation runs once in every epoch, or never, the report is made at the epoch's end: it has the epoch's
    training metrics as well.
    """

    def __init__(self, handover: Handover) -> None:
        self._handover = handover
        self.reset_state()

    def reset_state(self) -> None:
        self._has_reported = False
        self._first_step = 0

    def on_train_start(self, run: Run) -> None:
        self._first_step = run.state.progress.global_step

    def on_validation_end(self, run: Run) -> None:
        if not is_validated_by_epoch_end(run):
            self._report(run)

    def on_train_epoch_end(self, run: Run) -> None:
        if is_validated_by_epoch_end(run):
            self._report(run)

    def on_train_end(self, run: Run) -> None:
        """A training that ended before its first validation still has something to show, unless it was over before."""
        is_new = run.state.progress.global_step > self._first_step
        if is_new and not self._has_reported and run.state.callback_metrics:
            self._report(run)

    def _report(self, run: Run) -> None:
        self._has_reported = True
        progress = run.state.progress
        metrics = {"epoch": progress.epoch, "step": progress.global_step, **run.state.callback_metrics}
        if not self._handover.report({**metrics, IS_LAST: _is_last(run)}, save=partial(self.save, run)):
            run.stop("the scheduler has ended the trial")


def _is_last(run: Run) -> bool:
    """Nothing is left to train after this."""
    state = run.state
    if state.progress.batch >= state.num_training_batches:
        state = replace(state, progress=replace(state.progress, is_epoch_ended=True))
    return Schedule(run.plan).is_finished(state)

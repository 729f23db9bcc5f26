"""Thread of a trial in which the training function runs, and its reports to Tune. Trial's process."""

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from raylit.callbacks.base import Run
from raylit.callbacks.timing import SavedReport, is_validated_by_epoch_end
from raylit.driver.loop.schedule import Schedule

Save = Callable[[str], None]
"""Function that writes the training's state to a path, in the training's thread."""


class TrainingAborted(BaseException):
    """Exception that ends a training which reports again after it was told to stop."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingReport:
    """Answer of a training that waits at a report."""

    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEnd:
    """Answer of a training that has ended."""

    metrics: dict[str, Any] | None = None
    """Mapping that the training function returned."""
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _SaveResult:
    """Answer of a training that has written its state, or failed to."""

    error: BaseException | None = None


class TrialThread:
    """Thread that runs a training and exchanges reports and commands with the trial.

    The training's thread calls `report`. The trial's thread calls everything else, one call at a time.
    """

    def __init__(self, train: Callable[["TrialThread"], Mapping[str, Any] | None]) -> None:
        """Store the function, which `next` starts in a thread of its own."""
        self._train = train
        self._commands: queue.SimpleQueue[Literal["go on", "stop"] | tuple[Literal["save"], str]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[TrainingReport | TrainingEnd | _SaveResult] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._end: TrainingEnd | None = None
        self._is_stopping = False

    # Methods for the training's thread

    def report(self, metrics: Mapping[str, Any], *, save: Save) -> bool:
        """Report a result and wait for the decision; False: the training has to end.

        Raises:
            TrainingAborted: it was told to end before.
        """
        if self._is_stopping:
            raise TrainingAborted
        self._answers.put(TrainingReport(metrics=dict(metrics)))
        while True:
            match self._commands.get():
                case "go on":
                    return True
                case "stop":
                    self._is_stopping = True
                    return False
                case (_, path):
                    self._answers.put(_save_state(save, path))

    # Methods for the trial's thread

    def next(self) -> TrainingReport | TrainingEnd:
        """Let the training continue to its next report, or its end."""
        assert self._end is None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="raylit-trial", daemon=True)
            self._thread.start()
        else:
            self._commands.put("go on")
        answer = self._answers.get()
        assert not isinstance(answer, _SaveResult)
        if isinstance(answer, TrainingEnd):
            self._end = answer
        return answer

    def save(self, path: str) -> None:
        """Have the training, which waits at a report, write its state. Raises the error with which that failed."""
        assert self._thread is not None and self._end is None
        self._commands.put(("save", path))
        answer = self._answers.get()
        assert isinstance(answer, _SaveResult)
        if answer.error is not None:
            raise answer.error

    def end(self) -> None:
        """End the training at its report, run its last hooks, and wait for it. May be called more than once."""
        if self._thread is None:
            return
        if self._end is None:
            self._commands.put("stop")
            answer = self._answers.get()
            assert isinstance(answer, TrainingEnd)
            self._end = answer
        self._thread.join()

    def _run(self) -> None:
        try:
            metrics = self._train(self)
        except TrainingAborted:
            self._answers.put(TrainingEnd())
        except BaseException as error:  # a user's SystemExit must reach the trial too
            self._answers.put(TrainingEnd(error=error))
        else:
            self._answers.put(TrainingEnd(metrics=None if metrics is None else dict(metrics)))


def _save_state(save: Save, path: str) -> _SaveResult:
    try:
        save(path)
    except Exception as error:
        return _SaveResult(error=error)
    return _SaveResult()


IS_LAST = "is_last_report"
"""Key in a report: the training ends with it, unless something else ends it first."""
NOT_LOGGED = frozenset({"epoch", "step", IS_LAST})
"""Keys in a report that are not metrics."""


class Reporter(SavedReport):
    """Driver callback that reports each validation and obeys the decision before training goes on.

    If validation runs once in every epoch, or never, the report is made at the end of the epoch, with its training
    metrics.
    """

    def __init__(self, thread: TrialThread) -> None:
        self._thread = thread
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
        """Report a training that ended before its first validation, unless it was finished before it started."""
        is_new = run.state.progress.global_step > self._first_step
        if is_new and not self._has_reported and run.state.callback_metrics:
            self._report(run)

    def _report(self, run: Run) -> None:
        self._has_reported = True
        progress = run.state.progress
        metrics = {"epoch": progress.epoch, "step": progress.global_step, **run.state.callback_metrics}
        if not self._thread.report({**metrics, IS_LAST: _is_last(run)}, save=partial(self.save, run)):
            run.stop("the scheduler has ended the trial")


def _is_last(run: Run) -> bool:
    """Return whether there is nothing left to train after this report."""
    state = run.state
    if state.progress.batch >= state.num_training_batches:
        state = replace(state, progress=replace(state.progress, is_epoch_ended=True))
    return Schedule(run.plan).is_finished(state)

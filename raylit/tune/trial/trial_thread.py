"""The thread of a trial in which the user's function runs, and its reports to Tune."""

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
"""Writes the training's state to a path, in the training's thread."""


class TrainingCut(BaseException):
    """Ends a training that has been told to stop and does not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reported:
    """The training has come to a report and stands still."""

    metrics: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """The training is over."""

    metrics: dict[str, Any] | None = None
    """What it returned."""
    error: BaseException | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Saved:
    error: BaseException | None = None


class TrialThread:
    """The thread that trains calls `report`; the one that answers Tune calls everything else, one call at a time."""

    def __init__(self, train: Callable[["TrialThread"], Mapping[str, Any] | None]) -> None:
        """`train` runs to the training's end, once `next` is called."""
        self._train = train
        self._wishes: queue.SimpleQueue[Literal["go on", "stop"] | tuple[Literal["save"], str]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Reported | Ended | _Saved] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ended: Ended | None = None
        self._is_stopping = False

    # For the thread that trains

    def report(self, metrics: Mapping[str, Any], *, save: Save) -> bool:
        """Hand a result over and wait for what becomes of it; False: the training is to end."""
        if self._is_stopping:
            raise TrainingCut
        self._answers.put(Reported(metrics=dict(metrics)))
        while True:
            match self._wishes.get():
                case "go on":
                    return True
                case "stop":
                    self._is_stopping = True
                    return False
                case (_, path):
                    self._answers.put(_saved(save, path))

    # For the trial

    def next(self) -> Reported | Ended:
        """Let the training go on to its next report, or its end."""
        assert self._ended is None
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="raylit-trial", daemon=True)
            self._thread.start()
        else:
            self._wishes.put("go on")
        answer = self._answers.get()
        assert not isinstance(answer, _Saved)
        if isinstance(answer, Ended):
            self._ended = answer
        return answer

    def save(self, path: str) -> None:
        """Have the training, which stands at a report, write its state."""
        assert self._thread is not None and self._ended is None
        self._wishes.put(("save", path))
        answer = self._answers.get()
        assert isinstance(answer, _Saved)
        if answer.error is not None:
            raise answer.error

    def end(self) -> None:
        """End the training where it stands, its last hooks included, and wait for it. May be called more than once."""
        if self._thread is None:
            return
        if self._ended is None:
            self._wishes.put("stop")
            answer = self._answers.get()
            assert isinstance(answer, Ended)
            self._ended = answer
        self._thread.join()

    def _run(self) -> None:
        try:
            metrics = self._train(self)
        except TrainingCut:
            self._answers.put(Ended())
        except BaseException as error:  # a user's SystemExit must reach the trial too
            self._answers.put(Ended(error=error))
        else:
            self._answers.put(Ended(metrics=None if metrics is None else dict(metrics)))


def _saved(save: Save, path: str) -> _Saved:
    try:
        save(path)
    except Exception as error:
        return _Saved(error=error)
    return _Saved()


IS_LAST = "is_last_report"
"""In a report: the training is over with it, unless something else ends it."""
NOT_LOGGED = frozenset({"epoch", "step", IS_LAST})
"""In a report beside the metrics."""


class Reporter(SavedReport):
    """A report for each validation, and the decision about it obeyed before training goes on.

    Where validation runs once in every epoch, or never, the report is made at the epoch's end: it has the epoch's
    training metrics as well.
    """

    def __init__(self, handover: TrialThread) -> None:
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

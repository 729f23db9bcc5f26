"""Trial of a sweep as a Ray Tune trainable: trainings one after the other on the same workers. Trial's process."""

import contextlib
import copy
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
from ray import tune
from ray.tune.result import DONE, RESULT_DUPLICATE, SHOULD_CHECKPOINT

from raylit.checkpoint import format
from raylit.driver.ray import worker_pool
from raylit.driver.ray.failures import format_traceback, is_harmless
from raylit.errors import RaylitError
from raylit.protocol.messages import copy_tensors, unpack
from raylit.protocol.process_settings import ProcessSettings, TorchSettings, take_over_variables
from raylit.tune.records import CHECKPOINT, read_config, write_config
from raylit.tune.trial.trial_thread import IS_LAST, NOT_LOGGED, Reporter, TrainingReport, TrialThread


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialContext:
    """Description of the trial for the training function."""

    id: str
    config: dict[str, Any]
    directory: str
    """Directory of the trial's own files; for storage elsewhere, such as s3://, a URL."""
    reporter: Reporter
    """Driver callback for the fit: it reports, has checkpoints written, and stops the fit when Tune asks for it."""
    thread: TrialThread
    """Thread for reports of another kind than the reporter's."""
    checkpoint: str | None
    """Checkpoint from which a fit goes on."""
    is_perturbed: bool
    """Whether the checkpoint was trained with another config, as population based training does."""


TrainingFunction = Callable[[TrialContext], Mapping[str, Any] | None]
"""Function that runs a trial's training to its end, in a thread of the trial's process.

The mapping that it returns is reported as the last result.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSettings:
    """Settings that all trials of a run share, from the driver."""

    training: bytes
    """Training function, pickled by cloudpickle."""
    directory: str
    """Directory of the run; each trial has its own below it."""
    metric: str | None
    """Metric that every report must have."""
    is_saving: bool
    """Whether a checkpoint belongs to each report."""
    import_path: tuple[str, ...]
    accelerator: bytes
    """Accelerator, pickled by cloudpickle."""
    random_state: Any
    """Packed random state of the driver, with which a trial starts as a fit there would."""
    torch_settings: TorchSettings
    process_settings: ProcessSettings
    variables: dict[str, str | None]
    """Variables of the driver's environment; None for those that are to be removed."""


class TrialFailed(RaylitError):
    """Error that ended a trial, as a text with its traceback, since the exception itself may not be picklable."""

    is_fatal = False
    """Whether every other trial would fail in the same way."""

    def __init__(self, text: str, *, is_harmless: bool = False) -> None:
        """Store the text; `is_harmless` states that the next trial may take over the trial's processes."""
        super().__init__(text)
        self.is_harmless = is_harmless

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_trial_failed, (type(self), str(self), self.is_harmless)


class UnknownMetric(TrialFailed):
    """Error of reports that lack the metric by which trials are compared."""

    is_fatal = True


def _rebuild_trial_failed(cls: type[TrialFailed], text: str, is_harmless: bool) -> TrialFailed:
    return cls(text, is_harmless=is_harmless)


class Trial(tune.Trainable):
    """Tune trainable of a trial; the training runs in a thread and waits at each report for Tune's decision."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The user's relative paths stay valid. Tune reads this variable in its constructor.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        for name in ("ray.train", "ray.tune"):  # a line for every checkpoint, which Ray carries to the driver
            logging.getLogger(name).setLevel(logging.WARNING)
        super().__init__(*args, **kwargs)

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        """Prepare the process; `parameters` has the TrialSettings as `settings`."""
        settings: TrialSettings = parameters["settings"]
        sys.path.extend(path for path in settings.import_path if path not in sys.path)
        self._settings = settings
        self._training: TrainingFunction | None = None
        self._thread: TrialThread | None = None
        self._checkpoint: str | None = None
        self._start_trial(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Reuse the process and its workers for another trial."""
        self._end_training()
        self._start_trial(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next report."""
        if self._thread is None:
            self._thread = TrialThread(self._train)
        metrics: dict[str, Any] = {}
        answer = self._thread.next()
        while isinstance(answer, TrainingReport):
            self._check_metric(answer.metrics)
            self._has_reported = True
            # Tune's own frequency would also ask for a checkpoint after the training's end.
            metrics = {**answer.metrics, SHOULD_CHECKPOINT: self._settings.is_saving}
            if not answer.metrics.get(IS_LAST):
                return metrics
            # Tune gets the result when the training has ended: a finished trial is neither paused nor copied.
            self._save_last()
            answer = self._thread.next()
        if answer.error is not None:
            raise TrialFailed(format_traceback(answer.error), is_harmless=is_harmless(answer.error)) from None
        if answer.metrics is not None:
            self._check_metric(answer.metrics)
            metrics = {**metrics, **answer.metrics}
        elif not self._has_reported and self._checkpoint is None:
            text = "the training has ended without a validation or the end of an epoch: nothing to report"
            raise TrialFailed(text, is_harmless=True)
        return {**(metrics or {RESULT_DUPLICATE: True}), DONE: True}

    def save(self, checkpoint_dir: str | None = None) -> Any:
        """Save by way of a directory that is removed with Ray's session, in any case."""
        try:
            self._skip_used_names()
            with tempfile.TemporaryDirectory(prefix="saved-", dir=self.logdir) as directory:
                return super().save(checkpoint_dir or directory)
        except Exception as error:
            raise TrialFailed(format_traceback(error)) from None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert self._thread is not None
        if self._last:
            _link_tree(self._last, checkpoint_dir)
        else:
            self._thread.save(os.path.join(checkpoint_dir, CHECKPOINT))
        write_config(self.config, checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Copy a checkpoint before the first step: Tune's directory may be temporary, and the fit reads it later."""
        assert self._thread is None
        self._remove_copies()
        self._copy = tempfile.mkdtemp(prefix="resumed-", dir=self.logdir)
        _link_tree(checkpoint, self._copy)
        self._checkpoint = os.path.join(self._copy, CHECKPOINT)
        self._is_perturbed = read_config(self._checkpoint) != self.config

    def cleanup(self) -> None:
        """End the training and the workers, before the trial's actor ends."""
        self._end_training()
        worker_pool.shutdown()

    # Helpers

    def _start_trial(self, config: dict[str, Any]) -> None:
        self.config = dict(config)
        self._checkpoint = None
        self._is_perturbed = False
        self._copy = ""
        self._last = ""
        self._has_reported = False

    def _train(self, thread: TrialThread) -> Mapping[str, Any] | None:
        settings = self._settings
        # Variables are set in this thread, as some settings belong to a thread.
        take_over_variables(settings.variables)
        settings.process_settings.apply()
        settings.torch_settings.apply()
        directory = os.path.join(settings.directory, f"trial_{self.trial_id}")
        # It is unpickled here, as an error of it is the trial's error, and once, as it may contain data.
        self._training = self._training or cloudpickle.loads(settings.training)
        settings.process_settings.apply_warning_filters()  # imports may have added some of their own
        accelerator = cloudpickle.loads(settings.accelerator)
        format.set_random_state(copy_tensors(unpack(settings.random_state)), accelerator)
        context = TrialContext(
            id=self.trial_id,
            config=dict(self.config),
            directory=directory,
            reporter=Reporter(thread),
            thread=thread,
            checkpoint=self._checkpoint,
            is_perturbed=self._is_perturbed,
        )
        return self._training(context)

    def _check_metric(self, metrics: Mapping[str, Any]) -> None:
        metric = self._settings.metric
        if metric is not None and metric not in metrics:
            logged = ", ".join(sorted(name for name in metrics if name not in NOT_LOGGED)) or "none at all"
            raise UnknownMetric(
                f"metric={metric!r}: the first result of trial {self.trial_id} has no such metric; there are: {logged}"
                ". Log it with self.log in validation_step (or with on_epoch=True in training_step), or name one of "
                "these"
            )

    def _save_last(self) -> None:
        """Save the state at the last report, for a later request of Tune."""
        assert self._thread is not None
        if self._settings.is_saving:
            self._last = self._last or tempfile.mkdtemp(prefix="last-", dir=self.logdir)
            self._thread.save(os.path.join(self._last, CHECKPOINT))

    def _skip_used_names(self) -> None:
        """Raise Tune's checkpoint index above the directories that exist.

        Tune numbers checkpoints by the saves that it knows of. A save that ended after a pause has a directory too,
        which another trial may be reading.
        """
        storage = self._storage
        assert storage is not None
        while storage.storage_filesystem.get_file_info(_find_next_directory(storage)).type.name != "NotFound":
            storage.current_checkpoint_index += 1

    def _end_training(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.end()
        self._remove_copies()

    def _remove_copies(self) -> None:
        for directory in (self._copy, self._last):
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
        self._copy = self._last = ""


def _find_next_directory(storage: Any) -> str:
    """Return the directory of the next checkpoint."""
    next_storage = copy.copy(storage)
    next_storage.current_checkpoint_index += 1
    return str(next_storage.checkpoint_fs_path)


def _link_tree(source: str, target: str) -> None:
    shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)

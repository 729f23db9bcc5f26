"""Trial: Ray Tune's actor around trainings, one after the other on the same warm workers. The trial's process."""

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
from raylit.driver.ray.serialization import unpack
from raylit.errors import RaylitError
from raylit.protocol.process_settings import ProcessSettings, TorchSettings, take_over_variables
from raylit.tune.records import CHECKPOINT, config_of, write_config
from raylit.tune.trial.trial_thread import IS_LAST, NOT_LOGGED, Reported, Reporter, TrialThread


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialContext:
    """What a training is told of the trial that it is."""

    id: str
    config: dict[str, Any]
    directory: str
    """For the trial's own files. With storage elsewhere, such as s3://, there too."""
    reporter: Reporter
    """A driver callback for the fit: it reports, has checkpoints written, and stops the fit when Tune says so."""
    handover: TrialThread
    """For reports of another kind than the reporter's."""
    checkpoint: str | None
    """Where a fit goes on from."""
    is_perturbed: bool
    """The checkpoint was trained with another config, as population based training does it."""


TrainingFunction = Callable[[TrialContext], Mapping[str, Any] | None]
"""Runs a trial's training to its end, in a thread of the trial's process. What it returns is reported as the last
result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSettings:
    """What all trials of a run have in common, from the driver."""

    recipe: bytes
    """cloudpickle of the Recipe."""
    directory: str
    """Of the run; each trial has its own below it."""
    metric: str | None
    """What every report must have."""
    is_saving: bool
    """A checkpoint belongs to each report."""
    import_path: tuple[str, ...]
    accelerator: bytes
    """cloudpickle of it."""
    random_state: Any
    """Of the driver, packed: a trial starts with what a fit there would have."""
    torch_settings: TorchSettings
    process_settings: ProcessSettings
    variables: dict[str, str | None]
    """Of the driver's environment; None for those that are to be removed."""


class TrialFailed(RaylitError):
    """What ended a trial, in words, as the exception itself may not be able to travel: the traceback of it."""

    is_fatal = False
    """Any other trial would end in the same way."""

    def __init__(self, text: str, *, is_harmless: bool = False) -> None:
        """`is_harmless`: to the trial's processes, which the next trial may take over."""
        super().__init__(text)
        self.is_harmless = is_harmless

    def __reduce__(self) -> tuple[object, ...]:
        return _trial_failed, (type(self), str(self), self.is_harmless)


class UnknownMetric(TrialFailed):
    """The reports do not have what the trials are to be compared by."""

    is_fatal = True


def _trial_failed(cls: type[TrialFailed], text: str, is_harmless: bool) -> TrialFailed:
    return cls(text, is_harmless=is_harmless)


class Trial(tune.Trainable):
    """Answers Tune; the training runs in a thread and stands still whenever Tune decides."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The user's relative paths stay what they are. Tune reads this in its constructor.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        for name in ("ray.train", "ray.tune"):  # a line for every checkpoint, which Ray carries to the driver
            logging.getLogger(name).setLevel(logging.WARNING)
        super().__init__(*args, **kwargs)

    def setup(self, config: dict[str, Any], **parameters: Any) -> None:
        """`parameters`: the Setting."""
        setting: TrialSettings = parameters["setting"]
        sys.path.extend(path for path in setting.import_path if path not in sys.path)
        self._setting = setting
        self._recipe: TrainingFunction | None = None
        self._handover: TrialThread | None = None
        self._checkpoint: str | None = None
        self._take_up(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Another trial takes the process and its workers over."""
        self._end_training()
        self._take_up(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train to the next report."""
        if self._handover is None:
            self._handover = TrialThread(self._train)
        metrics: dict[str, Any] = {}
        answer = self._handover.next()
        while isinstance(answer, Reported):
            self._check_metric(answer.metrics)
            self._has_reported = True
            # Tune's own frequency would ask for a checkpoint after the training's end as well.
            metrics = {**answer.metrics, SHOULD_CHECKPOINT: self._setting.is_saving}
            if not answer.metrics.get(IS_LAST):
                return metrics
            # Tune is told when the training has ended: what is over it neither pauses nor trains on from a copy.
            self._save_last()
            answer = self._handover.next()
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
        """By way of a directory that goes with Ray's session, whatever happens meanwhile."""
        try:
            self._pass_taken_names()
            with tempfile.TemporaryDirectory(prefix="saved-", dir=self.logdir) as directory:
                return super().save(checkpoint_dir or directory)
        except Exception as error:
            raise TrialFailed(format_traceback(error)) from None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        assert self._handover is not None
        if self._last:
            _link_tree(self._last, checkpoint_dir)
        else:
            self._handover.save(os.path.join(checkpoint_dir, CHECKPOINT))
        write_config(self.config, checkpoint_dir)

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Called before the first step. Tune's directory may be a temporary one, and the fit reads it later."""
        assert self._handover is None
        self._remove_copies()
        self._copy = tempfile.mkdtemp(prefix="resumed-", dir=self.logdir)
        _link_tree(checkpoint, self._copy)
        self._checkpoint = os.path.join(self._copy, CHECKPOINT)
        self._is_perturbed = config_of(self._checkpoint) != self.config

    def cleanup(self) -> None:
        """The trial's actor ends, and its workers with it."""
        self._end_training()
        worker_pool.shutdown()

    # Helpers

    def _take_up(self, config: dict[str, Any]) -> None:
        self.config = dict(config)
        self._checkpoint = None
        self._is_perturbed = False
        self._copy = ""
        self._last = ""
        self._has_reported = False

    def _train(self, handover: TrialThread) -> Mapping[str, Any] | None:
        setting = self._setting
        # Here, as some of them are a thread's own.
        take_over_variables(setting.variables)
        setting.process_settings.apply()
        setting.torch_settings.apply()
        directory = os.path.join(setting.directory, f"trial_{self.trial_id}")
        # Here, as what goes wrong with it is the trial's error; once, as it may hold data.
        self._recipe = self._recipe or cloudpickle.loads(setting.recipe)
        setting.process_settings.apply_warning_filters()  # what has been imported may have added some of its own
        accelerator = cloudpickle.loads(setting.accelerator)
        format.set_random_state(unpack(setting.random_state, is_copying=True), accelerator)
        context = TrialContext(
            id=self.trial_id,
            config=dict(self.config),
            directory=directory,
            reporter=Reporter(handover),
            handover=handover,
            checkpoint=self._checkpoint,
            is_perturbed=self._is_perturbed,
        )
        return self._recipe(context)

    def _check_metric(self, metrics: Mapping[str, Any]) -> None:
        metric = self._setting.metric
        if metric is not None and metric not in metrics:
            there = ", ".join(sorted(name for name in metrics if name not in NOT_LOGGED)) or "none at all"
            raise UnknownMetric(
                f"metric={metric!r}: the first result of trial {self.trial_id} has no such metric; there are: {there}. "
                "Log it with self.log in validation_step (or with on_epoch=True in training_step), or name one of these"
            )

    def _save_last(self) -> None:
        """The state at the last report, for when Tune asks."""
        assert self._handover is not None
        if self._setting.is_saving:
            self._last = self._last or tempfile.mkdtemp(prefix="last-", dir=self.logdir)
            self._handover.save(os.path.join(self._last, CHECKPOINT))

    def _pass_taken_names(self) -> None:
        """Tune numbers checkpoints by the saves that it has heard of. A save that a pause overtook has a directory too,
        and another trial may be reading it."""
        storage = self._storage
        assert storage is not None
        while storage.storage_filesystem.get_file_info(_following(storage)).type.name != "NotFound":
            storage.current_checkpoint_index += 1

    def _end_training(self) -> None:
        handover, self._handover = self._handover, None
        if handover is not None:
            handover.end()
        self._remove_copies()

    def _remove_copies(self) -> None:
        for directory in (self._copy, self._last):
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
        self._copy = self._last = ""


def _following(storage: Any) -> str:
    """The directory of the next checkpoint."""
    following = copy.copy(storage)
    following.current_checkpoint_index += 1
    return str(following.checkpoint_fs_path)


def _link_tree(source: str, target: str) -> None:
    shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)

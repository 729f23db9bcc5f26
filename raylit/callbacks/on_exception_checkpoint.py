"""OnExceptionCheckpoint and SavesOnException: the worker's state is saved when an exception is raised. Worker."""

import os
from functools import partial

from raylit.callbacks.base import Callback
from raylit.callbacks.model_checkpoint import FilenamePattern, find_free_path
from raylit.checkpoint import files
from raylit.core.module import LightningModule
from raylit.core.trainer_view import TrainerView
from raylit.errors import ConfigError
from raylit.storage import absolute, check_stays_below


class OnExceptionCheckpoint(Callback):
    """Callback that saves the worker's state to `dirpath/filename.ckpt` when an exception is raised.

    The file is written on the host of the worker that raised or, at Ctrl-C and SIGTERM, by rank 0. A fit that ends
    successfully removes the file. It contains everything but the other workers' random state, so a run that is resumed
    from it starts their random state anew.

    Args:
        dirpath: Directory on the worker's host.
        filename: Name of the file without extension.

    Raises:
        ConfigError: if the name is empty or leads out of the directory.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise ConfigError("OnExceptionCheckpoint(filename=''): the name cannot be empty")
        check_stays_below(filename, f"OnExceptionCheckpoint(filename={filename!r})")
        self.dirpath = absolute(dirpath)
        self.filename = filename
        self._has_saved = False

    @property
    def ckpt_path(self) -> str:
        """Path of the file."""
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def setup(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        self._has_saved = False

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        is_ours = trainer.is_global_zero or not isinstance(exception, (KeyboardInterrupt, SystemExit))
        if trainer.state.fn == "fit" and trainer.saving is not None and is_ours:
            trainer.save_own_checkpoint(self.ckpt_path)
            self._has_saved = True

    def teardown(self, trainer: TrainerView, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not self._has_saved:
            files.remove(self.ckpt_path)


class SavesOnException(Callback):
    """Worker's part of `ModelCheckpoint(save_on_exception=True)`, which the driver cannot do."""

    def __init__(self, naming: FilenamePattern, *, first_version: int | None) -> None:
        """Save under names of this pattern; `first_version` is passed to `find_free_path`."""
        self._naming = naming
        self._first_version = first_version

    def on_exception(self, trainer: TrainerView, pl_module: LightningModule, exception: BaseException) -> None:
        # At Ctrl-C and SIGTERM the driver saves.
        is_ours = isinstance(exception, Exception) and not trainer.sanity_checking and not trainer.fast_dev_run
        if not is_ours or trainer.state.fn != "fit" or trainer.saving is None:
            return
        metrics = {"epoch": trainer.current_epoch, "step": trainer.global_step, **trainer.metric_values()}
        if self._naming.contains_step and files.exists(self._naming.path(metrics)):
            return
        names = partial(self._naming.path, metrics)
        trainer.save_own_checkpoint(find_free_path(names, self._first_version))

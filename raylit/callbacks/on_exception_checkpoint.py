"""OnExceptionCheckpoint: the run as it stood when something went wrong. Runs on every worker."""

import os
from typing import Any

from raylit.callbacks.base import Callback
from raylit.checkpoint import files
from raylit.errors import ConfigError
from raylit.places import absolute


class OnExceptionCheckpoint(Callback):
    """Saves to `dirpath/filename.ckpt`, on the host of the worker where an exception passed through or, at Ctrl-C and
    SIGTERM, on rank 0's. A fit that ends well removes the file.

    The worker writes what it has: everything but the other workers' random state, which a run resumed from the file
    therefore starts anew.
    """

    FILE_EXTENSION = ".ckpt"

    def __init__(self, dirpath: str | os.PathLike[str], filename: str = "on_exception") -> None:
        if not filename:
            raise ConfigError("OnExceptionCheckpoint(filename=''): the name cannot be empty")
        self.dirpath = absolute(dirpath)
        self.filename = filename
        self._has_saved = False

    @property
    def ckpt_path(self) -> str:
        return os.path.join(self.dirpath, self.filename + self.FILE_EXTENSION)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._has_saved = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        is_ours = trainer.is_global_zero or not isinstance(exception, (KeyboardInterrupt, SystemExit))
        if trainer.state.fn == "fit" and trainer.saving is not None and is_ours:
            trainer.save_own_checkpoint(self.ckpt_path)
            self._has_saved = True

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and not self._has_saved:
            files.remove(self.ckpt_path)

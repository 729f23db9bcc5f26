"""The checkpoint a run starts from: given, newest, or an earlier run's. Driver."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint import files, format
from raylit.checkpoint.index import newest_first, newest_usable, read_index, written_at
from raylit.errors import CheckpointError, ConfigError
from raylit.loggers import Logger
from raylit.storage import absolute, is_inside, join, relative
from raylit.worker.job import Job


class PreviousRuns:
    """Directories of checkpoints, one for each run; those that do not exist count for nothing."""

    def __init__(self, directories: Sequence[str], *, root_dir: str) -> None:
        """`root_dir`: where there would be some."""
        self._directories = directories
        self._root_dir = root_dir

    def newest_usable(self, *, allow_pickle: bool = False, is_whole: bool = True) -> tuple[str, dict[str, Any]] | None:
        """Path and content of the checkpoint to continue from: the newest of the newest run. Damaged ones are named in
        a warning and passed over. Arguments: as `files.read` has them. None: there is none."""
        for directory in self._newest_first():
            if found := newest_usable(directory, allow_pickle=allow_pickle, is_whole=is_whole):
                return found
        return None

    def last(self) -> str:
        """The file written last; empty where there is none."""
        return next((path for directory in self._newest_first() for path in newest_first(directory)), "")

    def best(self, *, allow_pickle: bool = False) -> str:
        """What the newest run holds for its best; empty where it has none."""
        for directory in self._newest_first():
            if name := read_index(directory).best:
                return join(directory, name)
            for path in newest_first(directory):
                with suppress(CheckpointError):
                    best = _best_path_in(files.read(path, allow_pickle=allow_pickle, is_whole=False))
                    return best if is_inside(best, directory) else ""
        return ""

    def described(self) -> str:
        """Where they were looked for, for messages."""
        places = list(dict.fromkeys(os.path.dirname(directory) for directory in self._directories)) or [self._root_dir]
        return f"{', '.join(places[:3])}{f' and {len(places) - 3} more directories' if len(places) > 3 else ''}"

    def _newest_first(self) -> list[str]:
        newest = {directory: next(newest_first(directory), "") for directory in self._directories}
        times = {directory: written_at(path) for directory, path in newest.items() if path}
        return sorted(times, key=lambda directory: times[directory], reverse=True)


def _best_path_in(checkpoint: dict[str, Any]) -> str:
    """By the state of its ModelCheckpoint."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    return next((str(state["best_model_path"]) for state in states if state.get("best_model_path")), "")


AUTO = "auto"


class FoundCheckpoint(NamedTuple):
    path: str
    checkpoint: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFinder:
    """What the words may stand for at one moment."""

    saved: ModelCheckpoint | None
    """With what it has saved since its Trainer was made."""
    loggers: Sequence[Logger]
    root_dir: str

    def read(
        self, path: str | os.PathLike[str] | None, weights_only: bool | None, *, is_best_default: bool = False
    ) -> FoundCheckpoint | None:
        """The checkpoint of a path, "best" or "last"; of None the best of the last fit where that is the default. The
        parts of a sharded one are left to the workers. ConfigError: the word stands for nothing here."""
        allow_pickle = weights_only is False
        if path is not None and (not isinstance(path, (str, os.PathLike)) or path == ""):
            raise ConfigError(f"ckpt_path={path!r}: must be a path, a URL, 'best' or 'last', and in fit 'auto'")
        if path is None:
            path = (self.saved.best_model_path or None) if is_best_default and self.saved is not None else None
        elif path in ("best", "last"):
            path = self._named(path, allow_pickle)
        if path is None:
            return None
        return FoundCheckpoint(os.fspath(path), files.read(path, allow_pickle=allow_pickle, is_whole=False))

    def newest_run(self, weights_only: bool | None) -> FoundCheckpoint | None:
        """What resume="auto" continues: the newest checkpoint, in the log directory of its run. Says which, or that
        there is none."""
        earlier = self._earlier
        found = earlier.newest_usable(allow_pickle=weights_only is False, is_whole=False)
        if found is None:
            _say(f"no checkpoint of an earlier run is in {earlier.described()}: a new run begins")
            return None
        path, checkpoint = found
        progress = format.read_progress(checkpoint)
        _say(f"continues {path}, of epoch {progress.epoch}, step {progress.global_step}")
        root = next((absolute(logger.root_dir) for logger in self.loggers if logger.root_dir is not None), None)
        if root is not None and is_inside(path, root):
            for logger in self.loggers:
                logger.continue_run(relative(path, root).split("/")[0])
        return FoundCheckpoint(path, checkpoint)

    @property
    def _earlier(self) -> PreviousRuns:
        """Those that saved where this one does: in the directory that was given, else in the first logger's runs."""
        if self.saved is not None and self.saved.dirpath is not None:
            return PreviousRuns([self.saved.dirpath], root_dir=self.saved.dirpath)
        logger = next((logger for logger in self.loggers if logger.root_dir is not None), None)
        root_dir, runs = self.root_dir, [self.root_dir]
        if logger is not None:
            root_dir, runs = str(logger.root_dir), logger.run_dirs()
        return PreviousRuns([join(absolute(run), "checkpoints") for run in runs], root_dir=absolute(root_dir))

    def _named(self, name: Any, allow_pickle: bool) -> str:
        path = ""
        if self.saved is not None:
            path = self.saved.best_model_path if name == "best" else self.saved.newest_model_path
        path = path or (self._earlier.best(allow_pickle=allow_pickle) if name == "best" else self._earlier.last())
        if not path:
            raise ConfigError(
                f"ckpt_path={name!r}: this Trainer has saved no checkpoint, nor has a run before it in "
                f"{self._earlier.described()}; call fit first, or give a file's path"
            )
        return path


def use_checkpoint(job: Job, found: FoundCheckpoint | None) -> dict[str, Any] | None:
    """The checkpoint for a job, which knows from now on where it was read."""
    job.ckpt_path = None if found is None else found.path
    return None if found is None else found.checkpoint


def _say(message: str) -> None:
    print(f"resume={AUTO!r}: {message}", file=sys.stderr)

"""Find and read the checkpoint that a run starts from: a given one, or one of an earlier run. Driver."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint import files, format
from raylit.checkpoint.index import find_newest_usable, list_newest_first, read_index, written_at
from raylit.errors import CheckpointError, ConfigError
from raylit.loggers import Logger
from raylit.storage import absolute, is_inside, join, relative
from raylit.worker.job import Job


class PreviousRuns:
    """Directories of checkpoints, one for each earlier run; missing directories are ignored."""

    def __init__(self, directories: Sequence[str], *, root_dir: str) -> None:
        """Look in `directories`; messages name `root_dir` if there are none."""
        self._directories = directories
        self._root_dir = root_dir

    def find_newest_usable(
        self, *, allow_pickle: bool = False, is_whole: bool = True
    ) -> tuple[str, dict[str, Any]] | None:
        """Return path and content of the newest usable checkpoint of the newest run; None if there is none.

        A warning names damaged checkpoints, which are skipped. The arguments are those of `files.read`.
        """
        for directory in self._newest_first():
            if found := find_newest_usable(directory, allow_pickle=allow_pickle, is_whole=is_whole):
                return found
        return None

    def find_last(self) -> str:
        """Return the path of the checkpoint written last; empty if there is none."""
        return next((path for directory in self._newest_first() for path in list_newest_first(directory)), "")

    def find_best(self, *, allow_pickle: bool = False) -> str:
        """Return the path of the newest run's best checkpoint; empty if it has none."""
        for directory in self._newest_first():
            if name := read_index(directory).best:
                return join(directory, name)
            for path in list_newest_first(directory):
                with suppress(CheckpointError):
                    best = _read_best_path(files.read(path, allow_pickle=allow_pickle, is_whole=False))
                    return best if is_inside(best, directory) else ""
        return ""

    def describe_directories(self) -> str:
        """Return the directories that were searched, for messages."""
        places = list(dict.fromkeys(os.path.dirname(directory) for directory in self._directories)) or [self._root_dir]
        return f"{', '.join(places[:3])}{f' and {len(places) - 3} more directories' if len(places) > 3 else ''}"

    def _newest_first(self) -> list[str]:
        newest = {directory: next(list_newest_first(directory), "") for directory in self._directories}
        times = {directory: written_at(path) for directory, path in newest.items() if path}
        return sorted(times, key=lambda directory: times[directory], reverse=True)


def _read_best_path(checkpoint: dict[str, Any]) -> str:
    """Return the best path in the state of the checkpoint's ModelCheckpoint; empty if it has none."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    return next((str(state["best_model_path"]) for state in states if state.get("best_model_path")), "")


AUTO = "auto"


class FoundCheckpoint(NamedTuple):
    """A checkpoint and the path that it was read from."""

    path: str
    checkpoint: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFinder:
    """Finds the checkpoints that a path, "best", "last" or "auto" stands for at one moment."""

    saved: ModelCheckpoint | None
    """The Trainer's ModelCheckpoint, which knows what it has saved since the Trainer was built."""
    loggers: Sequence[Logger]
    root_dir: str

    def read(
        self, path: str | os.PathLike[str] | None, weights_only: bool | None, *, is_best_default: bool = False
    ) -> FoundCheckpoint | None:
        """Read the checkpoint that a path, "best" or "last" stands for; workers read the shards of a sharded one.

        None stands for the best checkpoint of the last fit if `is_best_default`, else for no checkpoint.

        Raises:
            ConfigError: If there is no best or last checkpoint.
        """
        allow_pickle = weights_only is False
        if path is not None and (not isinstance(path, (str, os.PathLike)) or path == ""):
            raise ConfigError(f"ckpt_path={path!r}: must be a path, a URL, 'best' or 'last', and in fit 'auto'")
        if path is None:
            path = (self.saved.best_model_path or None) if is_best_default and self.saved is not None else None
        elif path in ("best", "last"):
            path = self._resolve_name(path, allow_pickle)
        if path is None:
            return None
        return FoundCheckpoint(os.fspath(path), files.read(path, allow_pickle=allow_pickle, is_whole=False))

    def find_newest_run(self, weights_only: bool | None) -> FoundCheckpoint | None:
        """Read the newest usable checkpoint, for resume="auto". Prints its path, or that there is none.

        The loggers continue in the log directory of its run.
        """
        earlier = self._previous_runs
        found = earlier.find_newest_usable(allow_pickle=weights_only is False, is_whole=False)
        if found is None:
            _print_message(f"no checkpoint of an earlier run is in {earlier.describe_directories()}: a new run begins")
            return None
        path, checkpoint = found
        progress = format.read_progress(checkpoint)
        _print_message(f"continues {path}, of epoch {progress.epoch}, step {progress.global_step}")
        root = next((absolute(logger.root_dir) for logger in self.loggers if logger.root_dir is not None), None)
        if root is not None and is_inside(path, root):
            for logger in self.loggers:
                logger.continue_run(relative(path, root).split("/")[0])
        return FoundCheckpoint(path, checkpoint)

    @property
    def _previous_runs(self) -> PreviousRuns:
        """Runs that saved where this one does: ModelCheckpoint's directory if given, else the first logger's runs."""
        if self.saved is not None and self.saved.dirpath is not None:
            return PreviousRuns([self.saved.dirpath], root_dir=self.saved.dirpath)
        logger = next((logger for logger in self.loggers if logger.root_dir is not None), None)
        root_dir, runs = self.root_dir, [self.root_dir]
        if logger is not None:
            root_dir, runs = str(logger.root_dir), logger.run_dirs()
        return PreviousRuns([join(absolute(run), "checkpoints") for run in runs], root_dir=absolute(root_dir))

    def _resolve_name(self, name: Any, allow_pickle: bool) -> str:
        """Return the path that "best" or "last" stands for: of this Trainer's checkpoints, else of the newest run's."""
        path = ""
        if self.saved is not None:
            path = self.saved.best_model_path if name == "best" else self.saved.newest_model_path
        path = path or (
            self._previous_runs.find_best(allow_pickle=allow_pickle)
            if name == "best"
            else self._previous_runs.find_last()
        )
        if not path:
            raise ConfigError(
                f"ckpt_path={name!r}: this Trainer has saved no checkpoint, nor has a run before it in "
                f"{self._previous_runs.describe_directories()}; call fit first, or give a file's path"
            )
        return path


def use_checkpoint(job: Job, found: FoundCheckpoint | None) -> dict[str, Any] | None:
    """Set the job's `ckpt_path` and return the content of the checkpoint; None if there is none."""
    job.ckpt_path = None if found is None else found.path
    return None if found is None else found.checkpoint


def _print_message(message: str) -> None:
    print(f"resume={AUTO!r}: {message}", file=sys.stderr)

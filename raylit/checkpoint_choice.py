"""Which checkpoint an entry point's `ckpt_path` and the Trainer's `resume` stand for. Driver."""

import os
import sys
from collections.abc import Sequence
from typing import Any

from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint import files, format
from raylit.checkpoint.earlier_runs import EarlierRuns
from raylit.errors import ConfigError
from raylit.loggers import Logger
from raylit.places import absolute, is_inside, joined, relative

AUTO = "auto"


def read_checkpoint(
    path: str | os.PathLike[str] | None,
    *,
    saved: ModelCheckpoint | None,
    earlier: EarlierRuns,
    is_best_default: bool = False,
    is_whole: bool = True,
    allow_pickle: bool = False,
) -> dict[str, Any] | None:
    """Read the checkpoint that a path, "best" or "last" stands for; the best of the last fit by default where that is
    meant. `is_whole` and `allow_pickle` as for `files.read`: workers that shard read a sharded one's parts themselves.
    ConfigError: the word stands for nothing here."""
    if path is None:
        path = (saved.best_model_path or None) if is_best_default and saved is not None else None
    elif path in ("best", "last"):
        path = _named(path, saved, earlier, allow_pickle)
    return None if path is None else files.read(path, allow_pickle=allow_pickle, is_whole=is_whole)


def newest_run(earlier: EarlierRuns, *, loggers: Sequence[Logger], allow_pickle: bool = False) -> dict[str, Any] | None:
    """What resume="auto" continues: the newest checkpoint, in the log directory of its run. Says which, or that there
    is none."""
    found = earlier.newest_usable(allow_pickle=allow_pickle)
    if found is None:
        _say(f"no checkpoint of an earlier run is in {earlier.described()}: a new run begins")
        return None
    path, checkpoint = found
    progress = format.progress_of(checkpoint)
    _say(f"continues {path}, of epoch {progress.epoch}, step {progress.global_step}")
    root = next((absolute(logger.root_dir) for logger in loggers if logger.root_dir is not None), None)
    if root is not None and is_inside(path, root):
        for logger in loggers:
            logger.continue_run(relative(path, root).split("/")[0])
    return checkpoint


def earlier_runs(*, saved: ModelCheckpoint | None, loggers: Sequence[Logger], root_dir: str) -> EarlierRuns:
    """Those that saved where this one does: in the directory that was given, else in the first logger's runs."""
    if saved is not None and saved.dirpath is not None:
        return EarlierRuns([saved.dirpath])
    logger = next((logger for logger in loggers if logger.root_dir is not None), None)
    runs = [root_dir] if logger is None else logger.run_dirs()
    return EarlierRuns([joined(absolute(run), "checkpoints") for run in runs])


def _named(name: Any, saved: ModelCheckpoint | None, earlier: EarlierRuns, allow_pickle: bool) -> str:
    path = "" if saved is None else (saved.best_model_path if name == "best" else saved.newest_model_path)
    path = path or (earlier.best(allow_pickle=allow_pickle) if name == "best" else earlier.last())
    if not path:
        raise ConfigError(
            f"ckpt_path={name!r}: this Trainer has saved no checkpoint, nor has a run before it in "
            f"{earlier.described()}; call fit first, or give a file's path"
        )
    return path


def _say(message: str) -> None:
    print(f"resume={AUTO!r}: {message}", file=sys.stderr)

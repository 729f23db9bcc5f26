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
) -> dict[str, Any] | None:
    """Read the checkpoint that a path, "best" or "last" stands for; the best of the last fit by default where that is
    meant. `is_whole`: with what is in a sharded one's parts, which workers that shard read themselves. ConfigError: the
    word stands for nothing here."""
    if path is None:
        path = saved.best_model_path if is_best_default and saved is not None else None
        return files.read(path, is_whole=is_whole) if path else None
    return files.read(_named(path, saved, earlier) if path in ("best", "last") else path, is_whole=is_whole)


def newest_run(earlier: EarlierRuns, *, loggers: Sequence[Logger], is_whole: bool = True) -> dict[str, Any] | None:
    """What resume="auto" continues: the newest checkpoint, in the log directory of its run. Says which, or that there
    is none. `is_whole`: as `read_checkpoint` has it."""
    found = earlier.newest_usable(is_whole=is_whole)
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


def earlier_runs(*, saved: ModelCheckpoint | None, loggers: Sequence[Logger], default_root_dir: str) -> EarlierRuns:
    """Those that saved where this one does: in the directory that was given, else in the first logger's runs."""
    if saved is not None and saved.dirpath is not None:
        return EarlierRuns([saved.dirpath])
    logger = next((logger for logger in loggers if logger.root_dir is not None), None)
    runs = [default_root_dir] if logger is None else logger.run_dirs()
    return EarlierRuns([joined(absolute(run), "checkpoints") for run in runs])


def _named(name: Any, saved: ModelCheckpoint | None, earlier: EarlierRuns) -> str:
    path = "" if saved is None else (saved.best_model_path if name == "best" else saved.newest_model_path)
    path = path or (earlier.best() if name == "best" else earlier.last())
    if not path:
        raise ConfigError(
            f"ckpt_path={name!r}: this Trainer has saved no checkpoint, nor has a run before it in "
            f"{earlier.described()}; call fit first, or give a file's path"
        )
    return path


def _say(message: str) -> None:
    print(f"resume={AUTO!r}: {message}", file=sys.stderr)

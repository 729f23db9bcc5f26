"""Which checkpoint an entry point's `ckpt_path` stands for. Driver."""

import os
from typing import Any

from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint import files
from raylit.errors import ConfigError


def read_checkpoint(
    path: str | os.PathLike[str] | None, *, saved: ModelCheckpoint | None, is_best_default: bool = False
) -> dict[str, Any] | None:
    """Read the checkpoint that a path, "best" or "last" stands for; the best of the last fit by default where that is
    meant."""
    if path is None:
        path = saved.best_model_path if is_best_default and saved is not None else None
        return files.read(path) if path else None
    return files.read(_named(path, saved) if path in ("best", "last") else path)


def _named(name: Any, saved: ModelCheckpoint | None) -> str:
    path = "" if saved is None else (saved.best_model_path if name == "best" else saved.newest_model_path)
    if not path:
        raise ConfigError(
            f"ckpt_path={name!r}: this Trainer has saved no checkpoint; call fit first, or give a file's path"
        )
    return path

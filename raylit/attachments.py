"""What is attached to a Trainer: callbacks, sorted by the side they run on, and loggers. Driver."""

from collections.abc import Sequence
from typing import Any

from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.progress_bar import ProgressBar
from raylit.errors import ConfigError
from raylit.loggers import Logger, TensorBoardLogger


def sorted_callbacks(given: Any, *, is_checkpointing: bool, is_showing_progress: bool) -> tuple[list[Any], list[Any]]:
    """The workers' callbacks and the driver's; checkpointing comes last, so that it sees what the others decided."""
    callbacks = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    for callback in callbacks:
        if not isinstance(callback, (Callback, DriverCallback)):
            raise ConfigError(f"callbacks holds a {type(callback).__name__}: must be a Callback or a DriverCallback")
    on_workers = [callback for callback in callbacks if isinstance(callback, Callback)]
    on_driver = [callback for callback in callbacks if isinstance(callback, DriverCallback)]
    checkpoints = [callback for callback in on_driver if isinstance(callback, ModelCheckpoint)]
    if checkpoints and not is_checkpointing:
        checkpoints, on_driver = [], [c for c in on_driver if not isinstance(c, ModelCheckpoint)]
    if is_checkpointing and not checkpoints:
        checkpoints = [ModelCheckpoint.automatic()]
    if is_showing_progress and not any(isinstance(callback, ProgressBar) for callback in on_driver):
        on_driver.insert(0, ProgressBar())
    return on_workers, [*(c for c in on_driver if not isinstance(c, ModelCheckpoint)), *checkpoints]


def build_loggers(logger: bool | Logger | Sequence[Logger], default_root_dir: str) -> list[Logger]:
    if isinstance(logger, bool):
        loggers: list[Logger] = [TensorBoardLogger()] if logger else []
    else:
        loggers = [logger] if isinstance(logger, Logger) else list(logger)
    for each in loggers:
        each.bind(default_root_dir)
    return loggers

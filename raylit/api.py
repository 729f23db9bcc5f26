"""fit, validate, test, predict: one line of use each. Driver."""

import atexit
import sys
from typing import Any

from raylit.datamodule import DataModule
from raylit.errors import shows_user_frames
from raylit.module import LightningModule
from raylit.trainer import Trainer


@shows_user_frames
def fit(
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    **trainer_arguments: Any,
) -> Trainer:
    """`Trainer(**trainer_arguments).fit(...)`; returns the Trainer, to look at metrics and to test with."""
    trainer = Trainer(**trainer_arguments)
    trainer.fit(model, train_dataloaders, val_dataloaders, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


@shows_user_frames
def validate(
    model: LightningModule,
    dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    **trainer_arguments: Any,
) -> list[dict[str, float]]:
    """`Trainer(**trainer_arguments).validate(...)`."""
    return Trainer(**trainer_arguments).validate(model, dataloaders, ckpt_path=ckpt_path, datamodule=datamodule)


@shows_user_frames
def test(
    model: LightningModule,
    dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    **trainer_arguments: Any,
) -> list[dict[str, float]]:
    """`Trainer(**trainer_arguments).test(...)`."""
    return Trainer(**trainer_arguments).test(model, dataloaders, ckpt_path=ckpt_path, datamodule=datamodule)


@shows_user_frames
def predict(
    model: LightningModule,
    dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    **trainer_arguments: Any,
) -> list[Any] | None:
    """`Trainer(**trainer_arguments).predict(...)`."""
    return Trainer(**trainer_arguments).predict(model, dataloaders, datamodule=datamodule, ckpt_path=ckpt_path)


def shutdown() -> None:
    """End the idle workers and the Ray node that raylit has started; a cluster of yours is left alone. Runs by itself
    at exit."""
    # Without this module nothing has been started, and Ray need not be imported for it.
    warm = sys.modules.get("raylit.driver.warm")
    if warm is not None:
        warm.shutdown()


atexit.register(shutdown)

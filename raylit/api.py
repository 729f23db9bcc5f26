"""fit, validate, test, predict, tune and the two searches: one line of use each. Driver."""

import atexit
import inspect
import sys
from collections.abc import Callable
from typing import Any

from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.errors import shows_user_frames
from raylit.trainer.trainer import Trainer
from raylit.tune.search.lr_race import RaceResult
from raylit.tune.search.lr_range_test import RangeCurve
from raylit.tune.tuner import Tuner


@shows_user_frames
def fit(
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    **trainer_arguments: Any,
) -> Trainer:
    """`Trainer(**trainer_arguments).fit(...)`; returns the Trainer, to look at metrics and to test with."""
    trainer = Trainer(**trainer_arguments)
    trainer.fit(
        model,
        train_dataloaders,
        val_dataloaders,
        datamodule=datamodule,
        ckpt_path=ckpt_path,
        weights_only=weights_only,
    )
    return trainer


@shows_user_frames
def validate(
    model: LightningModule,
    dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    **trainer_arguments: Any,
) -> list[dict[str, float]]:
    """`Trainer(**trainer_arguments).validate(...)`."""
    return Trainer(**trainer_arguments).validate(
        model, dataloaders, ckpt_path=ckpt_path, datamodule=datamodule, weights_only=weights_only
    )


@shows_user_frames
def test(
    model: LightningModule,
    dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    **trainer_arguments: Any,
) -> list[dict[str, float]]:
    """`Trainer(**trainer_arguments).test(...)`."""
    return Trainer(**trainer_arguments).test(
        model, dataloaders, ckpt_path=ckpt_path, datamodule=datamodule, weights_only=weights_only
    )


@shows_user_frames
def predict(
    model: LightningModule,
    dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    **trainer_arguments: Any,
) -> list[Any] | None:
    """`Trainer(**trainer_arguments).predict(...)`."""
    return Trainer(**trainer_arguments).predict(
        model, dataloaders, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=weights_only
    )


@shows_user_frames
def tune(
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    **trainer_arguments: Any,
) -> dict[str, Any]:
    """`Trainer(**trainer_arguments).tune(...)`: the searches of `auto_lr_find` and `auto_scale_batch_size`."""
    return Trainer(**trainer_arguments).tune(model, train_dataloaders, val_dataloaders, datamodule)


@shows_user_frames
def lr_find(
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    **arguments: Any,
) -> RangeCurve | RaceResult:
    """`Tuner(Trainer(...)).lr_find(...)`: what the search does not take is the Trainer's."""
    own, rest = _split(arguments, Tuner.lr_find)
    return Tuner(Trainer(**rest)).lr_find(model, train_dataloaders, val_dataloaders, datamodule, **own)


@shows_user_frames
def scale_batch_size(
    model: LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    *,
    datamodule: DataModule | None = None,
    **arguments: Any,
) -> int:
    """`Tuner(Trainer(...)).scale_batch_size(...)`: what the search does not take is the Trainer's."""
    own, rest = _split(arguments, Tuner.scale_batch_size)
    return Tuner(Trainer(**rest)).scale_batch_size(model, train_dataloaders, val_dataloaders, datamodule, **own)


def shutdown() -> None:
    """End the idle workers and the Ray node that raylit has started; a cluster of yours is left alone. Runs by itself
    at exit."""
    # Without this module nothing has been started, and Ray need not be imported for it.
    warm = sys.modules.get("raylit.driver.ray.worker_pool")
    if warm is not None:
        warm.shutdown()


atexit.register(shutdown)


def _split(arguments: dict[str, Any], search: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those that the search takes, and the others."""
    named = inspect.signature(search).parameters
    own = {name: value for name, value in arguments.items() if name in named}
    return own, {name: value for name, value in arguments.items() if name not in named}

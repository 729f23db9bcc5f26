"""Functions that build a Trainer and call one of its methods: fit, validate, test, predict, tune, searches. Driver."""

import atexit
import inspect
import sys
from collections.abc import Callable
from typing import Any

from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.errors import shows_user_frames
from raylit.trainer.trainer import Trainer
from raylit.tune.search.learning_rate import RaceResult, RangeCurve
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
    """Train a model: `Trainer(**trainer_arguments).fit(...)`.

    Args:
        model: The module; afterwards it holds the trained weights.
        train_dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
        val_dataloaders: Validation loaders. None: likewise.
        datamodule: A DataModule, in place of loaders.
        ckpt_path: Checkpoint to continue from, as in `Trainer.fit`.
        weights_only: False unpickles any object that the checkpoint holds, as in `Trainer.fit`.
        trainer_arguments: Arguments of the Trainer.

    Returns:
        The Trainer, with the run's metrics and callbacks.
    """
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
    """Validate a model: `Trainer(**trainer_arguments).validate(...)`.

    `trainer_arguments` are the arguments of the Trainer; all others are those of `Trainer.validate`.

    Returns:
        The metrics of the validation loop, a dict for each loader.
    """
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
    """Test a model: `Trainer(**trainer_arguments).test(...)`.

    `trainer_arguments` are the arguments of the Trainer; all others are those of `Trainer.test`.

    Returns:
        The metrics of the test loop, a dict for each loader.
    """
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
    """Predict with a model: `Trainer(**trainer_arguments).predict(...)`.

    `trainer_arguments` are the arguments of the Trainer; all others are those of `Trainer.predict`.

    Returns:
        The outputs of `predict_step`, as `Trainer.predict` returns them.
    """
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
    """Run the searches of `auto_lr_find` and `auto_scale_batch_size`: `Trainer(**trainer_arguments).tune(...)`.

    Args:
        model: The module, on which the results are set.
        train_dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
        val_dataloaders: Validation loaders. None: likewise.
        datamodule: A DataModule, in place of loaders.
        trainer_arguments: Arguments of the Trainer.

    Returns:
        The results of the searches, as `scale_batch_size` and `lr_find`.
    """
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
    """Search for a learning rate: `Tuner(Trainer(...)).lr_find(...)`.

    Args:
        model: The module, on which the result is set.
        train_dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
        val_dataloaders: Validation loaders. None: likewise.
        datamodule: A DataModule, in place of loaders.
        arguments: Arguments of `Tuner.lr_find`; all others are the Trainer's.

    Returns:
        The result, whose `suggestion()` is the rate.
    """
    own, rest = _split_arguments(arguments, Tuner.lr_find)
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
    """Search for a batch size: `Tuner(Trainer(...)).scale_batch_size(...)`.

    Args:
        model: The module, on which the result is set.
        train_dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
        val_dataloaders: Validation loaders. None: likewise.
        datamodule: A DataModule, in place of loaders.
        arguments: Arguments of `Tuner.scale_batch_size`; all others are the Trainer's.

    Returns:
        The batch size per worker.
    """
    own, rest = _split_arguments(arguments, Tuner.scale_batch_size)
    return Tuner(Trainer(**rest)).scale_batch_size(model, train_dataloaders, val_dataloaders, datamodule, **own)


def shutdown() -> None:
    """End the idle workers and the local Ray node that raylit has started; runs by itself at exit.

    A cluster that raylit has not started stays as it is.
    """
    # If this module is not imported nothing has been started, and Ray need not be imported to end it.
    warm = sys.modules.get("raylit.driver.ray.worker_pool")
    if warm is not None:
        warm.shutdown()


atexit.register(shutdown)


def _split_arguments(arguments: dict[str, Any], search: Callable[..., Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments into those of the search's signature and the others."""
    named = inspect.signature(search).parameters
    own = {name: value for name, value in arguments.items() if name in named}
    return own, {name: value for name, value in arguments.items() if name not in named}

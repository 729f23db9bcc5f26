"""Tuner: finds a learning rate or a batch size by short fits, and leaves everything else as it was. Driver."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

from torch.utils.data import DataLoader, Dataset

from raylit.arguments.checks import check_count
from raylit.callbacks.base import Callback
from raylit.checkpoint import format
from raylit.driver.coordinator import Coordinator
from raylit.errors import ConfigError
from raylit.module import LightningModule
from raylit.plan import Limits, Plan, Reporting
from raylit.state import RunState
from raylit.tuner import attribute
from raylit.tuner.batch_size import SizeSearch, is_out_of_memory
from raylit.tuner.learning_rate import LearningRateFinder, RateSweep, SweepMode
from raylit.worker import handback
from raylit.worker.context import Job
from raylit.worker.sources import has_loader, is_from_hook


class Trainer(Protocol):
    """What a Tuner needs of the raylit.Trainer."""

    @property
    def plan(self) -> Plan: ...

    def fit_job(self, model: Any, train_dataloaders: Any, val_dataloaders: Any, datamodule: Any) -> Job:
        """What `fit` would run with these arguments; an error where it could not."""
        ...


class Tuner:
    """The searches of a Trainer, on its workers.

    Each fits a copy, without loggers and callbacks: weights, optimizers, data and random numbers of the user's stay.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def lr_find(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        min_lr: float = 1e-8,
        max_lr: float = 1.0,
        num_training: int = 100,
        mode: SweepMode = "exponential",
        early_stop_threshold: float | None = 4.0,
        update_attr: bool = False,
        attr_name: str = "",
    ) -> LearningRateFinder:
        """The loss over `num_training` steps of a rising rate; ends where the smoothed loss is above
        `early_stop_threshold` times its least. `update_attr` sets `attr_name`, else `lr` or `learning_rate`, to the
        suggestion."""
        if mode not in ("exponential", "linear"):
            raise ConfigError(f"mode={mode!r}: must be 'exponential' or 'linear'")
        if not 0 < min_lr < max_lr:
            raise ConfigError(f"min_lr={min_lr} and max_lr={max_lr}: must be rates with 0 < min_lr < max_lr")
        check_count(3, num_training=num_training)
        job = self._trainer.fit_job(model, train_dataloaders, val_dataloaders, datamodule)
        owners = [job.module]
        name = _name(attr_name, attribute.RATE_NAMES, owners, argument="auto_lr_find") if update_attr else ""
        sweep = RateSweep(
            min_lr=min_lr, max_lr=max_lr, num_steps=num_training, mode=mode, early_stop_threshold=early_stop_threshold
        )
        self._fit_copy(job, _without_limits(self._trainer.plan), [sweep])
        found = sweep.found()
        if update_attr and (rate := found.suggestion()) is not None:
            attribute.put(name, rate, owners)
        return found

    def scale_batch_size(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        mode: Literal["power", "binsearch"] = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
    ) -> int:
        """Set `batch_arg_name` on module or data module to the largest size per worker that fits into memory: doubled
        ("power") from `init_val` until one does not, or the data is one batch, then ("binsearch") halved in between."""
        if mode not in ("power", "binsearch"):
            raise ConfigError(f"mode={mode!r}: must be 'power' or 'binsearch'")
        check_count(1, steps_per_trial=steps_per_trial, init_val=init_val, max_trials=max_trials)
        job = self._trainer.fit_job(model, train_dataloaders, val_dataloaders, datamodule)
        owners = [owner for owner in (job.module, job.datamodule) if owner is not None]
        name = _name(batch_arg_name, attribute.SIZE_NAMES, owners, argument="auto_scale_batch_size")
        if has_loader(job, "train") and not is_from_hook(job, "train"):
            raise ConfigError(
                "auto_scale_batch_size with a loader, whose batch size is fixed: define train_dataloader in the module "
                f"or a DataModule, and make the loader there with self.{name}"
            )
        plan = _without_limits(self._trainer.plan, num_steps=steps_per_trial)

        def try_size(size: int) -> float:
            tried = _copied(job)
            attribute.put(name, size, [owner for owner in (tried.module, tried.datamodule) if owner is not None])
            return self._fit(tried, plan).num_training_batches

        size = SizeSearch(try_size, is_too_large=is_out_of_memory, num_trials=max_trials).run(
            init_val, is_exact=mode == "binsearch"
        )
        attribute.put(name, size, owners)
        return size

    def _fit_copy(self, job: Job, plan: Plan, callbacks: Sequence[Callback]) -> None:
        tried = _copied(job)
        tried.callbacks = callbacks
        self._fit(tried, plan)

    def _fit(self, job: Job, plan: Plan) -> RunState:
        """Nobody listens; what the workers' callbacks have collected comes back."""
        random_state = format.random_state()
        coordinator = Coordinator(plan=plan, job=job, callbacks=[], loggers=[], stage="fit")
        try:
            coordinator.fit()
        finally:
            format.set_random_state(random_state)
        if coordinator.finished is not None and coordinator.finished.attributes:
            handback.apply(coordinator.finished.attributes, job.module, job.callbacks)
        return coordinator.state


def _name(given: str, names: Sequence[str], owners: Sequence[Any], *, argument: str) -> str:
    return attribute.find([given] if given else names, owners, argument=argument)


def _without_limits(plan: Plan, *, num_steps: int | None = None) -> Plan:
    """Training alone, over and over again; the steps' stop wishes are heard at once."""
    limits = Limits(max_epochs=None, max_steps=num_steps, val_batches=0, sanity_val_batches=0)
    return replace(plan, limits=limits, reporting=Reporting(log_every_n_steps=1))


def _copied(job: Job) -> Job:
    """For a worker in this process, which would train the user's own objects. Data sets are shared, as nobody writes
    to them; what cannot be copied, such as a generator, is used itself."""
    memo: dict[int, Any] = {}
    for owner in (job.module, job.datamodule):
        for value in [] if owner is None else vars(owner).values():
            _share_data(value, memo)
    for loader in job.loaders.values():
        _share_data(loader, memo)
    copied = replace(job, callbacks=())
    copied.module, copied.datamodule = copy.deepcopy((job.module, job.datamodule), memo)
    copied.loaders = {name: _or_itself(loader, copy.deepcopy, memo) for name, loader in job.loaders.items()}
    return copied


def _share_data(value: Any, memo: dict[int, Any]) -> None:
    data = value.dataset if isinstance(value, DataLoader) else value
    if isinstance(data, Dataset):
        memo[id(data)] = data


def _or_itself(value: Any, copying: Callable[[Any, dict[int, Any]], Any], memo: dict[int, Any]) -> Any:
    try:
        return copying(value, memo)
    except TypeError:  # what Python raises for what cannot be copied
        return value

"""Tuner: finds a learning rate or a batch size by short fits, and leaves everything else as it was. Driver."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from raylit.arguments.checks import check_count
from raylit.arguments.searches import Searches
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
from raylit.worker.sources import is_from_hook


class Tuner:
    """The searches of a Trainer, on its workers.

    Each fits a copy, without loggers and callbacks: weights, optimizers, data and random numbers of the user's stay.
    """

    def __init__(self, *, plan: Plan, searches: Searches, job_of: Callable[[Any, Any, Any, Any], Job]) -> None:
        """`job_of`: what `fit` would run with its arguments."""
        self._plan = plan
        self._searches = searches
        self._job_of = job_of
        self._searched: LightningModule | None = None

    def search_once(self, job: Job) -> None:
        """What the Trainer's arguments ask for, unless that has been done for the module."""
        if self._searches != Searches() and self._searched is not job.module:
            self.search(job)

    def search(self, job: Job) -> dict[str, Any]:
        """What the Trainer's arguments ask for: the batch size first, as the best rate depends on it."""
        searches = self._searches
        found: dict[str, Any] = {}
        if searches == Searches():
            raise ConfigError("nothing to tune: say auto_lr_find=True or auto_scale_batch_size=True to the Trainer")
        if searches.size_mode is not None:
            found["scale_batch_size"] = self._find_size(job, mode=searches.size_mode)
        if searches.rate_name is not None:
            found["lr_find"] = self._find_rate(job, _sweep(), name=_rate_name(job, searches.rate_name))
        self._searched = job.module
        return found

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
        sweep = _sweep(
            min_lr=min_lr, max_lr=max_lr, num_training=num_training, mode=mode, threshold=early_stop_threshold
        )
        job = self._job_of(model, train_dataloaders, val_dataloaders, datamodule)
        return self._find_rate(job, sweep, name=_rate_name(job, attr_name) if update_attr else None)

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
        return self._find_size(
            self._job_of(model, train_dataloaders, val_dataloaders, datamodule),
            mode=mode,
            num_steps=steps_per_trial,
            first=init_val,
            num_trials=max_trials,
            names=(batch_arg_name,),
        )

    # Helpers, in the order in which they are called

    def _find_rate(self, job: Job, sweep: RateSweep, *, name: str | None) -> LearningRateFinder:
        """Sets the attribute `name` unless that is None."""
        tried = _copied(job)
        tried.callbacks = [sweep]
        self._fit(tried)
        found = sweep.found()
        if name is not None and (rate := found.suggestion()) is not None:
            attribute.put(name, rate, [job.module])
        return found

    def _find_size(
        self,
        job: Job,
        *,
        mode: Literal["power", "binsearch"],
        num_steps: int = 3,
        first: int = 2,
        num_trials: int = 25,
        names: Sequence[str] = attribute.SIZE_NAMES,
    ) -> int:
        name = attribute.find(names, _owners(job), argument="auto_scale_batch_size")
        if not is_from_hook(job, "train"):
            raise ConfigError(
                "auto_scale_batch_size with a loader, whose batch size is fixed: define train_dataloader in the module "
                f"or a DataModule, and make the loader there with self.{name}"
            )

        def try_size(size: int) -> float:
            tried = _copied(job)
            attribute.put(name, size, _owners(tried))
            return self._fit(tried, num_steps=num_steps).num_training_batches

        size = SizeSearch(try_size, is_too_large=is_out_of_memory, num_trials=num_trials).run(
            first, is_exact=mode == "binsearch"
        )
        attribute.put(name, size, _owners(job))
        return size

    def _fit(self, job: Job, *, num_steps: int | None = None) -> RunState:
        """Training alone, over and over again, with nobody but the job's callbacks to listen; what these have collected
        comes back."""
        random_state = format.random_state()
        plan = replace(
            self._plan,
            limits=Limits(max_epochs=None, max_steps=num_steps, val_batches=0, sanity_val_batches=0),
            reporting=Reporting(log_every_n_steps=1),  # the ranks agree on a stop wish at once
            seed=torch.initial_seed() % 2**63,
        )
        coordinator = Coordinator(plan=plan, job=job, callbacks=[], loggers=[], stage="fit")
        try:
            coordinator.fit()
        finally:
            format.set_random_state(random_state)
        if coordinator.finished is not None and coordinator.finished.attributes:
            handback.apply(coordinator.finished.attributes, job.module, job.callbacks)
        return coordinator.state


def _sweep(
    *,
    min_lr: float = 1e-8,
    max_lr: float = 1.0,
    num_training: int = 100,
    mode: SweepMode = "exponential",
    threshold: float | None = 4.0,
) -> RateSweep:
    if mode not in ("exponential", "linear"):
        raise ConfigError(f"mode={mode!r}: must be 'exponential' or 'linear'")
    if not 0 < min_lr < max_lr:
        raise ConfigError(f"min_lr={min_lr} and max_lr={max_lr}: must be rates with 0 < min_lr < max_lr")
    check_count(3, num_training=num_training)
    return RateSweep(min_lr=min_lr, max_lr=max_lr, num_steps=num_training, mode=mode, early_stop_threshold=threshold)


def _rate_name(job: Job, given: str) -> str:
    return attribute.find([given] if given else attribute.RATE_NAMES, [job.module], argument="auto_lr_find")


def _owners(job: Job) -> list[Any]:
    return [owner for owner in (job.module, job.datamodule) if owner is not None]


def _copied(job: Job) -> Job:
    """For a worker in this process, which would train the user's own objects. Data sets are shared, as nobody writes
    to them; what cannot be copied, such as a generator, is used itself."""
    memo: dict[int, Any] = {}
    for owner in _owners(job):
        for value in vars(owner).values():
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

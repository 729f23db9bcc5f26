"""Tuner: finds a learning rate or a batch size by short fits, and leaves everything else as it was. Driver."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

import torch

from raylit.callbacks.base import Callback
from raylit.callbacks.finders import BatchSizeFinder, LearningRateFinder
from raylit.callbacks.progress_bar import ProgressBar
from raylit.checkpoint import format
from raylit.config.plan import Limits, Plan, Reporting
from raylit.core.module import LightningModule
from raylit.errors import ConfigError
from raylit.loggers.base import DummyLogger
from raylit.trainer.arguments.checks import check_count
from raylit.trainer.arguments.training import Searches, SizeMode
from raylit.tune.search import trial
from raylit.tune.search.batch_size import BatchSizeChoices, BatchSizes, SizeSearch, Stopwatch, search_steps
from raylit.tune.search.lr_race import LearningRateRace, LossProbe, RaceResult
from raylit.tune.search.lr_range_test import RangeCurve, RangeMode, RangeTest
from raylit.tune.search.out_of_memory import MemoryLimit, check_limit
from raylit.tune.search.runner import build_runner
from raylit.tune.search.trial import Experiment, Outcome, Search
from raylit.worker.data.sources import is_from_hook
from raylit.worker.job import Job

RateMethod = Literal["range", "race", "fit"]

_MEASURED_S = 0.5
"""How long the speed of a size is measured at least."""
_RACE_MIN_LR = 1e-5
_RANGE_MIN_LR = 1e-8


class Owner(Protocol):
    """The Trainer, as its searches see it."""

    searches: Searches

    @property
    def plan(self) -> Plan: ...

    def build_fit_job(self, model: Any, train_dataloaders: Any, val_dataloaders: Any, datamodule: Any) -> Job:
        """What `fit` would run with these arguments."""
        ...

    def set_accumulation(self, window: int) -> None: ...

    @property
    def callbacks(self) -> list[Any]: ...


class Tuner:
    """The searches of a Trainer.

    Each trial fits a copy, without loggers and, as in Lightning, without callbacks, neither the Trainer's nor those of
    `configure_callbacks`: one that stops, saves or changes the rate would disturb the search. The module's own hooks
    run. Weights, optimizers, data and random numbers of the user's stay. With workers the trials are Ray Tune's, and
    what goes wrong in one ends that one only.
    """

    def __init__(self, trainer: Owner) -> None:
        self._trainer = trainer
        self._searched: LightningModule | None = None
        self.batch_sizes: BatchSizes | None = None
        """What the last search for a batch size has found."""

    def search_once(self, model: Any, *data: Any) -> None:
        """What the Trainer's arguments and finders ask for, unless that has been done for the model."""
        if self._searched is not model and (self._trainer.searches != Searches() or any(self._finders)):
            self.search(model, *data)

    def search(
        self,
        model: Any,
        *data: Any,
        size_arguments: Mapping[str, Any] | None = None,
        rate_arguments: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What the Trainer's arguments and finders ask for: the batch size first, as the best rate depends on it.
        `data`: loaders or a data module, as `fit` takes them by position; the arguments are those of the two searches
        below."""
        searches, (size_finder, rate_finder) = self._trainer.searches, self._finders
        found: dict[str, Any] = {}
        asked: dict[str, Any] = {} if searches.size_mode is None else {"mode": searches.size_mode}
        if (wanted := _wanted(asked, size_finder, argument="auto_scale_batch_size")) is not None:
            found["scale_batch_size"] = self.scale_batch_size(model, *data, **{**wanted, **(size_arguments or {})})
            if size_finder is not None:
                size_finder.optimal_batch_size = found["scale_batch_size"]
        asked = {} if searches.rate_name is None else {"attr_name": searches.rate_name}
        if (wanted := _wanted(asked, rate_finder, argument="auto_lr_find")) is not None:
            found["lr_find"] = self.lr_find(model, *data, **{**wanted, **(rate_arguments or {})})
            if rate_finder is not None:
                rate_finder.optimal_lr = found["lr_find"]
        if not found:
            raise ConfigError("nothing to tune: say auto_lr_find=True or auto_scale_batch_size=True to the Trainer")
        self._searched = model
        return found

    def lr_find(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        method: RateMethod = "range",
        min_lr: float | None = None,
        max_lr: float = 1.0,
        num_training: int = 100,
        mode: RangeMode = "exponential",
        early_stop_threshold: float | None = 4.0,
        num_candidates: int = 12,
        update_attr: bool = True,
        attr_name: str = "",
    ) -> RangeCurve | RaceResult:
        """Look for a learning rate and set `attr_name`, else `lr` or `learning_rate`, to the suggestion, unless
        `update_attr` is False.

        "range", Lightning's "fit": the loss over `num_training` steps of a rising rate, from 1e-8 on; ends where the
        smoothed loss is above `early_stop_threshold` times its least. "race": `num_candidates` rates on a log grid,
        from 1e-5 on, start from the same weights and see the same batches; at a few rungs those behind are cut, and the
        rest trains for `num_training` steps.
        """
        if method not in get_args(RateMethod):
            raise ConfigError(f"method={method!r}: must be 'range' (Lightning's 'fit') or 'race'")
        if mode not in get_args(RangeMode):
            raise ConfigError(f"mode={mode!r}: must be 'exponential' or 'linear'")
        is_race = method == "race"
        min_lr = (_RACE_MIN_LR if is_race else _RANGE_MIN_LR) if min_lr is None else min_lr
        if not 0 < min_lr < max_lr:
            raise ConfigError(f"min_lr={min_lr} and max_lr={max_lr}: must be rates with 0 < min_lr < max_lr")
        check_count(3, num_training=num_training)
        check_count(2, num_candidates=num_candidates)
        job = self._trainer.build_fit_job(model, train_dataloaders, val_dataloaders, datamodule)
        name = None
        if update_attr or is_race:  # a candidate's rate goes where the module looks for it
            name = trial.find([attr_name] if attr_name else trial.RATE_NAMES, job, argument="lr_find")
        found: RangeCurve | RaceResult
        if is_race:
            race = LearningRateRace(min_lr, max_lr, num_candidates=num_candidates, num_steps=num_training)
            found = self._raced(job, race, name=name)
        else:
            probe = RangeTest(
                min_lr=min_lr,
                max_lr=max_lr,
                num_steps=num_training,
                mode=mode,
                early_stop_threshold=early_stop_threshold,
            )
            found = self._range_tested(job, probe)
        if update_attr and name is not None and (rate := found.suggestion()) is not None:
            trial.put(name, rate, job)
        return found

    def scale_batch_size(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: Any = None,
        *,
        mode: SizeMode = "power",
        steps_per_trial: int = 3,
        init_val: int = 2,
        max_trials: int = 25,
        batch_arg_name: str = "batch_size",
        margin: float = 0.05,
        max_val: int = 8192,
        effective_batch_size: int | Literal["keep", "any"] | None = None,
        memory_limit_bytes: int | None = None,
    ) -> int:
        """Look for a batch size per worker, set `batch_arg_name` on module or data module to it, and return it.
        `batch_sizes` has the whole result.

        "power": the largest that fits into memory, doubled from `init_val` until one does not or the data is one batch.
        "binsearch": the gap is then halved, and what is found lowered by `margin`. "throughput": the one with the most
        samples per second.

        `effective_batch_size`: the samples of an optimizer's step, over all workers, that the size has to divide; the
        Trainer's accumulate_grad_batches makes up for it. "keep", the default of "throughput": what module and Trainer
        have now. "any": whatever comes of the size. `memory_limit_bytes`: what the training of a worker may allocate
        beyond its data and weights, in place of all that there is.
        """
        if mode not in get_args(SizeMode):
            raise ConfigError(f"mode={mode!r}: must be 'power', 'binsearch' or 'throughput'")
        check_count(1, steps_per_trial=steps_per_trial, init_val=init_val, max_trials=max_trials, max_val=max_val)
        if not isinstance(margin, (int, float)) or not 0 <= margin < 1:
            raise ConfigError(f"margin={margin!r}: must be a fraction of the size, from 0 to below 1")
        job = self._trainer.build_fit_job(model, train_dataloaders, val_dataloaders, datamodule)
        plan = self._trainer.plan
        check_limit(memory_limit_bytes, accelerator=plan.workers.accelerator)
        name = _size_name(batch_arg_name, job)
        is_speed = mode == "throughput"
        if effective_batch_size is None:
            effective_batch_size = "keep" if is_speed and job.module.automatic_optimization else "any"
        windows = BatchSizeChoices.of(effective_batch_size, job, plan, size=trial.get(name, job), max_size=max_val)
        search = SizeSearch(search_steps(mode, windows.sizes, first=init_val), num_trials=max_trials, windows=windows)
        callbacks: list[Callback] = [Stopwatch(num_steps=steps_per_trial, least_s=_MEASURED_S if is_speed else 0.0)]
        if memory_limit_bytes is not None:
            callbacks.append(MemoryLimit(memory_limit_bytes))
        # Larger batches come from more data, whatever a fit would look at.
        limits = Limits(max_epochs=None, val_batches=0, sanity_val_batches=0)
        # Batches with and without a step: what accumulates has gradients beside each batch, and a speed of its own.
        window = 1 if windows.is_always_one else 2
        self._run(search, job, callbacks, limits=limits, window=window, name=name)
        margin = margin if mode == "binsearch" else 0.0
        self.batch_sizes = BatchSizes(search.trials, mode=mode, windows=windows, margin=margin)
        if (size := self.batch_sizes.suggestion()) is None:
            assert search.error is not None
            raise search.error
        trial.put(name, size, job)
        if windows.effective is not None:
            self._trainer.set_accumulation(windows.of_size(size))
        return size

    # Helpers, in the order in which they are called

    @property
    def _finders(self) -> tuple[BatchSizeFinder | None, LearningRateFinder | None]:
        """The Trainer's callbacks that ask for a search; in a run of a few batches they do not."""
        callbacks = [] if self._trainer.plan.is_dev_run else self._trainer.callbacks
        sizes = [callback for callback in callbacks if isinstance(callback, BatchSizeFinder)]
        rates = [callback for callback in callbacks if isinstance(callback, LearningRateFinder)]
        if len(sizes) > 1 or len(rates) > 1:
            raise ConfigError(f"{len(sizes)} BatchSizeFinders and {len(rates)} LearningRateFinders: give one of each")
        return next(iter(sizes), None), next(iter(rates), None)

    def _raced(self, job: Job, race: LearningRateRace, *, name: str | None) -> RaceResult:
        limits = self._endless(max_steps=race.rungs[-1])
        self._run(race, job, [LossProbe(race.rungs)], limits=limits, name=name, rungs=race.rungs)
        return RaceResult(race)

    def _range_tested(self, job: Job, probe: RangeTest) -> RangeCurve:
        search = _Once()
        self._run(search, job, [probe], limits=self._endless())
        lrs, losses = search.findings
        return RangeCurve(lrs=lrs, losses=losses, mode=probe.mode)

    def _endless(self, *, max_steps: int | None = None) -> Limits:
        """A fit over the same data again and again, training alone."""
        return replace(
            self._trainer.plan.limits,
            max_epochs=None,
            min_epochs=0,
            max_steps=max_steps,
            min_steps=0,
            max_time_s=None,
            val_batches=0,
            sanity_val_batches=0,
        )

    def _run(
        self,
        search: Search,
        job: Job,
        callbacks: Sequence[Callback],
        *,
        limits: Limits,
        window: int | None = None,
        name: str | None = None,
        rungs: Sequence[int] = (),
    ) -> None:
        plan = self._trainer.plan
        optimization = plan.optimization
        if window is not None:
            optimization = replace(optimization, accumulation=((0, window),))
        plan = replace(
            plan,
            limits=limits,
            # To diverge, or to fail, is part of the search.
            optimization=replace(optimization, is_ending_on_nan=False, is_detecting_anomaly=False),
            reporting=Reporting(log_every_n_steps=1),  # the ranks agree on a stop wish at once
            seed=torch.initial_seed() % 2**63,
        )
        experiment = Experiment(
            plan=plan, random_state=format.random_state(plan.workers.accelerator), attribute=name, rungs=tuple(rungs)
        )
        # Hooks that log find a logger, which keeps nothing.
        loggers = [DummyLogger()] if job.loggers else []
        runner = build_runner(plan, is_shown=any(isinstance(each, ProgressBar) for each in self._trainer.callbacks))
        runner.run(search, experiment, replace(job, callbacks=callbacks, profiler=None, loggers=loggers))


def _wanted(
    asked: dict[str, Any], finder: BatchSizeFinder | LearningRateFinder | None, *, argument: str
) -> dict[str, Any] | None:
    """The arguments of a search that the Trainer, or a finder, asks for; None: neither does."""
    if asked and finder is not None:
        raise ConfigError(f"{argument} and a {type(finder).__name__}: give one of them")
    return asked or (None if finder is None else finder.arguments)


def _size_name(given: str, job: Job) -> str:
    name = trial.find([given], job, argument="scale_batch_size")
    if not is_from_hook(job, "train"):
        raise ConfigError(
            "scale_batch_size with a loader, whose batch size is fixed: define train_dataloader in the module or a "
            f"DataModule, and make the loader there with self.{name}"
        )
    return name


class _Once:
    """The search of a single trial."""

    num_at_once = 1

    def __init__(self) -> None:
        self.findings: Any = None
        self._has_proposed = False

    def propose(self) -> float | None:
        has_proposed, self._has_proposed = self._has_proposed, True
        return None if has_proposed else 0.0

    def is_losing(self, value: Any, step: int, loss: float) -> bool:
        return False

    def receive(self, value: Any, outcome: Outcome) -> None:
        if outcome.error is not None:
            raise outcome.error
        self.findings = outcome.findings

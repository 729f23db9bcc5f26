"""Tuner: search for a learning rate or a batch size by short fits that leave the user's objects unchanged. Driver."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

import torch

from raylit.callbacks.argument_callbacks import BatchSizeFinder, LearningRateFinder
from raylit.callbacks.base import Callback
from raylit.callbacks.progress_bar import ProgressBar
from raylit.checkpoint import format
from raylit.config import Limits, Plan, Reporting
from raylit.core.module import LightningModule
from raylit.errors import ConfigError
from raylit.loggers.base import DummyLogger
from raylit.trainer.arguments.training import Searches, SizeMode, check_count
from raylit.tune.search import trial
from raylit.tune.search.batch_size import BatchSizeChoices, BatchSizes, SizeSearch, Stopwatch, search_steps
from raylit.tune.search.learning_rate import LearningRateRace, LossProbe, RaceResult, RangeCurve, RangeMode, RangeTest
from raylit.tune.search.out_of_memory import MemoryLimit, check_limit
from raylit.tune.search.trial import DirectRunner, Experiment, Outcome, Runner, Search
from raylit.worker.data.sources import is_from_hook
from raylit.worker.job import Job

RateMethod = Literal["range", "race", "fit"]

_MEASURED_S = 0.5
"""Minimum time in seconds for which the speed of a batch size is measured."""
_RACE_MIN_LR = 1e-5
_RANGE_MIN_LR = 1e-8


class Owner(Protocol):
    """The Trainer as the Tuner uses it."""

    searches: Searches

    @property
    def plan(self) -> Plan: ...

    def build_fit_job(self, model: Any, train_dataloaders: Any, val_dataloaders: Any, datamodule: Any) -> Job:
        """Build the job that `fit` would run with these arguments."""
        ...

    def set_accumulation(self, window: int) -> None:
        """Set the number of batches whose gradients are accumulated before a step."""
        ...

    @property
    def callbacks(self) -> list[Any]: ...


class Tuner:
    """Searches of a Trainer for a learning rate and a batch size.

    Each trial fits a copy without loggers and, as in Lightning, without callbacks, neither the Trainer's nor those of
    `configure_callbacks`: a callback that stops, saves or changes the rate would disturb the search. The module's own
    hooks run. The user's weights, optimizers, data and random state stay unchanged. With workers the trials are
    trials of Ray Tune, and an error that comes from a trial's value ends that trial only.
    """

    def __init__(self, trainer: Owner) -> None:
        self._trainer = trainer
        self._searched: LightningModule | None = None
        self.batch_sizes: BatchSizes | None = None
        """Result of the last search for a batch size."""

    def search_once(self, model: Any, *data: Any) -> None:
        """Run the searches that the Trainer's arguments or callbacks request, unless they were run for the model."""
        if self._searched is not model and (self._trainer.searches != Searches() or any(self._finders)):
            self.search(model, *data)

    def search(
        self,
        model: Any,
        *data: Any,
        size_arguments: Mapping[str, Any] | None = None,
        rate_arguments: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Run the searches that the Trainer's arguments or callbacks request.

        The batch size comes first, as the best learning rate depends on it.

        Args:
            model: the LightningModule.
            data: loaders or a data module, as `fit` takes them by position.
            size_arguments: arguments of `scale_batch_size`, which override those of the Trainer.
            rate_arguments: arguments of `lr_find`, which override those of the Trainer.

        Returns:
            The results by the names of the two methods.

        Raises:
            ConfigError: neither search is requested.
        """
        searches, (size_finder, rate_finder) = self._trainer.searches, self._finders
        results: dict[str, Any] = {}
        requested: dict[str, Any] = {} if searches.size_mode is None else {"mode": searches.size_mode}
        if (arguments := _select_arguments(requested, size_finder, argument="auto_scale_batch_size")) is not None:
            results["scale_batch_size"] = self.scale_batch_size(model, *data, **{**arguments, **(size_arguments or {})})
            if size_finder is not None:
                size_finder.optimal_batch_size = results["scale_batch_size"]
        requested = {} if searches.rate_name is None else {"attr_name": searches.rate_name}
        if (arguments := _select_arguments(requested, rate_finder, argument="auto_lr_find")) is not None:
            results["lr_find"] = self.lr_find(model, *data, **{**arguments, **(rate_arguments or {})})
            if rate_finder is not None:
                rate_finder.optimal_lr = results["lr_find"]
        if not results:
            raise ConfigError("nothing to tune: say auto_lr_find=True or auto_scale_batch_size=True to the Trainer")
        self._searched = model
        return results

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
        """Search for a learning rate and set the module's attribute to the suggestion.

        Args:
            model: the LightningModule.
            train_dataloaders: as in `fit`.
            val_dataloaders: as in `fit`.
            datamodule: as in `fit`.
            method: "range" (Lightning's "fit") records the loss over `num_training` steps of a rising rate.
                "race" has candidates on a log grid start from the same weights and see the same batches; at a
                few rungs the worst are stopped, and the rest trains for `num_training` steps.
            min_lr: the lowest rate; the default is 1e-8 for "range" and 1e-5 for "race".
            max_lr: the highest rate.
            num_training: number of optimizer steps.
            mode: spacing of the rates of "range".
            early_stop_threshold: "range" ends when the smoothed loss is above this multiple of its minimum;
                None: never.
            num_candidates: number of rates of "race".
            update_attr: whether to set the attribute.
            attr_name: the attribute, else `lr` or `learning_rate`.

        Returns:
            The result, with `suggestion()`, `results` and `plot()`.

        Raises:
            ConfigError: an argument is not allowed, or there is no such attribute.
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
        if update_attr or is_race:  # a candidate's rate is set on the attribute that the module reads
            name = trial.find_attribute([attr_name] if attr_name else trial.RATE_NAMES, job, argument="lr_find")
        result: RangeCurve | RaceResult
        if is_race:
            race = LearningRateRace(min_lr, max_lr, num_candidates=num_candidates, num_steps=num_training)
            result = self._run_race(job, race, name=name)
        else:
            probe = RangeTest(
                min_lr=min_lr,
                max_lr=max_lr,
                num_steps=num_training,
                mode=mode,
                early_stop_threshold=early_stop_threshold,
            )
            result = self._run_range_test(job, probe)
        if update_attr and name is not None and (rate := result.suggestion()) is not None:
            trial.set_attribute(name, rate, job)
        return result

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
        """Search for a batch size per worker, set it on module or data module, and return it.

        Args:
            model: the LightningModule.
            train_dataloaders: as in `fit`; the loader has to come from a hook that reads the attribute.
            val_dataloaders: as in `fit`.
            datamodule: as in `fit`.
            mode: "power" finds the largest size that fits into memory, doubled from `init_val` until one does
                not fit or the data is a single batch. "binsearch" then halves the interval and lowers the
                result by `margin`. "throughput" finds the size with the most samples per second.
            steps_per_trial: optimizer steps of each trial.
            init_val: the first size.
            max_trials: maximum number of trials.
            batch_arg_name: the attribute of module or data module.
            margin: fraction by which "binsearch" lowers the result.
            max_val: the largest size.
            effective_batch_size: samples of an optimizer step over all workers, which the size has to divide;
                the Trainer's accumulate_grad_batches compensates. "keep", the default of "throughput", is the
                present number of module and Trainer; "any" lets it follow from the size.
            memory_limit_bytes: memory that a worker's training may allocate beyond its data and weights,
                instead of all that there is.

        Returns:
            The batch size per worker; `batch_sizes` has the whole result.

        Raises:
            ConfigError: an argument is not allowed, or there is no such attribute.
        """
        if mode not in get_args(SizeMode):
            raise ConfigError(f"mode={mode!r}: must be 'power', 'binsearch' or 'throughput'")
        check_count(1, steps_per_trial=steps_per_trial, init_val=init_val, max_trials=max_trials, max_val=max_val)
        if not isinstance(margin, (int, float)) or not 0 <= margin < 1:
            raise ConfigError(f"margin={margin!r}: must be a fraction of the size, from 0 to below 1")
        job = self._trainer.build_fit_job(model, train_dataloaders, val_dataloaders, datamodule)
        plan = self._trainer.plan
        check_limit(memory_limit_bytes, accelerator=plan.workers.accelerator)
        name = _find_size_attribute(batch_arg_name, job)
        is_speed = mode == "throughput"
        if effective_batch_size is None:
            effective_batch_size = "keep" if is_speed and job.module.automatic_optimization else "any"
        choices = BatchSizeChoices.from_request(
            effective_batch_size, job, plan, size=trial.get_attribute(name, job), max_size=max_val
        )
        search = SizeSearch(search_steps(mode, choices.sizes, first=init_val), num_trials=max_trials, choices=choices)
        callbacks: list[Callback] = [Stopwatch(num_steps=steps_per_trial, min_s=_MEASURED_S if is_speed else 0.0)]
        if memory_limit_bytes is not None:
            callbacks.append(MemoryLimit(memory_limit_bytes))
        # Larger batches are made of more data, regardless of the limits of a fit.
        limits = Limits(max_epochs=None, val_batches=0, sanity_val_batches=0)
        # Run batches with and without a step: accumulation keeps gradients beside each batch, and has its own speed.
        window = 1 if choices.is_never_accumulating else 2
        self._run(search, job, callbacks, limits=limits, window=window, name=name)
        margin = margin if mode == "binsearch" else 0.0
        self.batch_sizes = BatchSizes(search.trials, mode=mode, choices=choices, margin=margin)
        if (size := self.batch_sizes.suggestion()) is None:
            assert search.error is not None
            raise search.error
        trial.set_attribute(name, size, job)
        if choices.effective is not None:
            self._trainer.set_accumulation(choices.count_batches_per_step(size))
        return size

    # Helpers, in the order in which they are called

    @property
    def _finders(self) -> tuple[BatchSizeFinder | None, LearningRateFinder | None]:
        """Return the Trainer's finder callbacks; there are none in a run of a few batches."""
        callbacks = [] if self._trainer.plan.is_dev_run else self._trainer.callbacks
        sizes = [callback for callback in callbacks if isinstance(callback, BatchSizeFinder)]
        rates = [callback for callback in callbacks if isinstance(callback, LearningRateFinder)]
        if len(sizes) > 1 or len(rates) > 1:
            raise ConfigError(f"{len(sizes)} BatchSizeFinders and {len(rates)} LearningRateFinders: give one of each")
        return next(iter(sizes), None), next(iter(rates), None)

    def _run_race(self, job: Job, race: LearningRateRace, *, name: str | None) -> RaceResult:
        limits = self._build_endless_limits(max_steps=race.rungs[-1])
        self._run(race, job, [LossProbe(race.rungs)], limits=limits, name=name, rungs=race.rungs)
        return RaceResult(race)

    def _run_range_test(self, job: Job, probe: RangeTest) -> RangeCurve:
        search = _SingleTrialSearch()
        self._run(search, job, [probe], limits=self._build_endless_limits())
        lrs, losses = search.findings
        return RangeCurve(lrs=lrs, losses=losses, mode=probe.mode)

    def _build_endless_limits(self, *, max_steps: int | None = None) -> Limits:
        """Return the limits of a fit that repeats the same data without end and does not validate."""
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
            # Divergence and failures are a part of the search.
            optimization=replace(optimization, is_ending_on_nan=False, is_detecting_anomaly=False),
            reporting=Reporting(log_every_n_steps=1),  # the ranks agree on a stop wish at once
            seed=torch.initial_seed() % 2**63,
        )
        experiment = Experiment(
            plan=plan, random_state=format.random_state(plan.workers.accelerator), attribute=name, rungs=tuple(rungs)
        )
        # Hooks that log get a logger, which records nothing.
        loggers = [DummyLogger()] if job.loggers else []
        runner = _build_runner(plan, is_shown=any(isinstance(each, ProgressBar) for each in self._trainer.callbacks))
        runner.run(search, experiment, replace(job, callbacks=callbacks, profiler=None, loggers=loggers))


def _select_arguments(
    requested: dict[str, Any], finder: BatchSizeFinder | LearningRateFinder | None, *, argument: str
) -> dict[str, Any] | None:
    """Return the arguments of a search that the Trainer or a finder requests; None if neither does."""
    if requested and finder is not None:
        raise ConfigError(f"{argument} and a {type(finder).__name__}: give one of them")
    return requested or (None if finder is None else finder.arguments)


def _find_size_attribute(attribute: str, job: Job) -> str:
    name = trial.find_attribute([attribute], job, argument="scale_batch_size")
    if not is_from_hook(job, "train"):
        raise ConfigError(
            "scale_batch_size with a loader, whose batch size is fixed: define train_dataloader in the module or a "
            f"DataModule, and make the loader there with self.{name}"
        )
    return name


def _build_runner(plan: Plan, *, is_shown: bool) -> Runner:
    """Build the runner: Ray Tune with workers, unless this process is a Ray worker, whose trial trains by itself."""
    if plan.workers.num_workers > 0:
        # The import of Ray takes half a second, that of Ray Tune three seconds more.
        from raylit.driver.ray import local_cluster

        local_cluster.connect()
        if not local_cluster.is_in_worker():
            from raylit.tune.search.ray_tune_runner import TuneRunner

            return TuneRunner(is_shown=is_shown)
    return DirectRunner()


class _SingleTrialSearch:
    """Search with a single trial."""

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

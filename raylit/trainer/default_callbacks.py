"""Choose a Trainer's callbacks and loggers, from its arguments and defaults. Driver."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from raylit.callbacks.argument_callbacks import GradientAccumulationScheduler, ModelSummary
from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.model_checkpoint import FilenamePattern, ModelCheckpoint
from raylit.callbacks.monitors import DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor
from raylit.callbacks.on_exception_checkpoint import SavesOnException
from raylit.callbacks.progress_bar import ProgressBar
from raylit.callbacks.timer import Duration, Timer
from raylit.callbacks.weight_averaging import StochasticWeightAveraging
from raylit.config import Plan
from raylit.core.module import LightningModule
from raylit.errors import ConfigError
from raylit.loggers import Logger, TensorBoardLogger
from raylit.loggers.base import DummyLogger
from raylit.storage import absolute, join
from raylit.worker.process.logger_proxy import LoggerFacts

_Any = TypeVar("_Any")
_Callback = TypeVar("_Callback", bound=DriverCallback)


def choose_callbacks(
    *,
    callbacks: Callback | DriverCallback | Sequence[Callback | DriverCallback] | None,
    enable_checkpointing: bool | ModelCheckpoint,
    early_stop_callback: bool | EarlyStopping,
    enable_progress_bar: bool | ProgressBar,
    enable_model_summary: bool | ModelSummary,
    max_time: Duration | None,
    fast_dev_run: bool | int,
) -> list[Callback | DriverCallback]:
    """Return the given callbacks and those that bool arguments and defaults add."""
    one_or_more = [] if callbacks is None else callbacks
    given: list[Any] = list(one_or_more) if isinstance(one_or_more, (list, tuple)) else [one_or_more]
    _check_kinds(given, "callbacks holds")
    bars = _choose_of_kind(ProgressBar, given, ProgressBar, enable_progress_bar=enable_progress_bar)
    summaries = _choose_of_kind(ModelSummary, given, ModelSummary, enable_model_summary=enable_model_summary)
    saves = _choose_of_kind(
        ModelCheckpoint, given, ModelCheckpoint.automatic, enable_checkpointing=enable_checkpointing
    )
    # False is the default here, so it does not contradict a callback of the user's.
    is_stopping = early_stop_callback or any(isinstance(callback, EarlyStopping) for callback in given)
    stops = _choose_of_kind(EarlyStopping, given, EarlyStopping, early_stop_callback=is_stopping)
    if max_time is not None and any(isinstance(callback, Timer) for callback in given):
        raise ConfigError("max_time and a Timer callback: give one of them")
    timers = [] if max_time is None or fast_dev_run else [Timer(max_time)]
    # An argument such as enable_checkpointing may hold a callback, which is then not in `given`.
    chosen: list[Callback | DriverCallback] = [*bars, *summaries, *given, *timers, *stops, *saves]
    kept = [callback for callback in chosen if not (fast_dev_run and isinstance(callback, ModelCheckpoint))]
    return _drop_duplicates(kept)


def _choose_of_kind(
    kind: type[_Callback], given: list[Any], default: Callable[[], _Callback], **switch: bool | _Callback
) -> list[_Callback]:
    """Return the callbacks of a kind: the argument's and the user's, else the default one if the argument is True."""
    [(name, value)] = switch.items()
    own = [callback for callback in given if isinstance(callback, kind)]
    if isinstance(value, kind):
        return _drop_duplicates([value, *own])
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: must be True, False or a {kind.__name__}")
    if own and not value:
        raise ConfigError(f"{name}=False, but callbacks holds a {kind.__name__}: leave one of them out")
    return own or ([default()] if value else [])


def _drop_duplicates(callbacks: Sequence[_Any]) -> list[_Any]:
    """Return each object once, by identity: users' callbacks may be unhashable, or equal to each other."""
    return list({id(callback): callback for callback in callbacks}.values())


def merge_module_callbacks(
    callbacks: Sequence[Callback | DriverCallback], module: LightningModule
) -> list[Callback | DriverCallback]:
    """Return the callbacks with those of the module's `configure_callbacks`, which replace others of their class."""
    answer = module.configure_callbacks()
    own = list(answer) if isinstance(answer, (list, tuple)) else [answer]
    _check_kinds(own, "configure_callbacks returned")
    kinds = {type(callback) for callback in own} - {Callback, DriverCallback}
    return [*(callback for callback in callbacks if type(callback) not in kinds), *own]


def split_callbacks(callbacks: Sequence[Callback | DriverCallback]) -> tuple[list[Callback], list[DriverCallback]]:
    """Split callbacks into the workers' and the driver's.

    The driver's are sorted: bars and summaries first, checkpointing last, so that it sees what the others decided.

    Raises:
        ConfigError: If two callbacks would keep their state under one key.
    """
    _check_state_keys(callbacks)
    drivers = [callback for callback in callbacks if isinstance(callback, DriverCallback)]
    return [callback for callback in callbacks if isinstance(callback, Callback)], sorted(drivers, key=_sort_key)


def apply_callbacks(plan: Plan, callbacks: Sequence[Callback | DriverCallback], *, has_loggers: bool) -> Plan:
    """Return the plan with the settings that callbacks make, such as the depth of the summary.

    Raises:
        ConfigError: If a callback needs a logger or a limit that is missing.
    """
    for callback in callbacks:
        is_logging = isinstance(callback, (DeviceStatsMonitor, LearningRateMonitor, ThroughputMonitor))
        if is_logging and not has_loggers and not plan.is_dev_run:
            raise ConfigError(f"{type(callback).__name__} has no logger to log to: leave it out, or logger=False")
        if isinstance(callback, StochasticWeightAveraging) and plan.limits.max_epochs is None:
            raise ConfigError("StochasticWeightAveraging needs max_epochs, to know which epochs are the last")
    summary = next((callback for callback in callbacks if isinstance(callback, ModelSummary)), None)
    depth = None if summary is None else summary.max_depth
    plan = replace(plan, reporting=replace(plan.reporting, summary_depth=depth))
    schedulers = [callback for callback in callbacks if isinstance(callback, GradientAccumulationScheduler)]
    if not schedulers:
        return plan
    if len(schedulers) > 1 or plan.optimization.accumulation != ((0, 1),):
        other = "a second one" if len(schedulers) > 1 else "accumulate_grad_batches"
        raise ConfigError(f"GradientAccumulationScheduler and {other}: give one of them")
    accumulation = tuple(sorted(schedulers[0].scheduling.items()))
    return replace(plan, optimization=replace(plan.optimization, accumulation=accumulation))


def is_showing_progress(callbacks: Sequence[DriverCallback]) -> bool:
    """Return whether a fit shows what it does: it has a progress bar or prints the model's summary."""
    return any(
        isinstance(callback, ModelSummary) or (isinstance(callback, ProgressBar) and callback.refresh_rate > 0)
        for callback in callbacks
    )


def build_exception_callbacks(callbacks: Sequence[DriverCallback], *, log_dir: str) -> list[Callback]:
    """Build the workers' callbacks for each ModelCheckpoint that saves when a worker's hook raises."""
    saves = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one.save_on_exception]
    directory = join(absolute(log_dir), "checkpoints")
    return [
        SavesOnException(FilenamePattern.from_options(one, directory=directory), first_version=one.first_version)
        for one in saves
    ]


def _sort_key(callback: DriverCallback) -> int:
    """Return the place in the order: ProgressBar, ModelSummary, others, ModelCheckpoint."""
    kinds: tuple[type, ...] = (ProgressBar, ModelSummary, DriverCallback)
    return (
        3 if isinstance(callback, ModelCheckpoint) else next(i for i, k in enumerate(kinds) if isinstance(callback, k))
    )


def _check_kinds(callbacks: Sequence[Any], where: str) -> None:
    for callback in callbacks:
        if not isinstance(callback, (Callback, DriverCallback)):
            raise ConfigError(f"{where} a {type(callback).__name__}: must be a Callback or a DriverCallback")


def _check_state_keys(callbacks: Sequence[Callback | DriverCallback]) -> None:
    seen: set[str] = set()
    for callback in callbacks:
        base = Callback if isinstance(callback, Callback) else DriverCallback
        if type(callback).state_dict is base.state_dict:
            continue
        if callback.state_key in seen:
            kind = type(callback).__name__
            raise ConfigError(
                f"two callbacks keep their state under {callback.state_key!r}: leave one {kind} out, or have "
                "state_key tell them apart"
            )
        seen.add(callback.state_key)


def build_loggers(*, logger: Any, fast_dev_run: bool | int, default_root_dir: str) -> list[Logger]:
    """Build the loggers, by default TensorBoard's; a fast_dev_run has a DummyLogger, for the hooks that log."""
    if isinstance(logger, bool):
        loggers: list[Logger] = [TensorBoardLogger()] if logger else []
    else:
        loggers = list(logger) if isinstance(logger, (list, tuple)) else [logger]
    for each in loggers:
        if not isinstance(each, Logger):
            raise ConfigError(f"logger={each!r}: must be True, False, a Logger or a list of them")
    if fast_dev_run and loggers:
        return [DummyLogger()]
    for each in loggers:
        each.bind(default_root_dir)
    return loggers


def build_hook_loggers(loggers: Sequence[Logger], *, num_workers: int) -> list[Logger | LoggerFacts]:
    """Return what hooks get as loggers: the loggers themselves in this process, their LoggerFacts on workers."""
    return [
        logger if num_workers == 0 or isinstance(logger, DummyLogger) else LoggerFacts.from_logger(logger, index)
        for index, logger in enumerate(loggers)
    ]

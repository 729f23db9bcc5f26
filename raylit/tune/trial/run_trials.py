"""Trainings as the trials of one Ray Tune run, on warm workers. Driver."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cloudpickle
from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import PopulationBasedTraining

from raylit.checkpoint import format
from raylit.compat.ray_core import load_exit_imports
from raylit.compat.ray_tune import list_trials, replace_controller, set_trial_variables
from raylit.driver.ray import local_cluster
from raylit.errors import ConfigError
from raylit.protocol.messages import pack
from raylit.protocol.process_settings import TorchSettings, variables_for_live_processes, variables_for_new_processes
from raylit.storage import is_url, join, list_names, remove_directory
from raylit.tune.records import CHECKPOINT, Mode, TrialRecord, TrialStatus
from raylit.tune.trial.progress import (
    FatalErrorStopper,
    ProgressReporter,
    ReportHistory,
    format_error,
    read_error,
    read_history,
)
from raylit.tune.trial.resources import TrialResources
from raylit.tune.trial.trainable import TrainingFunction, Trial, TrialFailed, TrialSettings, UnknownMetric
from raylit.tune.trial.trial_thread import IS_LAST

_ENVIRONMENT = {
    # raylit prints a table at the end and a line now and then, in place of Tune's output.
    "RAY_AIR_NEW_OUTPUT": "0",
    # Histories are read from one kind of file; figures and TensorBoard files are raylit's own.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial checks its first result itself, and names the metrics that there are.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Settings by which the trials of a run are chosen, compared and kept."""

    title: str
    """Title of progress lines, such as "sweep"."""
    directory: str
    """Directory of all files of the run: an absolute path or a URL, whose last part is the run's name."""
    metric: str | None
    mode: Mode = "min"
    num_samples: int = 1
    scheduler: Any = None
    searcher: Any = None
    max_concurrent: int | None = None
    num_checkpoints: int | None = 1
    """Number of best checkpoints that each trial keeps, with the newest; None: all, 0: only those a scheduler needs."""
    max_failures: int = 0
    """Number of retries of a failed trial from its newest checkpoint."""
    is_resuming: bool = False
    is_shown: bool = True


def run_trials(
    training: TrainingFunction, space: Mapping[str, Any], *, resources: TrialResources, run: Run
) -> list[TrialRecord]:
    """Run trials and return their records. A trial takes over the resources and processes of a finished one.

    Raises:
        KeyboardInterrupt: the run was interrupted; finished work is kept for `is_resuming`.
    """
    accelerator = resources.workers.accelerator
    settings = TrialSettings(
        training=cloudpickle.dumps(training),
        directory=run.directory,
        metric=run.metric,
        is_saving=run.num_checkpoints != 0,
        import_path=tuple(os.path.abspath(path) for path in sys.path),
        accelerator=cloudpickle.dumps(accelerator),
        random_state=pack(format.random_state(accelerator)),
        torch_settings=TorchSettings.current(),
        process_settings=local_cluster.settings_for_workers(),
        variables=variables_for_live_processes(
            local_cluster.environment_of_workers(),
            is_whole=local_cluster.is_embedded(),
            fixed=local_cluster.fixed_variables(),
        ),
    )
    trainable = tune.with_resources(tune.with_parameters(Trial, settings=settings), resources.placement)
    with (
        _environment(run),
        # On raylit's own node trials have the driver's variables. On a cluster they need those that Tune passes on.
        set_trial_variables(
            variables_for_new_processes(local_cluster.environment_of_workers(), fixed=local_cluster.fixed_variables()),
            is_pooled=local_cluster.is_embedded(),
        ),
        _silence_tune_log(),
        replace_controller(is_reusable_after=_is_reusable_after),
        _restore_signals() as was_interrupted,
    ):
        results = _build_tuner(trainable, space, resources, run).fit()
    if was_interrupted():
        sys.stderr.write(f"raylit: {run.title}: interrupted; what there is stays in {run.directory}\n")
        load_exit_imports()
        raise KeyboardInterrupt
    # A resumed run has the trials in another order; their tags begin with their numbers.
    trials: list[TuneTrial] = sorted(list_trials(results), key=lambda trial: int(trial.experiment_tag.split("_")[0]))
    for trial in trials:
        if isinstance(error := read_error(trial), UnknownMetric):
            raise ConfigError(str(error))
    if run.num_checkpoints is not None:
        _prune(trials, run)
    return [_build_record(trial, run) for trial in trials]


def _build_tuner(trainable: Any, space: Mapping[str, Any], resources: TrialResources, run: Run) -> tune.Tuner:
    if run.is_resuming and tune.Tuner.can_restore(run.directory):
        return _restore_tuner(trainable, space, run)
    storage_path, _, name = run.directory.rpartition("/")
    stopper = FatalErrorStopper()
    progress_reporter = ProgressReporter(
        title=run.title,
        metric=run.metric,
        mode=run.mode,
        demand=resources.demand,
        stopper=stopper,
        is_shown=run.is_shown,
    )
    return tune.Tuner(
        trainable,
        param_space=dict(space),
        tune_config=tune.TuneConfig(
            metric=run.metric,
            mode=None if run.metric is None else run.mode,
            num_samples=run.num_samples,
            scheduler=run.scheduler,
            search_alg=run.searcher,
            max_concurrent_trials=run.max_concurrent,
            reuse_actors=True,
            trial_name_creator=_name_trial,
            trial_dirname_creator=_name_trial,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=storage_path,
            verbose=0,
            callbacks=[ReportHistory(run.directory), progress_reporter],
            stop=stopper,
            failure_config=tune.FailureConfig(max_failures=run.max_failures),
            checkpoint_config=_build_checkpoint_config(run),
        ),
    )


def _restore_tuner(trainable: Any, space: Mapping[str, Any], run: Run) -> tune.Tuner:
    """Restore Tune's tuner: unfinished trials go on from their newest checkpoints, and failed ones are retried."""
    try:
        return tune.Tuner.restore(
            run.directory, trainable, param_space=dict(space), resume_unfinished=True, resume_errored=True
        )
    except ValueError as error:
        raise ConfigError(f"{run.directory} cannot be resumed: the space is another. {error}") from error


def _build_checkpoint_config(run: Run) -> tune.CheckpointConfig:
    """Build Tune's checkpoint settings.

    If no checkpoints are kept, those of a scheduler that pauses trials are used once each.
    """
    return tune.CheckpointConfig(
        num_to_keep=None if _is_copying(run) else run.num_checkpoints or (1 if run.num_checkpoints == 0 else None),
        checkpoint_score_attribute=run.metric,
        checkpoint_score_order=run.mode,
        checkpoint_at_end=False,
    )


def _is_copying(run: Run) -> bool:
    """Return whether trials may copy each other's checkpoints at any time, so that Tune must keep them to the end."""
    return isinstance(run.scheduler, PopulationBasedTraining) or run.scheduler in ("pbt", "pb2")


def _prune(trials: list[TuneTrial], run: Run) -> None:
    """Remove all checkpoints but each trial's best ones and its newest.

    Removed are those of trials that copy each other's, and those that Tune does not know of, as a pause came before
    the end of the save.
    """
    kept = set()
    for trial in trials:
        manager = trial.run_metadata.checkpoint_manager
        if manager is not None:
            best = [manager.best_checkpoint_result] if _is_copying(run) else manager.best_checkpoint_results
            results = [result for result in (*best, manager.latest_checkpoint_result) if result is not None]
            kept |= {
                _identify_checkpoint(result.checkpoint.path) for result in results if result.checkpoint is not None
            }
    for trial in trials:
        directory = join(run.directory, _name_trial(trial))
        for name in list_names(directory):
            path = join(directory, name)
            if name.startswith("checkpoint_") and _identify_checkpoint(path) not in kept:
                remove_directory(path)


def _identify_checkpoint(checkpoint: str) -> tuple[str, ...]:
    """Return the names of the trial's directory and of the checkpoint's own, of a path or URL."""
    return tuple(checkpoint.rstrip("/").split("/")[-2:])


def _name_trial(trial: TuneTrial) -> str:
    return f"trial_{trial.trial_id}"


def _is_reusable_after(exception: Exception | None) -> bool:
    """Return whether a trial's process and workers can be reused after the exception with which the trial failed."""
    cause = getattr(exception, "cause", None)
    return isinstance(cause, TrialFailed) and cause.is_harmless


@contextlib.contextmanager
def _environment(run: Run) -> Iterator[None]:
    """Set Tune's environment variables, which it reads while it runs."""
    variables, locks = dict(_ENVIRONMENT), None
    if run.is_resuming and not is_url(run.directory):
        # Tune locks what it reads there by files in Ray's temporary directory, which it leaves behind.
        locks = tempfile.TemporaryDirectory(prefix="raylit-", ignore_cleanup_errors=True)
        variables["RAY_TMPDIR"] = locks.name
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if locks is not None:
            locks.cleanup()


@contextlib.contextmanager
def _silence_tune_log() -> Iterator[None]:
    """Suppress Tune's log of failures, which raylit reports itself."""
    logger = logging.getLogger("ray.tune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _restore_signals() -> Iterator[Any]:
    """Restore signal handlers that Tune replaces to end in good order after Ctrl-C.

    Yields a function that returns whether there was an interrupt.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    is_interrupted = False
    try:
        yield lambda: is_interrupted
        # Tune's handler restores the former one when it is called.
        is_interrupted = signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _build_record(trial: TuneTrial, run: Run) -> TrialRecord:
    history = tuple(read_history(trial.trial_id, run.directory))
    metrics = history[-1] if history else {}
    statuses: dict[str, TrialStatus] = {"ERROR": "failed", "TERMINATED": "finished"}
    status = statuses.get(trial.status, "unfinished")
    last = trial.last_result or {}
    if status == "finished" and last.get(IS_LAST) is False:
        status = "stopped"
    manager = trial.run_metadata.checkpoint_manager
    best = None if manager is None else manager.best_checkpoint_result
    checkpoint = None if best is None else best.checkpoint
    directory = join(run.directory, _name_trial(trial))
    return TrialRecord(
        id=trial.trial_id,
        config=dict(trial.config),
        status=status,
        metrics=metrics,
        history=history,
        checkpoint=None if checkpoint is None else join(directory, os.path.basename(checkpoint.path), CHECKPOINT),
        directory=directory,
        error=None if status != "failed" else format_error(read_error(trial)),
    )

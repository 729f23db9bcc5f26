"""Sweep over hyper-parameters, each trial a fit. Driver; `_Training` in the trials' processes."""

import copy
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cloudpickle

from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.checkpoint import format
from raylit.config import Workers
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.errors import ConfigError, ModuleError, shows_user_frames
from raylit.loggers import TensorBoardLogger
from raylit.storage import absolute, join, list_names
from raylit.trainer.arguments.training import check_count
from raylit.trainer.trainer import Trainer
from raylit.tune.figures import begin_import, can_draw_figures
from raylit.tune.records import Mode
from raylit.tune.sweep.result import SweepResult

if TYPE_CHECKING:
    from raylit.tune.trial.trainable import TrialContext

Build = Callable[[dict[str, Any]], Any]
"""Function of a config that returns a LightningModule, or a tuple that starts with it.

A DataModule, or the loaders for training and validation, may follow, and last a dict of Trainer arguments for this
trial alone.
"""

_TITLE = "sweep"
_FOLDER = "sweeps"
"""Folder of sweeps below the root directory."""
_PERTURBED = "perturbed_"
_KEEP_S = 3600.0
"""Seconds for which idle workers are kept: as long as the trial's actor, which may wait for its next trial."""
_OLDER_NAMES = {
    "enable_progress_bar": "progress_bar_refresh_rate",
    "enable_model_summary": "weights_summary",
    "enable_checkpointing": "checkpoint_callback",
}
_WORKER_ARGUMENTS = frozenset(
    {
        "num_workers", "gpus", "tpu_cores", "num_nodes", "num_processes", "accelerator", "devices",
        "topology", "accelerator_version",
        "resources_per_worker", "placement", "label_selector", "start_timeout_s", "ping_timeout_s", "keep_workers_s",
    }
)  # fmt: skip
"""Trainer arguments that are the same for all trials, as they decide the placement group."""


@shows_user_frames
def sweep(
    build: Build,
    space: Mapping[str, Any],
    *,
    metric: str,
    mode: Mode = "min",
    num_samples: int = 1,
    num_workers: int | None = None,
    scheduler: Any = None,
    searcher: Any = None,
    max_concurrent: int | None = None,
    max_failures: int = 0,
    name: str | None = None,
    resume: bool = False,
    default_root_dir: str | os.PathLike[str] | None = None,
    **trainer_arguments: Any,
) -> SweepResult:
    """Fit what `build(config)` returns for configs from `space`, in parallel on the cluster's free resources.

    Each trial reports after every validation, with a checkpoint, and waits for the scheduler's decision before it
    goes on. If only this host can see the directory, the trials' own processes run on this host and their workers, at
    least one per trial, anywhere.

    Args:
        build: function of a config that returns a LightningModule, (module, data module) or (module, train
            loader, validation loader), optionally with a dict of Trainer arguments of this trial at the end.
        space: Ray Tune's search space.
        metric: name of the logged metric by which trials are compared.
        mode: "min" or "max".
        num_samples: number of samples from the space.
        num_workers: workers of a trial, which the next trial takes over warm; with 0 the trial's own process trains.
        scheduler: Ray Tune's scheduler (ASHA, population based training, ...), without metric and mode.
        searcher: Ray Tune's searcher (Optuna, ...), without metric and mode.
        max_concurrent: maximum number of trials at the same time.
        max_failures: number of retries of a failed trial from its newest checkpoint.
        name: name of the sweep; the default is the time of its start.
        resume: whether to continue the sweep of that name, if there is one.
        default_root_dir: directory or URL; everything is kept in `default_root_dir/sweeps/name`.
        trainer_arguments: arguments of the Trainer; `enable_checkpointing=False` keeps no checkpoints.

    Returns:
        The trials and the best of them. Failed trials are in `SweepResult.errors`.

    Raises:
        ConfigError: an argument is not allowed, or the metric is never logged.
        ResourcesError: a single trial does not fit into the cluster, nor into what its autoscaler can add.
    """
    _check(build, space, metric=metric, mode=mode, num_samples=num_samples, max_failures=max_failures)
    for argument, given in (("scheduler", scheduler), ("searcher", searcher)):
        _check_has_no_metric(argument, given)
    # The import of Ray Tune takes seconds, which only a sweep should pay.
    from raylit.tune.sweep.tensorboard_hparams import write_experiment
    from raylit.tune.trial.resources import find_trial_resources
    from raylit.tune.trial.run_trials import Run, run_trials

    directory, is_resuming = _choose_directory(default_root_dir, name, is_resuming=resume)
    arguments = _build_trial_arguments(trainer_arguments)
    workers = Trainer(num_workers=num_workers, default_root_dir=directory, **arguments).plan.workers
    resources = find_trial_resources(workers, title=_TITLE, directory=directory)
    is_saving = trainer_arguments.get("enable_checkpointing", trainer_arguments.get("checkpoint_callback", True))
    run = Run(
        title=_TITLE,
        directory=directory,
        metric=metric,
        mode=mode,
        num_samples=num_samples,
        scheduler=scheduler,
        searcher=searcher,
        max_concurrent=max_concurrent,
        num_checkpoints=0 if is_saving is False else 1,
        max_failures=max_failures,
        is_resuming=is_resuming,
    )
    training = _Training(
        build=build, metric=metric, mode=mode, workers=resources.workers, arguments=cloudpickle.dumps(arguments)
    )
    if arguments.get("logger", True) is True:
        write_experiment(directory, space, metric=metric)
    if can_draw_figures():
        begin_import()
    records = run_trials(training, space, resources=resources, run=run)
    result = SweepResult(records, metric=metric, mode=mode, directory=directory, build_module=training.build_module)
    result.show()
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Training:
    """Training function of a sweep's trials."""

    build: Build
    metric: str
    mode: Mode
    workers: Workers
    arguments: bytes
    """Pickled Trainer arguments, as each trial needs its own copies of callbacks."""

    def __call__(self, trial: "TrialContext") -> None:
        result = _BuildResult.from_returned(self.build(dict(trial.config)))
        arguments = {**cloudpickle.loads(self.arguments), **result.arguments}
        user_callbacks = _list_callbacks(arguments.pop("callbacks", None))
        own: list[Callback | DriverCallback] = [trial.reporter]
        if trial.is_perturbed:
            from raylit.callbacks.perturbed import PerturbedHyperparameters

            own.append(PerturbedHyperparameters())
        if arguments.get("logger", True) is True:
            from raylit.tune.sweep.tensorboard_hparams import HParamsSession

            arguments["logger"] = logger = _build_logger(trial)
            name = "/".join([trial.id, *([str(logger.version)] if logger.version else [])])
            own.insert(0, HParamsSession(trial.config, name=name, logger=logger, metric=self.metric, mode=self.mode))
        trainer = Trainer(
            callbacks=[*user_callbacks, *own],
            default_root_dir=trial.directory,
            **self._replace_worker_arguments(arguments),
        )
        train, validate = result.loaders
        trainer.fit(result.module, train, validate, datamodule=result.datamodule, ckpt_path=trial.checkpoint)

    def build_module(self, config: dict[str, Any]) -> LightningModule:
        """Build the config's module, and leave the random state unchanged."""
        accelerator = self.workers.accelerator
        state = format.random_state(accelerator)
        try:
            return _BuildResult.from_returned(self.build(copy.deepcopy(config))).module
        finally:
            format.set_random_state(state, accelerator)

    def _replace_worker_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Replace worker arguments by what the driver made of them, as other devices may be visible here."""
        kept = {name: value for name, value in arguments.items() if name not in _WORKER_ARGUMENTS}
        workers = self.workers
        if workers.num_workers > 0:
            kept.update(
                num_nodes=workers.num_nodes or 1,
                resources_per_worker=workers.resources_per_worker,
                placement=None if workers.num_nodes else workers.placement,
                label_selector=workers.label_selector,
                keep_workers_s=_KEEP_S,
            )
        return {
            **kept,
            "num_workers": workers.num_workers,
            "accelerator": workers.accelerator,
            "start_timeout_s": workers.start_timeout_s,
            "ping_timeout_s": workers.given_ping_timeout_s,
        }


def _build_logger(trial: "TrialContext") -> TensorBoardLogger:
    """Build the logger of a trial, in its directory.

    A training with a perturbed config gets a run of its own below it, as hyper-parameters belong to a run. The sweep
    writes what the HParams page shows.
    """
    version = ""
    if trial.is_perturbed:
        num_before = sum(name.startswith(_PERTURBED) for name in list_names(trial.directory))
        version = f"{_PERTURBED}{num_before + 1}"
    return TensorBoardLogger(trial.directory, name="", version=version, default_hp_metric=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _BuildResult:
    """Parts of what `build` has returned."""

    module: LightningModule
    datamodule: DataModule | None
    loaders: tuple[Any, Any]
    """Loaders for training and validation; None: the module's own."""
    arguments: dict[str, Any]

    @classmethod
    def from_returned(cls, returned: Any) -> "_BuildResult":
        """Split what `build` has returned.

        Raises:
            ModuleError: it has another form.
            ConfigError: its Trainer arguments are the same for all trials.
        """
        parts = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        arguments = parts.pop() if len(parts) > 1 and isinstance(parts[-1], dict) else {}
        if not parts or not isinstance(parts[0], LightningModule) or len(parts) > 3:
            raise ModuleError(
                f"build returned {_format_types(returned)}: it must be a LightningModule, (module, data module) or "
                "(module, train loader, validation loader), and may end with a dict of Trainer arguments"
            )
        if fixed := sorted(_WORKER_ARGUMENTS & arguments.keys()):
            raise ConfigError(
                f"build returned the Trainer arguments {fixed}: these are the same for all trials, say them to sweep"
            )
        module, *data = parts
        if len(data) == 1 and isinstance(data[0], DataModule):
            return cls(module=module, datamodule=data[0], loaders=(None, None), arguments=arguments)
        train, validate = [*data, None, None][:2]
        return cls(module=module, datamodule=None, loaders=(train, validate), arguments=arguments)


def _format_types(returned: Any) -> str:
    if isinstance(returned, (tuple, list)):
        return "(" + ", ".join(type(part).__name__ for part in returned) + ")"
    return f"a {type(returned).__name__}"


def _build_trial_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the Trainer's arguments in a trial: without output, with the sweep's checkpoints instead of its own."""
    saving = ("enable_checkpointing", "checkpoint_callback")
    arguments = {name: value for name, value in given.items() if name not in saving}
    for name, older in _OLDER_NAMES.items():
        if name not in given and older not in given:
            arguments[name] = False
    own = given.get("enable_checkpointing", given.get("checkpoint_callback"))
    has_own = any(isinstance(callback, ModelCheckpoint) for callback in _list_callbacks(given.get("callbacks")))
    arguments["enable_checkpointing"] = own if isinstance(own, ModelCheckpoint) else has_own
    return arguments


def _list_callbacks(callbacks: Any) -> list[Callback | DriverCallback]:
    """Return the Trainer's argument `callbacks`, which may be one or none, as a list."""
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]


def _check(build: Any, space: Any, *, metric: Any, mode: Any, num_samples: int, max_failures: int) -> None:
    if not callable(build) or (isinstance(build, type) and issubclass(build, LightningModule)):
        raise ConfigError(f"build={build!r}: must be a function of a config that returns a LightningModule")
    if not isinstance(space, Mapping):
        raise ConfigError(f"space={space!r}: must be a dict such as {{'lr': tune.loguniform(1e-4, 1e-1)}}")
    if not isinstance(metric, str) or not metric:
        raise ConfigError(f"metric={metric!r}: must be the name of a logged metric, such as 'val_loss'")
    if mode not in ("min", "max"):
        raise ConfigError(f"mode={mode!r}: must be 'min' or 'max'")
    check_count(1, num_samples=num_samples)
    check_count(0, max_failures=max_failures)


def _check_has_no_metric(name: str, given: Any) -> None:
    if given is None:
        return
    from raylit.compat.ray_tune import has_metric

    if has_metric(given):
        raise ConfigError(f"{name}={type(given).__name__}(metric=...): leave metric and mode out, sweep passes its own")


def _choose_directory(root: str | os.PathLike[str] | None, name: str | None, *, is_resuming: bool) -> tuple[str, bool]:
    """Return the directory of the sweep and whether there is a sweep to resume.

    Raises:
        ConfigError: there is one and it is not to be resumed, or the name is missing or not allowed.
    """
    # A file: URL is treated as a path, also where only some hosts can see it.
    folder = join(absolute(os.fspath(root or os.getcwd()).removeprefix("file://")), _FOLDER)
    if name is None:
        if is_resuming:
            raise ConfigError("resume=True needs the name of the sweep to continue")
        name = time.strftime("%Y-%m-%d_%H-%M-%S")
    if not name or "/" in name:
        raise ConfigError(f"name={name!r}: must be the name of a directory")
    directory = join(folder, name)
    has_files = bool(list_names(directory))
    if has_files and not is_resuming:
        raise ConfigError(f"{directory} holds a sweep already: say resume=True to continue it, or give another name")
    return directory, has_files

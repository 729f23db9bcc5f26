"""sweep: a search over hyper-parameters, each trial a fit. Driver, and `_Training` in the trials' processes."""

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
from raylit.config.plan import Workers
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.errors import ConfigError, ModuleError, shows_user_frames
from raylit.loggers import TensorBoardLogger
from raylit.storage import absolute, entries, join
from raylit.trainer.arguments.checks import check_count
from raylit.trainer.trainer import Trainer
from raylit.tune.records import Mode
from raylit.tune.sweep.figures import begin_import, is_pictured
from raylit.tune.sweep.result import SweepResult

if TYPE_CHECKING:
    from raylit.tune.trial.trainable import TrialContext

Build = Callable[[dict[str, Any]], Any]
"""A config's LightningModule; or a tuple that starts with it: then a DataModule, or the loaders for training and
validation, and last a dict of Trainer arguments of this trial alone."""

_TITLE = "sweep"
_PLACE = "sweeps"
"""Below the root directory."""
_PERTURBED = "perturbed_"
_KEEP_S = 3600.0
"""A trial's workers stay while its actor does, which may wait for its next trial."""
_EARLIER = {
    "enable_progress_bar": "progress_bar_refresh_rate",
    "enable_model_summary": "weights_summary",
    "enable_checkpointing": "checkpoint_callback",
}
_OF_WORKERS = frozenset(
    {
        "num_workers", "gpus", "tpu_cores", "num_nodes", "num_processes", "accelerator", "devices",
        "resources_per_worker", "placement", "label_selector", "start_timeout_s", "ping_timeout_s", "keep_workers_s",
    }
)  # fmt: skip
"""Trainer arguments that all trials have in common, as they decide the placement group."""


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

    `space`, `scheduler` (ASHA, population based training, ...) and `searcher` (Optuna, ...) are Ray Tune's; the last
    two get `metric` and `mode` from here. Each trial reports after every validation, with a checkpoint, and obeys the
    scheduler before it goes on. It has `num_workers` workers, which the next trial takes over warm; with 0 the trial's
    own process trains. Everything is kept in `default_root_dir/sweeps/name`, on a disk or at a URL; `resume` continues
    what is there, else starts. Where only this host sees that directory, the trials' own processes stand on it and
    their workers, of which there is one at least, anywhere. Other arguments are the Trainer's;
    `enable_checkpointing=False` keeps no checkpoints.

    ConfigError: a metric that is never logged. ResourcesError: a single trial does not fit into the cluster, nor into
    what an autoscaler can make of it. Trials that fail end alone, after `max_failures` more attempts from their newest
    checkpoints: see `SweepResult.errors`.
    """
    _check(build, space, metric=metric, mode=mode, num_samples=num_samples, max_failures=max_failures)
    for named, given in (("scheduler", scheduler), ("searcher", searcher)):
        _check_has_no_metric(named, given)
    # Importing Ray Tune takes seconds, which only a sweep should pay.
    from raylit.tune.sweep.tensorboard_hparams import write_experiment
    from raylit.tune.trial.resources import find_trial_resources
    from raylit.tune.trial.run_trials import Run, run_trials

    directory, is_resuming = _directory(default_root_dir, name, is_resuming=resume)
    arguments = _of_trials(trainer_arguments)
    workers = Trainer(num_workers=num_workers, default_root_dir=directory, **arguments).plan.workers
    room = find_trial_resources(workers, title=_TITLE, directory=directory)
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
        build=build, metric=metric, mode=mode, workers=room.workers, arguments=cloudpickle.dumps(arguments)
    )
    if arguments.get("logger", True) is True:
        write_experiment(directory, space, metric=metric)
    if is_pictured():
        begin_import()
    records = run_trials(training, space, room=room, run=run)
    result = SweepResult(records, metric=metric, mode=mode, directory=directory, module_of=training.module_of)
    result.show()
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Training:
    """The Recipe of a sweep's trials."""

    build: Build
    metric: str
    mode: Mode
    workers: Workers
    arguments: bytes
    """Trainer arguments, pickled: each trial has callbacks of its own."""

    def __call__(self, trial: "TrialContext") -> None:
        built = _Built.of(self.build(dict(trial.config)))
        arguments = {**cloudpickle.loads(self.arguments), **built.arguments}
        given = _listed(arguments.pop("callbacks", None))
        own: list[Callback | DriverCallback] = [trial.reporter]
        if trial.is_perturbed:
            from raylit.callbacks.perturbed import PerturbedHyperparameters

            own.append(PerturbedHyperparameters())
        if arguments.get("logger", True) is True:
            from raylit.tune.sweep.tensorboard_hparams import Session

            arguments["logger"] = logger = _logger(trial)
            name = "/".join([trial.id, *([str(logger.version)] if logger.version else [])])
            own.insert(0, Session(trial.config, name=name, logger=logger, metric=self.metric, mode=self.mode))
        trainer = Trainer(callbacks=[*given, *own], default_root_dir=trial.directory, **self._of_workers(arguments))
        train, validate = built.loaders
        trainer.fit(built.module, train, validate, datamodule=built.datamodule, ckpt_path=trial.checkpoint)

    def module_of(self, config: dict[str, Any]) -> LightningModule:
        """The config's module as it was built, the generators left as they are."""
        accelerator = self.workers.accelerator
        state = format.random_state(accelerator)
        try:
            return _Built.of(self.build(copy.deepcopy(config))).module
        finally:
            format.set_random_state(state, accelerator)

    def _of_workers(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the driver has made of the arguments: here, other devices may be seen."""
        kept = {name: value for name, value in arguments.items() if name not in _OF_WORKERS}
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


def _logger(trial: "TrialContext") -> TensorBoardLogger:
    """In the trial's directory; a training with a perturbed config is a run of its own below it, as hyper-parameters
    are a run's. What the HParams page shows comes from the sweep."""
    version = ""
    if trial.is_perturbed:
        num_before = sum(name.startswith(_PERTURBED) for name in entries(trial.directory))
        version = f"{_PERTURBED}{num_before + 1}"
    return TensorBoardLogger(trial.directory, name="", version=version, default_hp_metric=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Built:
    """What `build` has returned."""

    module: LightningModule
    datamodule: DataModule | None
    loaders: tuple[Any, Any]
    """For training and validation; None: the module's own."""
    arguments: dict[str, Any]

    @classmethod
    def of(cls, returned: Any) -> "_Built":
        parts = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        arguments = parts.pop() if len(parts) > 1 and isinstance(parts[-1], dict) else {}
        if not parts or not isinstance(parts[0], LightningModule) or len(parts) > 3:
            raise ModuleError(
                f"build returned {_kinds(returned)}: it must be a LightningModule, (module, data module) or (module, "
                "train loader, validation loader), and may end with a dict of Trainer arguments"
            )
        if fixed := sorted(_OF_WORKERS & arguments.keys()):
            raise ConfigError(
                f"build returned the Trainer arguments {fixed}: these are the same for all trials, say them to sweep"
            )
        module, *data = parts
        if len(data) == 1 and isinstance(data[0], DataModule):
            return cls(module=module, datamodule=data[0], loaders=(None, None), arguments=arguments)
        train, validate = [*data, None, None][:2]
        return cls(module=module, datamodule=None, loaders=(train, validate), arguments=arguments)


def _kinds(returned: Any) -> str:
    if isinstance(returned, (tuple, list)):
        return "(" + ", ".join(type(part).__name__ for part in returned) + ")"
    return f"a {type(returned).__name__}"


def _of_trials(given: Mapping[str, Any]) -> dict[str, Any]:
    """The Trainer's arguments in a trial: nobody sees its bars, and the sweep keeps its checkpoints."""
    saving = ("enable_checkpointing", "checkpoint_callback")
    arguments = {name: value for name, value in given.items() if name not in saving}
    for name, earlier in _EARLIER.items():
        if name not in given and earlier not in given:
            arguments[name] = False
    own = given.get("enable_checkpointing", given.get("checkpoint_callback"))
    has_own = any(isinstance(callback, ModelCheckpoint) for callback in _listed(given.get("callbacks")))
    arguments["enable_checkpointing"] = own if isinstance(own, ModelCheckpoint) else has_own
    return arguments


def _listed(callbacks: Any) -> list[Callback | DriverCallback]:
    """A Trainer's argument, which may be one or none."""
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


def _directory(root: str | os.PathLike[str] | None, name: str | None, *, is_resuming: bool) -> tuple[str, bool]:
    """Where the sweep's files go, and whether there is something to resume."""
    # A file: URL is a path as any other, and so that of a place which only some hosts may see.
    place = join(absolute(os.fspath(root or os.getcwd()).removeprefix("file://")), _PLACE)
    if name is None:
        if is_resuming:
            raise ConfigError("resume=True needs the name of the sweep to continue")
        name = time.strftime("%Y-%m-%d_%H-%M-%S")
    if not name or "/" in name:
        raise ConfigError(f"name={name!r}: must be the name of a directory")
    directory = join(place, name)
    is_there = bool(entries(directory))
    if is_there and not is_resuming:
        raise ConfigError(f"{directory} holds a sweep already: say resume=True to continue it, or give another name")
    return directory, is_there

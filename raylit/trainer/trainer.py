"""Trainer: arguments in, a frozen Plan out; each entry point hands it to the driver's Coordinator. Driver."""

import os
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from typing_extensions import Self, Unpack

from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.model_summary import ModelSummary
from raylit.callbacks.progress_bar import ProgressBar
from raylit.callbacks.timer import Duration
from raylit.checkpoint import format
from raylit.config.plan import BatchLimit, CombinationName, MatmulPrecisionName
from raylit.config.strategy import StrategyOptions
from raylit.core.compiled_modules import unwrap
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.driver.loop.coordinator import Coordinator
from raylit.driver.tune_integration.nested_fit import detect_tune_session
from raylit.errors import ConfigError, shows_user_frames
from raylit.loggers import Logger
from raylit.profilers import Profiler, chosen_profiler
from raylit.protocol.messages import Finished
from raylit.protocol.state import Progress, RunState, RunStatus, Stage
from raylit.text_table import print_results_table
from raylit.trainer import default_callbacks
from raylit.trainer.arguments import (
    EarlierNames,
    Given,
    accepts_earlier_names,
    add_arguments,
    from_arguments,
    parse_searches,
    resolve_aliases,
)
from raylit.trainer.default_callbacks import known_to_hooks, on_worker_exceptions
from raylit.trainer.preflight import check_module, require, require_automatic, require_shardable, require_weights
from raylit.trainer.properties import TrainerProperties
from raylit.trainer.resume import AUTO, CheckpointFinder, use_checkpoint
from raylit.tune.tuner import Tuner
from raylit.worker.job import Job
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.process import result_sync


class Trainer(TrainerProperties):
    """Trains, validates, tests and predicts on Ray actors, or in this process with `num_workers=0`.

    The Trainer stays in the driver; hooks and callbacks on the workers see a light view of the run in its place.
    """

    @accepts_earlier_names
    def __init__(
        self,
        *,
        num_workers: int | None = None,
        gpus: int | str | list[int] | None = None,
        tpu_cores: int | str | list[int] | None = None,
        num_nodes: int = 1,
        num_processes: int | None = None,
        accelerator: str = "auto",
        devices: int | str | list[int] = "auto",
        strategy: str | StrategyOptions = "auto",
        precision: int | str = 32,
        float32_matmul_precision: MatmulPrecisionName | None = None,
        compile: bool | dict[str, Any] = False,
        channels_last: bool = False,
        sync_batchnorm: bool = False,
        resources_per_worker: dict[str, float] | None = None,
        placement: str | None = None,
        label_selector: dict[str, str] | None = None,
        start_timeout_s: float = 600.0,
        ping_timeout_s: float | None = None,
        keep_workers_s: float | None = None,
        max_epochs: int | None = None,
        min_epochs: int | None = None,
        max_steps: int = -1,
        min_steps: int | None = None,
        max_time: Duration | None = None,
        limit_train_batches: BatchLimit = 1.0,
        limit_val_batches: BatchLimit = 1.0,
        limit_test_batches: BatchLimit = 1.0,
        limit_predict_batches: BatchLimit = 1.0,
        overfit_batches: BatchLimit = 0.0,
        val_check_interval: BatchLimit | Duration = 1.0,
        check_val_every_n_epoch: int | None = 1,
        num_sanity_val_steps: int = 2,
        fast_dev_run: bool | int = False,
        reload_dataloaders_every_n_epochs: int = 0,
        multiple_trainloader_mode: CombinationName = "max_size_cycle",
        use_distributed_sampler: bool = True,
        prepare_data_per_node: bool = True,
        accumulate_grad_batches: int | dict[int, int] = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
        truncated_bptt_steps: int | None = None,
        track_grad_norm: float | str = -1,
        terminate_on_nan: bool = False,
        detect_anomaly: bool = False,
        callbacks: Callback | DriverCallback | Sequence[Callback | DriverCallback] | None = None,
        logger: bool | Logger | Sequence[Logger] = True,
        log_every_n_steps: int = 50,
        enable_checkpointing: bool | ModelCheckpoint = True,
        checkpoint_async: bool = True,
        enable_progress_bar: bool | ProgressBar = True,
        enable_model_summary: bool | ModelSummary = True,
        early_stop_callback: bool | EarlyStopping = False,
        resume: str | os.PathLike[str] | None = None,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        deterministic: bool | Literal["warn"] = False,
        benchmark: bool | None = None,
        inference_mode: bool = True,
        profiler: str | bool | Profiler | None = None,
        auto_lr_find: bool | str = False,
        auto_scale_batch_size: bool | str = False,
        **earlier: Unpack[EarlierNames],
    ) -> None:
        """Every argument has Lightning's meaning; `num_workers` is the number of Ray actors in all.

        What Lightning 0.9 called otherwise may be called so (`EarlierNames`). ConfigError: a value, or a combination,
        that cannot work. UnknownArgumentError names the nearest argument.
        """
        given = Given({name: value for name, value in locals().items() if name not in ("self", "earlier")})
        self._arguments_plan = plan = given.plan()
        self.loggers = given.to(default_callbacks.build_loggers, default_root_dir=plan.default_root_dir)
        self._attach(given.to(default_callbacks.chosen_callbacks))
        self._profiler = given.to(chosen_profiler)
        self._resume = resume
        self._resume_from_checkpoint = resume_from_checkpoint
        self._state = RunState(stage="fit")
        self._status: RunStatus = "initializing"
        self._progress_of_weights = Progress()
        self.ckpt_path: str | None = None
        self.searches = given.to(parse_searches)
        """What auto_lr_find and auto_scale_batch_size ask for."""
        self.tuner = Tuner(self)
        self._model: LightningModule | None = None
        self._datamodule: DataModule | None = None

    @classmethod
    def add_argparse_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """An option for each argument, such as `--max_epochs 3`."""
        return add_arguments(parent_parser, cls)

    @classmethod
    def from_argparse_args(cls, args: Namespace | ArgumentParser, **overrides: Any) -> Self:
        """A Trainer of what was given on the command line; `overrides` win."""
        return cls(**from_arguments(args, cls, overrides))

    # The entry points

    @shows_user_frames
    def fit(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
        *,
        train_dataloader: Any = None,
    ) -> None:
        """Train; afterwards `model` holds the trained weights and what hooks have left on it.

        `train_dataloaders`, in Lightning 0.9 `train_dataloader`, may be a DataModule. `ckpt_path`: a file, "best" or
        "last", of this Trainer or else of the newest run that saved where it does, whose run is continued; by default
        the Trainer's `resume`, which may be "auto" too: the newest run's newest sound checkpoint, if there is one.
        `weights_only=False` unpickles whatever objects the checkpoint holds, which can run code: for files you trust.
        """
        train_dataloaders = resolve_aliases(train_dataloaders=train_dataloaders, train_dataloader=train_dataloader)
        ckpt_path = resolve_aliases(
            ckpt_path=ckpt_path, resume=self._resume, resume_from_checkpoint=self._resume_from_checkpoint
        )
        found = None
        if ckpt_path == AUTO and not self._plan.is_dev_run:
            # Before the loggers begin a run of their own.
            found = self._checkpoints.newest_run(weights_only)
        job = self.build_fit_job(model, train_dataloaders, val_dataloaders, datamodule)
        is_continued = found is not None or ckpt_path not in (None, AUTO)
        inside = detect_tune_session(job, self._driver_callbacks, is_continued=is_continued)
        if not is_continued and inside.checkpoint is None:
            self.tuner.search_once(model, train_dataloaders, val_dataloaders, datamodule)
        path = None if ckpt_path == AUTO else ckpt_path
        if inside.checkpoint is None:
            found = found or self._checkpoints.read(path, weights_only)
        checkpoint = inside.checkpoint or use_checkpoint(inside.job, found)
        seed = None if checkpoint is None else format.read_seed(checkpoint)
        with self._coordinated("fit", inside.job, seed=seed, callbacks=inside.callbacks) as coordinator:
            coordinator.fit(checkpoint=checkpoint)

    @shows_user_frames
    def tune(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        *,
        scale_batch_size_kwargs: Mapping[str, Any] | None = None,
        lr_find_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The searches of `auto_scale_batch_size` and `auto_lr_find`, which a `fit` of the model then leaves out: their
        results, as `scale_batch_size` and `lr_find`. The arguments are those of the tuner's methods of these names."""
        return self.tuner.search(
            model,
            train_dataloaders,
            val_dataloaders,
            datamodule,
            size_arguments=scale_batch_size_kwargs,
            rate_arguments=lr_find_kwargs,
        )

    @shows_user_frames
    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
        *,
        val_dataloaders: Any = None,
    ) -> list[dict[str, float]]:
        """The metrics of the validation loop, a dict for each loader; exact over the whole data set. `val_dataloaders`
        is Lightning 0.9's name of `dataloaders`."""
        dataloaders = resolve_aliases(dataloaders=dataloaders, val_dataloaders=val_dataloaders)
        return self._evaluate("validate", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    @shows_user_frames
    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        verbose: bool = True,
        datamodule: DataModule | None = None,
        weights_only: bool | None = None,
        *,
        test_dataloaders: Any = None,
    ) -> list[dict[str, float]]:
        """The metrics of the test loop, a dict for each loader. Without a model: the best weights of the last fit, or
        else its last. `test_dataloaders` is Lightning 0.9's name of `dataloaders`."""
        dataloaders = resolve_aliases(dataloaders=dataloaders, test_dataloaders=test_dataloaders)
        return self._evaluate("test", model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    @shows_user_frames
    def predict(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        datamodule: DataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        weights_only: bool | None = None,
    ) -> list[Any] | None:
        """What `predict_step` returned for each batch, in data-set order, on the CPU; a list of these for each loader
        where there are several. None with `return_predictions=False`: nothing is kept, nor sent to the driver."""
        found = self._checkpoints.read(ckpt_path, weights_only, is_best_default=model is None)
        job = self._job("predict", model, dataloaders, datamodule)
        checkpoint = use_checkpoint(job, found)
        require(job, "predict")
        require_weights(job.module, has_checkpoint=checkpoint is not None)
        with self._coordinated("predict", job) as coordinator:
            outputs = coordinator.predict(checkpoint=checkpoint, is_returning=return_predictions is not False)
        if return_predictions is False:
            return None
        return outputs[0] if len(outputs) == 1 else outputs

    # For the searches of `tuner`

    def set_accumulation(self, window: int) -> None:
        """Go on as if `accumulate_grad_batches` had been given so; for the Trainer's searches."""
        optimization = replace(self._plan.optimization, accumulation=((0, window),))
        self._arguments_plan = replace(self._arguments_plan, optimization=optimization)
        self._plan = replace(self._plan, optimization=optimization)

    def build_fit_job(
        self, model: LightningModule, train_dataloaders: Any, val_dataloaders: Any, datamodule: DataModule | None
    ) -> Job:
        """Check what `fit` would run with these arguments, and return it; for the Trainer's searches."""
        job = self._job("fit", model, train_dataloaders, datamodule, val=val_dataloaders)
        require(job, "fit", is_validating=self._plan.limits.val_batches != 0)
        require_automatic(job.module, self._plan)
        require_shardable(job, self._plan)
        return job

    # Helpers, in the order in which they are called

    @property
    def _checkpoints(self) -> CheckpointFinder:
        return CheckpointFinder(
            saved=self.checkpoint_callback,
            loggers=self.loggers,
            root_dir=self.default_root_dir,
        )

    def _attach(self, callbacks: Sequence[Callback | DriverCallback]) -> None:
        self._callbacks, self._driver_callbacks = default_callbacks.split(callbacks)
        self._plan = default_callbacks.apply_callbacks(self._arguments_plan, callbacks, has_loggers=bool(self.loggers))

    def _job(
        self, stage: Stage, model: LightningModule | None, loaders: Any, datamodule: DataModule | None, val: Any = None
    ) -> Job:
        if model is None:
            model = self._model
        if model is None:
            raise ConfigError(f"{stage} needs a model: pass one, or call fit on this Trainer before")
        module, compilations = unwrap(model)
        check_module(module)
        if isinstance(loaders, DataModule):
            loaders, datamodule = None, loaders
        if datamodule is None and loaders is None and module is self._model:
            datamodule = self._datamodule
        if datamodule is not None and (loaders is not None or val is not None):
            raise ConfigError(f"{stage} was given loaders and a data module: pass one of them")
        self._model, self._datamodule = module, datamodule
        if is_overridden("configure_callbacks", module, LightningModule):
            self._attach(default_callbacks.with_modules_own(self.callbacks, module))
        return Job(
            module=module,
            datamodule=datamodule,
            callbacks=[*self._callbacks, *on_worker_exceptions(self._driver_callbacks, log_dir=self.log_dir)],
            loaders={"train" if stage == "fit" else stage: loaders, **({"validate": val} if stage == "fit" else {})},
            compilations=compilations,
            profiler=self._profiler,
            log_dir=self.log_dir,
            loggers=known_to_hooks(self.loggers, num_workers=self.num_workers),
        )

    @contextmanager
    def _coordinated(
        self,
        stage: Stage,
        job: Job,
        *,
        seed: int | None = None,
        callbacks: Sequence[DriverCallback] | None = None,
    ) -> Iterator[Coordinator]:
        """The run's coordinator; afterwards, of an interrupted run too, the user's objects hold what it has left."""
        # The order of samples follows the seed that torch was given last; a continued run's goes on as it was.
        plan = replace(self._plan, seed=torch.initial_seed() % 2**63 if seed is None else seed)
        coordinator = Coordinator(
            plan=plan,
            job=job,
            callbacks=self._driver_callbacks if callbacks is None else callbacks,
            loggers=self.loggers,
            stage=stage,
        )
        if stage == "fit":
            self._progress_of_weights = Progress()
        else:
            coordinator.state.progress = self._state.progress
            coordinator.state.is_epoch_cut_short = self._state.is_epoch_cut_short
            coordinator.state.num_training_batches = self._state.num_training_batches
            coordinator.state.callback_metrics = dict(self._state.callback_metrics)
        self._state, self._status, self.ckpt_path = coordinator.state, "interrupted", job.ckpt_path
        try:
            yield coordinator
            self._status = "finished"
        finally:
            # What the coordinator holds of Ray's store stays until Python collects it, as it is in reference cycles.
            finished, coordinator.finished = coordinator.finished, None
            if finished is not None:
                self._take_back(job, finished)
            if stage == "fit" and (finished is not None or self.num_workers == 0):
                self._progress_of_weights = coordinator.state.progress

    def _evaluate(
        self,
        stage: Stage,
        model: LightningModule | None,
        dataloaders: Any,
        ckpt_path: str | os.PathLike[str] | None,
        verbose: bool,
        datamodule: DataModule | None,
        weights_only: bool | None,
    ) -> list[dict[str, float]]:
        found = self._checkpoints.read(ckpt_path, weights_only, is_best_default=model is None)
        job = self._job(stage, model, dataloaders, datamodule)
        checkpoint = use_checkpoint(job, found)
        require(job, stage)
        require_weights(job.module, has_checkpoint=checkpoint is not None)
        with self._coordinated(stage, job) as coordinator:
            results = coordinator.evaluate(checkpoint=checkpoint)
        if verbose:
            print_results_table(stage, results)
        return results

    def _take_back(self, job: Job, finished: Finished) -> None:
        """Bring weights and attributes onto the user's own objects."""
        if finished.attributes:
            left_out = result_sync.apply(finished.attributes, job.module, job.callbacks)
            if left_out:
                warnings.warn(f"not brought back from the workers, as they cannot be pickled: {left_out}", stacklevel=4)
        if finished.state_dict:
            is_sharding = self._plan.strategy.is_sharding
            result_sync.apply_weights(finished.state_dict, job.module, is_adopting=is_sharding)

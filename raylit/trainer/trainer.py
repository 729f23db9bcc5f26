"""The Trainer: it builds a frozen Plan from its arguments, and its entry points run it by a Coordinator. Driver."""

import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal

import torch
from typing_extensions import Self, Unpack

from raylit.accelerators import Accelerator
from raylit.callbacks.argument_callbacks import ModelSummary
from raylit.callbacks.base import Callback, DriverCallback
from raylit.callbacks.early_stopping import EarlyStopping
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.progress_bar import ProgressBar
from raylit.callbacks.timer import Duration
from raylit.checkpoint import format
from raylit.compat.torch_dynamo import unwrap_compiled
from raylit.config import BatchLimit, CombinationName, MatmulPrecisionName, StrategyOptions
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.driver.loop.coordinator import Coordinator
from raylit.driver.loop.goodput import GoodputLedger
from raylit.driver.tune_integration import detect_tune_session
from raylit.errors import ConfigError, shows_user_frames
from raylit.loggers import Logger
from raylit.profilers import Profiler, build_profiler
from raylit.protocol.messages import Finished
from raylit.protocol.state import Progress, RunState, RunStatus, Stage
from raylit.text_table import print_results_table
from raylit.trainer import default_callbacks
from raylit.trainer.arguments import (
    EarlierNames,
    accepts_earlier_names,
    add_arguments,
    build_plan,
    from_arguments,
    parse_limits,
    parse_optimization,
    parse_searches,
    parse_strategy,
    parse_validation,
    parse_workers,
    resolve_aliases,
)
from raylit.trainer.default_callbacks import build_exception_callbacks, build_hook_loggers, is_showing_progress
from raylit.trainer.preflight import (
    check_module,
    require_automatic,
    require_shardable,
    require_steps_and_loaders,
    require_weights,
)
from raylit.trainer.properties import TrainerProperties
from raylit.trainer.resume import AUTO, CheckpointFinder, use_checkpoint
from raylit.tune.tuner import Tuner
from raylit.worker.job import Job
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.process import result_sync


class Trainer(TrainerProperties):
    """Trainer of LightningModules: fits, validates, tests and predicts on Ray actors, or in this process.

    The Trainer stays in the driver; hooks and callbacks on the workers get a light view of the run as `trainer`.
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
        accelerator: str | Accelerator = "auto",
        devices: int | str | list[int] = "auto",
        topology: str | None = None,
        accelerator_version: str | None = None,
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
        """Check all arguments; each has the meaning that Lightning gives it.

        The command line's help prints these texts, too. None stands for the default wherever no other meaning is given.

        Args:
            num_workers: Number of Ray actors in all, one per device. 0 runs the loop in this process, without Ray.
                None: as `gpus`, `devices` or `num_processes` times `num_nodes` say, else one per GPU of this machine
                if it has several, else 0.
            gpus: GPUs per host: a number, a list of indices, a string such as "2" or "0,1", or -1 for all of this
                machine's. Ray chooses which ones. None: no GPUs are asked for by this name.
            tpu_cores: TensorCores of TPUs per host: a number that slices have, such as 8, or -1 for a whole slice. It
                implies accelerator="tpu". None: no TPUs are asked for by this name.
            num_nodes: Hosts that share the workers evenly. 1 leaves the hosts to Ray and `placement`.
            num_processes: CPU workers per host. None: not given.
            accelerator: "cpu", "gpu" (or "cuda"), "xla" (torch_xla: one worker drives all devices of its host, and the
                loader's batches are of all of them; see docs/tpu.md), "torch_tpu" (TorchTPU: one worker per chip),
                "tpu" for what is installed of the two, a registered name (`raylit.register_accelerator`), an
                `Accelerator`, or "auto": the TPUs or GPUs of this machine if torch sees any and no CPU workers are
                asked for.
            devices: Devices per host: a number, a list of indices, -1 for all, or "auto" for what `num_workers` and
                the machine say.
            topology: Arrangement of the chips of a TPU slice, such as "4x4". A slice is used as a whole: with torch_xla
                by one worker per host, with TorchTPU by one per chip. None: as the number of cores or workers says,
                or the only kind of slice that the cluster has.
            accelerator_version: Version of the TPUs, such as "v6e" or "TPU-V6E". None: any.
            strategy: How workers share the model: "ddp", "fsdp", "fsdp_cpu_offload", "single", a name of Lightning's
                such as "ddp_find_unused_parameters_true", or an object such as `DDPStrategy(...)` or
                `FSDPStrategy(...)`. "auto" is DDP for several workers and nothing for one. On XLA "fsdp" divides the
                parameters over the devices of a worker, and the other names do nothing. Older name:
                `distributed_backend`.
            precision: 32, 64, 16 or "bf16" (both mixed; on TPUs 16 is bfloat16, too), or a full name such as
                "16-mixed", "bf16-mixed", "16-true" or "bf16-true".
            float32_matmul_precision: Precision of float32 matrix products: "highest", "high" (TF32) or "medium"
                (bfloat16), as in `torch.set_float32_matmul_precision`. None: as set in this process.
            compile: True compiles the model with `torch.compile`; a dict holds its keywords, such as `{"mode":
                "max-autotune"}`.
            channels_last: Keep four-dimensional weights and batches in memory as NHWC, which speeds up convolutions
                on GPUs.
            sync_batchnorm: Compute the statistics of batch-norm layers over all ranks.
            resources_per_worker: Ray resources of each worker by Ray's names, such as `{"CPU": 4}`. None: one CPU,
                and one GPU with accelerator="gpu".
            placement: Ray's placement strategy for the workers: "PACK", "SPREAD", "STRICT_PACK" or "STRICT_SPREAD".
                None: "PACK", or even shares with `num_nodes`, which cannot be combined with this.
            label_selector: Labels that the workers' hosts must have, such as `{"zone": "a"}`; conditions are Ray's:
                `a`, `!a`, `in(a, b)`, `!in(a, b)`. None: any host.
            start_timeout_s: Seconds to wait for the cluster to provide the workers before a run fails.
            ping_timeout_s: Seconds without an answer after which a worker counts as dead; 0: no limit. None: 10 s,
                and 120 s while it starts. 64 workers are asked each second: one of 1,000 is asked every 16 s.
            keep_workers_s: Seconds for which idle workers stay for the next run. None: 5 minutes on the local node,
                30 s on a cluster.
            max_epochs: Epochs after which training ends; -1: no limit. None: 1000 if neither `max_steps` nor
                `max_time` is given, else no limit.
            min_epochs: Epochs before which a request to stop, such as early stopping's, does not end training. None:
                0.
            max_steps: Optimizer steps after which training ends. -1: no limit.
            min_steps: Optimizer steps before which a request to stop does not end training. None: 0.
            max_time: Time after which training ends, at the next batch: "DD:HH:MM:SS", a timedelta, or a dict of its
                keywords such as `{"hours": 1}`. None: no limit.
            limit_train_batches: Training batches of an epoch: a float is a fraction (1.0: all), an int a count per
                worker.
            limit_val_batches: Validation batches per loader: a fraction or a count per worker; 0 turns validation
                off.
            limit_test_batches: Test batches per loader: a fraction or a count per worker.
            limit_predict_batches: Prediction batches per loader: a fraction or a count per worker.
            overfit_batches: Train and validate on the same first batches, unshuffled: a fraction or a count per
                worker. 0.0: off.
            val_check_interval: When validation runs: after a fraction of the training epoch (float), a number of
                training batches (int), or a time in one of the forms of `max_time`.
            check_val_every_n_epoch: Epochs from one validation to the next. None: `val_check_interval` counts batches
                across epochs.
            num_sanity_val_steps: Validation batches per loader that run before training, to find errors early; -1:
                all, 0: none.
            fast_dev_run: Run one batch (True), or this number of batches, of each loop for one epoch, without logs,
                checkpoints and searches.
            reload_dataloaders_every_n_epochs: Call the loader hooks again after this number of epochs; 0: never.
                Older name: `reload_dataloaders_every_epoch`.
            multiple_trainloader_mode: How several training loaders are combined: "max_size_cycle", "min_size",
                "max_size" or "sequential".
            use_distributed_sampler: Share the samples out over the workers. False: samplers and iterables are split
                by your code. Older name: `replace_sampler_ddp`.
            prepare_data_per_node: Call `prepare_data` once per host. False: once in all.
            accumulate_grad_batches: Batches whose gradients are added up before an optimizer step; a dict such as
                `{0: 1, 4: 8}` sets the number from an epoch on.
            gradient_clip_val: Largest norm, or value, of the gradients at an optimizer step. None or 0: no clipping.
            gradient_clip_algorithm: "norm" clips the total norm, "value" each element. None: "norm".
            truncated_bptt_steps: Time steps of each piece of truncated back-propagation through time. None: the
                module's own setting, else whole batches.
            track_grad_norm: Order of the gradient norms to log at logging steps, such as 2 or "inf". -1: off.
            terminate_on_nan: Raise NotFiniteError when a loss or a weight is not finite.
            detect_anomaly: Use torch.autograd's anomaly detection, which names the operation that made a NaN and is
                slow.
            callbacks: One callback or a list of them: `Callback` runs on every worker, `DriverCallback` in this
                process.
            logger: True: a TensorBoardLogger. False: none. Else a Logger or a list of them.
            log_every_n_steps: Optimizer steps from one report of step metrics to the next; 0: none.
            enable_checkpointing: True: save a checkpoint as a default ModelCheckpoint does. False: none. A
                ModelCheckpoint is used as given. Older name: `checkpoint_callback`.
            checkpoint_async: Go on with training while a checkpoint is written.
            enable_progress_bar: Show a progress bar; a ProgressBar is used as given. Older name:
                `progress_bar_refresh_rate`.
            enable_model_summary: Print the layers of the model when a fit starts; a ModelSummary is used as given.
                Older name: `weights_summary`.
            early_stop_callback: True: stop when `val_loss` no longer improves, as EarlyStopping does by default. An
                EarlyStopping is used as given. Older name: `early_stop_checkpoint`.
            resume: Checkpoint from which `fit` continues unless it is given a `ckpt_path`: a path, a URL, "best",
                "last", or "auto" for the newest usable checkpoint of the newest run, if there is one. None: a new
                run.
            resume_from_checkpoint: Lightning's older name of `resume`.
            default_root_dir: Directory or fsspec URL for logs and checkpoints. None: the current directory.
            deterministic: True makes torch use deterministic algorithms and raise an error where there is none;
                "warn" warns instead.
            benchmark: Value of `torch.backends.cudnn.benchmark` on the workers. None: False with `deterministic`,
                else as set in this process.
            inference_mode: Evaluate and predict under `torch.inference_mode`. False: under `torch.no_grad`.
            profiler: "simple" (or True), "advanced", "pytorch", or a Profiler. None or False: nothing is measured.
            auto_lr_find: Search for a learning rate before `fit`; a string names the module's attribute for it. True:
                `lr` or `learning_rate`.
            auto_scale_batch_size: Search for a batch size before `fit`: True or "power" doubles it, "binsearch" then
                halves the gap, "throughput" takes the fastest.
            **earlier: The names of Lightning 0.9 that are called "Older name" above; `EarlierNames` lists them.

        Raises:
            ConfigError: If a value, or a combination of values, cannot work.
            UnknownArgumentError: If there is no argument of a name; it names the nearest one.
        """
        workers = parse_workers(
            num_workers=num_workers,
            gpus=gpus,
            tpu_cores=tpu_cores,
            num_nodes=num_nodes,
            num_processes=num_processes,
            accelerator=accelerator,
            devices=devices,
            topology=topology,
            accelerator_version=accelerator_version,
            resources_per_worker=resources_per_worker,
            placement=placement,
            label_selector=label_selector,
            start_timeout_s=start_timeout_s,
            ping_timeout_s=ping_timeout_s,
            keep_workers_s=keep_workers_s,
            storage=None if fast_dev_run else os.fspath(default_root_dir or os.getcwd()),
        )
        self._arguments_plan = plan = build_plan(
            workers=workers,
            strategy=parse_strategy(strategy=strategy, workers=workers),
            limits=parse_limits(
                max_epochs=max_epochs,
                min_epochs=min_epochs,
                max_steps=max_steps,
                min_steps=min_steps,
                max_time=max_time,
                limit_train_batches=limit_train_batches,
                limit_val_batches=limit_val_batches,
                limit_test_batches=limit_test_batches,
                limit_predict_batches=limit_predict_batches,
                overfit_batches=overfit_batches,
                num_sanity_val_steps=num_sanity_val_steps,
                fast_dev_run=fast_dev_run,
            ),
            validation=parse_validation(
                val_check_interval=val_check_interval,
                check_val_every_n_epoch=check_val_every_n_epoch,
                fast_dev_run=fast_dev_run,
            ),
            optimization=parse_optimization(
                accumulate_grad_batches=accumulate_grad_batches,
                gradient_clip_val=gradient_clip_val,
                gradient_clip_algorithm=gradient_clip_algorithm,
                truncated_bptt_steps=truncated_bptt_steps,
                track_grad_norm=track_grad_norm,
                terminate_on_nan=terminate_on_nan,
                detect_anomaly=detect_anomaly,
                precision=precision,
                float32_matmul_precision=float32_matmul_precision,
                channels_last=channels_last,
                compile=compile,
                half_precision=workers.accelerator.half_precision,
            ),
            log_every_n_steps=log_every_n_steps,
            default_root_dir=default_root_dir,
            sync_batchnorm=sync_batchnorm,
            use_distributed_sampler=use_distributed_sampler,
            prepare_data_per_node=prepare_data_per_node,
            reload_dataloaders_every_n_epochs=reload_dataloaders_every_n_epochs,
            multiple_trainloader_mode=multiple_trainloader_mode,
            deterministic=deterministic,
            benchmark=benchmark,
            inference_mode=inference_mode,
            checkpoint_async=checkpoint_async,
            fast_dev_run=fast_dev_run,
        )
        self.loggers = default_callbacks.build_loggers(
            logger=logger, fast_dev_run=fast_dev_run, default_root_dir=plan.default_root_dir
        )
        self._attach(
            default_callbacks.choose_callbacks(
                callbacks=callbacks,
                enable_checkpointing=enable_checkpointing,
                early_stop_callback=early_stop_callback,
                enable_progress_bar=enable_progress_bar,
                enable_model_summary=enable_model_summary,
                max_time=max_time,
                fast_dev_run=fast_dev_run,
            )
        )
        self._profiler = build_profiler(profiler=profiler)
        self._resume = resume
        self._resume_from_checkpoint = resume_from_checkpoint
        self._state = RunState(stage="fit")
        self._status: RunStatus = "initializing"
        self._ledger: GoodputLedger | None = None
        self._progress_of_weights = Progress()
        self.ckpt_path: str | None = None
        self.searches = parse_searches(
            auto_lr_find=auto_lr_find, auto_scale_batch_size=auto_scale_batch_size, fast_dev_run=fast_dev_run
        )
        """The searches that auto_lr_find and auto_scale_batch_size ask for."""
        self.tuner = Tuner(self)
        self._model: LightningModule | None = None
        self._datamodule: DataModule | None = None

    @classmethod
    def add_argparse_args(cls, parent_parser: ArgumentParser) -> ArgumentParser:
        """Add an option for each argument of the Trainer, such as `--max_epochs 3`, and return the parser.

        Args:
            parent_parser: The parser to add to; its help prints the texts above.
        """
        return add_arguments(parent_parser, cls)

    @classmethod
    def from_argparse_args(cls, args: Namespace | ArgumentParser, **overrides: Any) -> Self:
        """Build a Trainer from options that `add_argparse_args` has added.

        Args:
            args: The parsed options, or a parser, which parses `sys.argv` first. Other options are ignored.
            overrides: Arguments that replace those of the command line.
        """
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
        """Train the model; afterwards it holds the trained weights and what hooks have set on it.

        Args:
            model: The module.
            train_dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
            val_dataloaders: Validation loaders. None: likewise.
            datamodule: A DataModule, in place of loaders.
            ckpt_path: Checkpoint to continue from: a path, a URL, "best" or "last" of this Trainer, or else of the
                newest run that saved in the same place; or "auto" for the newest usable checkpoint of the newest run,
                if there is one. None: the Trainer's `resume`.
            weights_only: False unpickles any object that the checkpoint holds, which can run code: use it for files
                that you trust. None and True load tensors and plain values only.
            train_dataloader: Lightning 0.9's name of `train_dataloaders`.

        Raises:
            ConfigError: If arguments contradict each other, or a setting does not suit the module.
            ModuleError: If the module lacks a step, an optimizer or a loader.
            CheckpointError: If the checkpoint is missing or damaged.
            WorkerDied: If a worker's process ends before the fit does.
            WorkerFailed: If a hook raises an exception that cannot be sent to the driver; others are raised unchanged.
            ResourcesError: If the cluster does not provide the resources of the workers.
        """
        train_dataloaders = resolve_aliases(train_dataloaders=train_dataloaders, train_dataloader=train_dataloader)
        ckpt_path = resolve_aliases(
            ckpt_path=ckpt_path, resume=self._resume, resume_from_checkpoint=self._resume_from_checkpoint
        )
        started_at = perf_counter()
        found = None
        if ckpt_path == AUTO and not self._plan.is_dev_run:
            # Before the loggers begin a run of their own.
            found = self._checkpoints.find_newest_run(weights_only)
        job = self.build_fit_job(model, train_dataloaders, val_dataloaders, datamodule)
        is_continued = found is not None or ckpt_path not in (None, AUTO)
        inside = detect_tune_session(job, self._driver_callbacks, is_continued=is_continued)
        if not is_continued and inside.checkpoint is None:
            self.tuner.search_once(model, train_dataloaders, val_dataloaders, datamodule)
            started_at = perf_counter()  # the searches' own runs do not count
        path = None if ckpt_path == AUTO else ckpt_path
        if inside.checkpoint is None:
            found = found or self._checkpoints.read(path, weights_only)
        checkpoint = inside.checkpoint or use_checkpoint(inside.job, found)
        seed = None if checkpoint is None else format.read_seed(checkpoint)
        with self._open_coordinator(
            "fit", inside.job, seed=seed, callbacks=inside.callbacks, started_at=started_at
        ) as coordinator:
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
        """Run the searches of `auto_scale_batch_size` and `auto_lr_find`; a `fit` of the model does not repeat them.

        Args:
            model: The module, on which the results are set.
            train_dataloaders: Loaders, or a DataModule, as in `fit`.
            val_dataloaders: Validation loaders, as in `fit`.
            datamodule: A DataModule, in place of loaders.
            scale_batch_size_kwargs: Arguments of `Tuner.scale_batch_size`.
            lr_find_kwargs: Arguments of `Tuner.lr_find`.

        Returns:
            The results, as `scale_batch_size` and `lr_find`.
        """
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
        """Run the validation loop and return its metrics, which are exact over the whole data set.

        Args:
            model: The module. None: that of the last run.
            dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
            ckpt_path: Checkpoint with the weights to use: a path, a URL, "best" or "last". None: the best of the last
                fit if there is no `model`, else the module's weights.
            verbose: Print a table of the metrics.
            datamodule: A DataModule, in place of loaders.
            weights_only: False unpickles any object that the checkpoint holds, as in `fit`.
            val_dataloaders: Lightning 0.9's name of `dataloaders`.

        Returns:
            A dict of metrics for each loader.
        """
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
        """Run the test loop and return its metrics, which are exact over the whole data set.

        Args:
            model: The module. None: that of the last run.
            dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
            ckpt_path: Checkpoint with the weights to use: a path, a URL, "best" or "last". None: the best of the last
                fit if there is no `model`, else the module's weights.
            verbose: Print a table of the metrics.
            datamodule: A DataModule, in place of loaders.
            weights_only: False unpickles any object that the checkpoint holds, as in `fit`.
            test_dataloaders: Lightning 0.9's name of `dataloaders`.

        Returns:
            A dict of metrics for each loader.
        """
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
        """Run `predict_step` for each batch and return its outputs.

        Args:
            model: The module. None: that of the last run.
            dataloaders: Loaders, or a DataModule. None: the module's or the DataModule's hooks make them.
            datamodule: A DataModule, in place of loaders.
            return_predictions: False keeps no outputs and sends none to the driver.
            ckpt_path: Checkpoint with the weights to use: a path, a URL, "best" or "last". None: the best of the last
                fit if there is no `model`, else the module's weights.
            weights_only: False unpickles any object that the checkpoint holds, as in `fit`.

        Returns:
            The outputs for each batch, on the CPU, in the order of the data set; with several loaders a list of such
            lists. None with `return_predictions=False`.
        """
        started_at = perf_counter()
        found = self._checkpoints.read(ckpt_path, weights_only, is_best_default=model is None)
        job = self._build_job("predict", model, dataloaders, datamodule)
        checkpoint = use_checkpoint(job, found)
        require_steps_and_loaders(job, "predict")
        require_weights(job.module, has_checkpoint=checkpoint is not None)
        with self._open_coordinator("predict", job, started_at=started_at) as coordinator:
            outputs = coordinator.predict(checkpoint=checkpoint, is_returning=return_predictions is not False)
        if return_predictions is False:
            return None
        return outputs[0] if len(outputs) == 1 else outputs

    # For the searches of `tuner`

    def set_accumulation(self, window: int) -> None:
        """Set the accumulation window, as the argument `accumulate_grad_batches` does; for the Trainer's searches."""
        optimization = replace(self._plan.optimization, accumulation=((0, window),))
        self._arguments_plan = replace(self._arguments_plan, optimization=optimization)
        self._plan = replace(self._plan, optimization=optimization)

    def build_fit_job(
        self, model: LightningModule, train_dataloaders: Any, val_dataloaders: Any, datamodule: DataModule | None
    ) -> Job:
        """Check what `fit` would run with these arguments, and return it; for the Trainer's searches."""
        job = self._build_job("fit", model, train_dataloaders, datamodule, val=val_dataloaders)
        require_steps_and_loaders(job, "fit", is_validating=self._plan.limits.val_batches != 0)
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
        self._callbacks, self._driver_callbacks = default_callbacks.split_callbacks(callbacks)
        self._plan = default_callbacks.apply_callbacks(self._arguments_plan, callbacks, has_loggers=bool(self.loggers))

    def _build_job(
        self, stage: Stage, model: LightningModule | None, loaders: Any, datamodule: DataModule | None, val: Any = None
    ) -> Job:
        if model is None:
            model = self._model
        if model is None:
            raise ConfigError(f"{stage} needs a model: pass one, or call fit on this Trainer before")
        module, compilations = unwrap_compiled(model)
        check_module(module)
        if isinstance(loaders, DataModule):
            loaders, datamodule = None, loaders
        if datamodule is None and loaders is None and module is self._model:
            datamodule = self._datamodule
        if datamodule is not None and (loaders is not None or val is not None):
            raise ConfigError(f"{stage} was given loaders and a data module: pass one of them")
        self._model, self._datamodule = module, datamodule
        if is_overridden("configure_callbacks", module, LightningModule):
            self._attach(default_callbacks.merge_module_callbacks(self.callbacks, module))
        return Job(
            module=module,
            datamodule=datamodule,
            callbacks=[*self._callbacks, *build_exception_callbacks(self._driver_callbacks, log_dir=self.log_dir)],
            loaders={"train" if stage == "fit" else stage: loaders, **({"validate": val} if stage == "fit" else {})},
            compilations=compilations,
            profiler=self._profiler,
            log_dir=self.log_dir,
            loggers=build_hook_loggers(self.loggers, num_workers=self.num_workers),
        )

    @contextmanager
    def _open_coordinator(
        self,
        stage: Stage,
        job: Job,
        *,
        started_at: float,
        seed: int | None = None,
        callbacks: Sequence[DriverCallback] | None = None,
    ) -> Iterator[Coordinator]:
        """Yield a coordinator; afterwards apply the results of its run, also an interrupted one, to user objects."""
        # The order of samples follows the seed that torch was given last; a continued run's goes on as it was.
        plan = replace(self._plan, seed=torch.initial_seed() % 2**63 if seed is None else seed)
        coordinator = Coordinator(
            plan=plan,
            job=job,
            callbacks=self._driver_callbacks if callbacks is None else callbacks,
            loggers=self.loggers,
            stage=stage,
            started_at=started_at,
        )
        self._ledger = coordinator.ledger
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
                self._apply_results(job, finished)
            if stage == "fit" and (finished is not None or self.num_workers == 0):
                self._progress_of_weights = coordinator.state.progress
            coordinator.ledger.close()
            goodput = coordinator.ledger.read()
            if stage == "fit" and goodput.steps > 0 and is_showing_progress(self._driver_callbacks):
                print(goodput, file=sys.stderr)

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
        started_at = perf_counter()
        found = self._checkpoints.read(ckpt_path, weights_only, is_best_default=model is None)
        job = self._build_job(stage, model, dataloaders, datamodule)
        checkpoint = use_checkpoint(job, found)
        require_steps_and_loaders(job, stage)
        require_weights(job.module, has_checkpoint=checkpoint is not None)
        with self._open_coordinator(stage, job, started_at=started_at) as coordinator:
            results = coordinator.evaluate(checkpoint=checkpoint)
        if verbose:
            print_results_table(stage, results)
        return results

    def _apply_results(self, job: Job, finished: Finished) -> None:
        """Set the weights and attributes of a run on the user's objects."""
        if finished.attributes:
            left_out = result_sync.apply(finished.attributes, job.module, job.callbacks)
            if left_out:
                warnings.warn(f"not brought back from the workers, as they cannot be pickled: {left_out}", stacklevel=4)
        if finished.state_dict:
            is_sharding = self._plan.strategy.is_sharding
            result_sync.apply_weights(finished.state_dict, job.module, is_adopting=is_sharding)

"""Worker: runs the driver's commands on one rank, in an actor or in the driver's process."""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch

from raylit.checkpoint import format
from raylit.checkpoint.pending import PendingCheckpoint, PendingPart
from raylit.compat.torch_optim import without_compiler
from raylit.config import Plan
from raylit.core.module import LightningModule
from raylit.errors import ModuleError
from raylit.profilers import Profiler
from raylit.protocol.messages import (
    Command,
    EndEpoch,
    Evaluate,
    Finish,
    Finished,
    HookedCommand,
    LogCall,
    LookAhead,
    Predict,
    Raised,
    Reload,
    Reloaded,
    Report,
    Save,
    Start,
    Started,
    Train,
    Weights,
)
from raylit.protocol.process_settings import set_matmul_precision
from raylit.protocol.summary import Summary, summarize
from raylit.worker.collectives import Collectives
from raylit.worker.data.agreement import Description, check_first_batches, check_ranks_agree
from raylit.worker.data.batches import TrainSource
from raylit.worker.data.combined import RepeatedEpoch, build_train_source, remove_shuffling
from raylit.worker.data.loader_processes import explain_dead_process
from raylit.worker.data.sampling import IsolatedRandom
from raylit.worker.data.sources import build_loader, drop_smaller_batches, has_loader, is_from_hook
from raylit.worker.job import Job, StopBarrier, WorkerContext
from raylit.worker.loops.evaluate import EvalLoop, PredictLoop
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.loops.train import NO_SHARE_OF_LAST_BATCH, TrainLoop, count_epoch_batches
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization import build_optimization, read_configured_optimizers
from raylit.worker.process import result_sync
from raylit.worker.process.logger_proxy import logger_views
from raylit.worker.process.profiling import RankProfiler
from raylit.worker.session import Session
from raylit.worker.state_capture import StateCapture


class Worker:
    """Worker of one rank for one stage of one run.

    The process group, if there is one, exists before the worker is created.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        context: WorkerContext,
        job: Job,
        is_in_driver: bool,
        stop_barrier: StopBarrier,
        forward: Callable[[LogCall], None] | None = None,
    ) -> None:
        """Create the worker; nothing of the user's runs before the command `Start`.

        Args:
            plan: The run's configuration.
            context: The worker's ranks and host.
            job: The user's objects.
            is_in_driver: The worker runs in the driver's process.
            stop_barrier: Stop barrier of the loops, armed by another thread.
            forward: Sends what hooks log to the driver, at any time; None in the driver itself.
        """
        self._forward = forward if context.rank == 0 else None
        self._plan = plan
        self._stop_barrier = stop_barrier
        self._context = context
        self._job = job
        self._is_in_driver = is_in_driver
        self._collectives = Collectives(rank=context.rank, world_size=context.world_size)
        self._accelerator = plan.workers.accelerator
        self._session: Session | None = None
        self._train_loop: TrainLoop | None = None
        self._validation_loop: EvalLoop | None = None
        """The validation loop of a fit."""
        self._state_capture: StateCapture | None = None
        self._rank_profiler: RankProfiler | None = None
        """Measures this rank if the run has a profiler."""
        self._has_new_weights = False
        """Training or a checkpoint has changed the weights, so that the driver's module needs them too."""
        self._state_keys = frozenset(job.module.state_dict())
        # `_start` adds the loops' own methods, so that `run` calls them directly.
        self._handlers: dict[type, Callable[[Any], Iterator[Report]]] = {
            Start: self._start,
            Reload: self._reload,
            Save: self._save,
            Finish: self._finish,
        }

    @property
    def pending_checkpoint(self) -> PendingCheckpoint:
        """The checkpoint that the last `Save` has prepared for writing."""
        assert self._state_capture is not None and self._state_capture.pending is not None
        return self._state_capture.pending

    @property
    def pending_part(self) -> PendingPart:
        """This rank's part of it, where checkpoints are written in parts."""
        assert self._state_capture is not None and self._state_capture.pending_part is not None
        return self._state_capture.pending_part

    def run(self, command: Command) -> Iterator[Report]:
        """Run a command and yield its reports.

        Exceptions of hooks are re-raised after `on_exception`.
        """
        if isinstance(command, HookedCommand) and command.callback_states is not None:
            assert self._state_capture is not None
            self._state_capture.driver_states = pickle.loads(command.callback_states)
        try:
            if self._job.profiler is None:
                yield from self._handlers[type(command)](command)
            else:
                yield from self._run_measured(command, self._job.profiler)
        except GeneratorExit:
            raise
        except BaseException as error:
            _add_advice(error)
            view = None if self._session is None else self._session.view
            self._clean_up_after(error)
            if view is not None and view.state.fn == "fit":
                yield Raised(progress=view.progress)
            raise

    def _run_measured(self, command: Command, profiler: Profiler) -> Iterator[Report]:
        """Run a command with the run's profiler; `Finish` reports the profile first."""
        if isinstance(command, Start):
            self._rank_profiler = RankProfiler(
                profiler,
                stage=command.stage,
                context=self._context,
                accelerator=self._accelerator,
                log_dir=self._job.log_dir,
            )
        assert self._rank_profiler is not None
        reports = self._rank_profiler.measure_reports(command, self._handlers[type(command)](command))
        if isinstance(command, Finish):
            reports = iter([*reports])
            if (profile := self._rank_profiler.read_profile(self._collectives)) is not None:
                yield profile
            self._rank_profiler.close()
        yield from reports

    def _start(self, command: Start) -> Iterator[Report]:
        self._prepare_process(command)
        if command.random_state is not None:
            torch.manual_seed(self._plan.seed)
            self._accelerator.seed(self._plan.seed)
            format.set_random_state(command.random_state, self._accelerator)
        session = self._session = Session(
            stage=command.stage,
            plan=self._plan,
            context=self._context,
            job=self._job,
            collectives=self._collectives,
            accelerator=self._accelerator,
            stop_barrier=self._stop_barrier,
        )
        view = session.view
        view.move_to(command.progress)
        view.loggers = logger_views(self._job.loggers, forward=self._forward, step=lambda: view.global_step)
        # Built at its first use: by `setup` or `configure_optimizers` if they read the run's length, else by the loop.
        build_source = cache(lambda: self._build_train_source(session))
        if command.stage == "fit":
            view.count_training_batches = lambda: count_epoch_batches(build_source(), self._plan.limits)
        session.set_up()
        self._has_new_weights = command.stage == "fit" or command.checkpoint is not None
        if command.stage == "fit":
            yield from self._start_fit(session, command, build_source)
            return
        loop = PredictLoop(session) if command.stage == "predict" else EvalLoop(session, stage=command.stage)
        check_ranks_agree(self._collectives, {loop.data_name: loop.descriptions})
        self._handlers[Predict if isinstance(loop, PredictLoop) else Evaluate] = loop.run
        self._state_capture = session.view.saving = StateCapture(session, optimizers=[], schedules=[], loop=None)
        if command.checkpoint is not None:
            self._state_capture.apply(command.checkpoint, is_resuming=False)
        session.seed_rank()
        yield Started(progress=session.view.progress, num_eval_batches=loop.num_batches)

    def _start_fit(self, session: Session, command: Start, build_source: Callable[[], TrainSource]) -> Iterator[Report]:
        with without_compiler():
            optimizers = read_configured_optimizers(session.module)
        session.strategy.check_optimizers(optimizers.optimizers)
        session.view.optimizers = optimizers.optimizers
        session.view.lr_schedulers = [schedule.scheduler for schedule in optimizers.schedules]
        session.view.lr_scheduler_configs = optimizers.schedules
        data = build_source()
        metrics = MetricBuffer(session.collectives)
        loop = self._train_loop = TrainLoop(
            session,
            data=data,
            optimization=build_optimization(session, optimizers, metrics=metrics),
            schedules=optimizers.schedules if session.module.automatic_optimization else [],
            metrics=metrics,
        )
        run = loop.run_detecting_anomaly if self._plan.optimization.is_detecting_anomaly else loop.run
        self._handlers.update({Train: run, LookAhead: loop.look_ahead, EndEpoch: loop.end_epoch})
        if is_overridden("validation_step", session.module, LightningModule) and has_loader(self._job, "validate"):
            self._validation_loop = EvalLoop(session, stage="validate", training_metrics=metrics)
            self._handlers[Evaluate] = self._validation_loop.run
        session.view.num_val_batches = list(self._num_val_batches)
        self._check_ranks_agree(data)
        is_whole_epoch = loop.num_batches >= data.num_batches
        if session.strategy.needs_batch_on_every_rank and data.is_last_batch_short and is_whole_epoch:
            raise ModuleError(NO_SHARE_OF_LAST_BATCH)
        session.seed_rank()
        session.view.fit_loop = loop
        session.view.count_training_batches = lambda: loop.num_batches
        self._state_capture = session.view.saving = StateCapture(
            session, optimizers=optimizers.optimizers, schedules=optimizers.schedules, loop=loop
        )
        if command.checkpoint is not None:
            with without_compiler():
                self._state_capture.apply(command.checkpoint, is_resuming=command.is_resuming)
        _enable_training(session.module)
        session.hooks.call("on_fit_start")
        yield Started(
            progress=session.view.progress,
            num_training_batches=loop.num_batches,
            num_batches_in_epoch=loop.num_batches_in_epoch,
            num_eval_batches=self._num_val_batches,
            summary=self._summarize(session),
        )

    def _summarize(self, session: Session) -> Summary | None:
        depth = self._plan.reporting.summary_depth
        # With an example input it runs the module, which is collective with sharded weights.
        if depth is None or (self._context.rank > 0 and not session.strategy.is_evaluation_collective):
            return None
        with session.strategy.evaluation_context(is_inference_mode=False):
            return summarize(session.module, max_depth=depth)

    def _reload(self, command: Reload) -> Iterator[Report]:
        session, loop, validation = self._session, self._train_loop, self._validation_loop
        assert session is not None
        assert loop is not None
        view = session.view
        view.move_to(view.progress.at_next_batch())
        source: TrainSource | None = None
        # A hook may draw random numbers, to split a data set: all ranks must draw the same.
        with (
            nullcontext() if self._collectives.world_size == 1 else IsolatedRandom(self._plan.seed + view.current_epoch)
        ):
            if is_from_hook(self._job, "train"):
                source = self._build_train_source(session)
                loop.load(source)
            is_overfitting = self._plan.limits.overfit_batches > 0
            if validation is not None and (is_overfitting or is_from_hook(self._job, "validate")):
                validation.load()
        self._check_ranks_agree(source)
        view.num_val_batches = list(self._num_val_batches)
        yield Reloaded(num_training_batches=loop.num_batches, num_eval_batches=self._num_val_batches)

    def _check_ranks_agree(self, source: TrainSource | None) -> None:
        """Compare the loaders of a fit over the ranks. Collective."""
        describe_by_name: dict[str, Callable[[], list[Description]]] = {}
        if source is not None:
            describe_by_name["training"] = source.descriptions
        if self._validation_loop is not None:
            describe_by_name[self._validation_loop.data_name] = self._validation_loop.descriptions
        check_ranks_agree(self._collectives, describe_by_name)

    @property
    def _num_val_batches(self) -> tuple[float, ...]:
        return () if self._validation_loop is None else self._validation_loop.num_batches

    def _build_train_source(self, session: Session) -> TrainSource:
        loader = build_loader(self._job, "train")
        if loader is None:
            raise ModuleError("train_dataloader returned None: return a DataLoader or another iterable of batches")
        is_overfitting = self._plan.limits.overfit_batches > 0
        loader = remove_shuffling(loader) if is_overfitting else loader
        if self._accelerator.has_static_shapes:
            loader = drop_smaller_batches(loader, is_warning=self._context.rank == 0)
        session.view.train_dataloader = loader
        source = build_train_source(
            loader,
            combination=self._plan.combination,
            rank=self._context.rank,
            world_size=self._context.world_size,
            seed=self._plan.seed,
            shard=self._plan.use_distributed_sampler,
            agree=self._collectives.gather_counts,
            compare=partial(check_first_batches, self._collectives, name="training"),
            is_syncing_batchnorm=self._plan.is_syncing_batchnorm,
        )
        return RepeatedEpoch(source) if is_overfitting else source

    def _save(self, command: Save) -> Iterator[Report]:
        assert self._state_capture is not None
        with without_compiler():
            saved = self._state_capture.prepare(command)
        yield saved

    def _finish(self, command: Finish) -> Iterator[Report]:
        assert self._session is not None
        session = self._session
        if command.interruption is not None:
            _call_exception_hooks(session, KeyboardInterrupt() if command.interruption == "SIGINT" else SystemExit())
        elif self._train_loop is not None:
            self._train_loop.end()
            session.hooks.call("on_fit_end")
        if self._train_loop is not None:
            self._train_loop.metrics.discard_objects()
        if self._has_new_weights:
            for piece in session.strategy.iterate_full_weights(session.module):
                if self._context.rank == 0:
                    yield Weights(state_dict=piece)
        session.tear_down()
        self._session = None
        if self._is_in_driver or self._context.rank > 0:
            yield Finished()
            return
        is_whole = self._has_new_weights and not session.strategy.is_sharding
        state_dict = session.module.state_dict() if is_whole else {}
        attributes = result_sync.pack(
            session.module, self._job.callbacks, state_keys=self._state_keys, shared=self._job.shared_memory
        )
        yield Finished(state_dict=state_dict, attributes=attributes)

    def abandon(self) -> None:
        """Release the user's objects after an end outside the worker's commands."""
        session, self._session = self._session, None
        if session is not None:
            session.release()
        if self._train_loop is not None:
            self._train_loop.metrics.discard_objects()
        if self._rank_profiler is not None:
            self._rank_profiler.close()

    def _clean_up_after(self, error: BaseException) -> None:
        """Call `on_exception` of callbacks and module, then release the user's objects."""
        session = self._session
        try:
            if session is not None:
                try:
                    _call_exception_hooks(session, error)
                finally:
                    if isinstance(error, KeyboardInterrupt):
                        _tear_down_after(session, error)
        finally:
            self.abandon()

    def _prepare_process(self, command: Start) -> None:
        if command.torch_settings is not None:
            command.torch_settings.apply()
        if self._plan.optimization.matmul_precision is not None:
            set_matmul_precision(self._plan.optimization.matmul_precision)
        if self._plan.deterministic:
            torch.use_deterministic_algorithms(True, warn_only=self._plan.deterministic == "warn")
        if torch.are_deterministic_algorithms_enabled():
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch requires it for deterministic cuBLAS
        if self._plan.benchmark is not None or self._plan.deterministic:
            # Benchmarking may choose a different kernel in each run.
            torch.backends.cudnn.benchmark = bool(self._plan.benchmark)
        self._accelerator.set_up(num_threads=self._context.num_threads)


def _add_advice(error: BaseException) -> None:
    """Add to torch's error what the user can do."""
    explain_dead_process(error)
    _add_batch_norm_advice(error)


def _add_batch_norm_advice(error: BaseException) -> None:
    """Add to torch's error about a batch norm with one value per channel where such a batch comes from."""
    if isinstance(error, ValueError) and str(error).startswith("Expected more than 1 value per channel"):
        error.args = (
            f"{error}. The batch has one sample, of which a batch norm can take no variance; mostly it is what is left "
            "for the last batch of an epoch: pass drop_last=True to the DataLoader, or choose another batch_size",
        )


def _call_exception_hooks(session: Session, error: BaseException) -> None:
    """Call the hooks for an early end of the run."""
    if isinstance(error, KeyboardInterrupt):
        session.hooks.call("on_keyboard_interrupt")
    session.hooks.call("on_exception", error)


def _tear_down_after(session: Session, error: KeyboardInterrupt) -> None:
    """Call `teardown` of all objects after Ctrl-C, as at the end of a run; warn if it raises.

    Not called after other exceptions, as in Lightning: one rank's `teardown` might wait there for the other ranks.
    """
    try:
        session.hooks.tear_down(session.stage, session.job.datamodule)
    except Exception as failure:
        warnings.warn(
            f"teardown, after {type(error).__name__} in rank {session.context.rank}, raised "
            f"{type(failure).__name__}: {failure}",
            stacklevel=2,
        )


def _enable_training(module: LightningModule) -> None:
    """Set train mode, except for submodules that the user has put into eval mode."""
    if not module.training:
        module.train()
    torch.set_grad_enabled(True)

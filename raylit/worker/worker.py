"""Worker: carries out the driver's commands on one rank, in an actor or in the driver's process. Worker."""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import torch

from raylit.accelerators import build_accelerator
from raylit.checkpoint import format
from raylit.checkpoint.pending import PendingCheckpoint, PendingPart
from raylit.compat.torch_optim import without_compiler
from raylit.config.plan import Plan
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
from raylit.worker.data.agreement import Description, check_first_batches, check_ranks_agree
from raylit.worker.data.batches import TrainSource
from raylit.worker.data.combined import SameEpoch, build_train_source, remove_shuffling
from raylit.worker.data.sampling import IsolatedRandom, explain_dead_process
from raylit.worker.data.sources import has_loader, is_from_hook, loader_of
from raylit.worker.distributed.collectives import Collectives
from raylit.worker.job import Job, WorkerContext
from raylit.worker.loops.evaluate import EvalLoop, PredictLoop
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.loops.stop_barrier import StopBarrier
from raylit.worker.loops.train import NO_SHARE_OF_LAST_BATCH, TrainLoop, batches_of_epoch
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.optimization import build_optimization, read_configured_optimizers
from raylit.worker.process import result_sync
from raylit.worker.process.logger_proxy import logger_views
from raylit.worker.process.profiling import RankProfiler
from raylit.worker.session import Session
from raylit.worker.state_capture import StateCapture


class Worker:
    """One stage of one run on one rank. The collective group, if there is one, is up before it is made."""

    def __init__(
        self,
        *,
        plan: Plan,
        context: WorkerContext,
        job: Job,
        is_in_driver: bool,
        brake: StopBarrier,
        forward: Callable[[LogCall], None] | None = None,
    ) -> None:
        """`forward`: sends what hooks log to the driver, at any time; None in the driver itself."""
        self._forward = forward if context.rank == 0 else None
        self._plan = plan
        self._brake = brake
        self._context = context
        self._job = job
        self._is_in_driver = is_in_driver
        self._collectives = Collectives(rank=context.rank, world_size=context.world_size)
        self._accelerator = build_accelerator(plan.workers.accelerator)
        self._session: Session | None = None
        self._train_loop: TrainLoop | None = None
        self._validation_loop: EvalLoop | None = None
        """During a fit."""
        self._saving: StateCapture | None = None
        self._recording: RankProfiler | None = None
        """What a profiler is told, if there is one."""
        self._has_new_weights = False
        """By training, or from a checkpoint: the driver's module is to have them too."""
        self._state_keys = frozenset(job.module.state_dict())
        # The loops' own methods join when a stage starts: no frame of ours stands between `run` and them.
        self._handlers: dict[type, Callable[[Any], Iterator[Report]]] = {
            Start: self._start,
            Reload: self._reload,
            Save: self._save,
            Finish: self._finish,
        }

    @property
    def held(self) -> PendingCheckpoint:
        """What the last Save has left to be written."""
        assert self._saving is not None and self._saving.held is not None
        return self._saving.held

    @property
    def held_part(self) -> PendingPart:
        """This rank's, where checkpoints are in parts."""
        assert self._saving is not None and self._saving.held_part is not None
        return self._saving.held_part

    def run(self, command: Command) -> Iterator[Report]:
        """Carry a command out, reporting on the way. What a hook raises passes through, after `on_exception`."""
        if isinstance(command, HookedCommand) and command.callback_states is not None:
            assert self._saving is not None
            self._saving.driver_states = pickle.loads(command.callback_states)
        try:
            if self._job.profiler is None:
                yield from self._handlers[type(command)](command)
            else:
                yield from self._profiled(command, self._job.profiler)
        except GeneratorExit:
            raise
        except BaseException as error:
            _advise(error)
            view = None if self._session is None else self._session.view
            self._fail(error)
            if view is not None and view.state.fn == "fit":
                yield Raised(progress=view.progress)
            raise

    def _profiled(self, command: Command, profiler: Profiler) -> Iterator[Report]:
        if isinstance(command, Start):
            self._recording = RankProfiler(
                profiler,
                stage=command.stage,
                context=self._context,
                accelerator=self._accelerator,
                log_dir=self._job.log_dir,
            )
        assert self._recording is not None
        reports = self._recording.over(command, self._handlers[type(command)](command))
        if isinstance(command, Finish):
            reports = iter([*reports])
            if (profile := self._recording.taken(self._collectives)) is not None:
                yield profile
            self._recording.close()
        yield from reports

    def _start(self, command: Start) -> Iterator[Report]:
        self._prepare_process(command)
        if command.random_state is not None:
            torch.manual_seed(self._plan.seed)
            format.set_random_state(command.random_state)
        session = self._session = Session(
            stage=command.stage,
            plan=self._plan,
            context=self._context,
            job=self._job,
            collectives=self._collectives,
            accelerator=self._accelerator,
            brake=self._brake,
        )
        view = session.view
        view.move_to(command.progress)
        view.loggers = logger_views(self._job.loggers, forward=self._forward, step=lambda: view.global_step)
        # Made by whoever asks first how long the training is: `setup` or `configure_optimizers`, else the loop.
        train_source = cache(lambda: self._train_source(session))
        if command.stage == "fit":
            view.count_training_batches = lambda: batches_of_epoch(train_source(), self._plan.limits)
        session.set_up()
        self._has_new_weights = command.stage == "fit" or command.checkpoint is not None
        if command.stage == "fit":
            yield from self._start_fit(session, command, train_source)
            return
        loop = PredictLoop(session) if command.stage == "predict" else EvalLoop(session, stage=command.stage)
        check_ranks_agree(self._collectives, {loop.data_name: loop.descriptions})
        self._handlers[Predict if isinstance(loop, PredictLoop) else Evaluate] = loop.run
        self._saving = session.view.saving = StateCapture(session, optimizers=[], schedules=[], loop=None)
        if command.checkpoint is not None:
            self._saving.apply(command.checkpoint, is_resuming=False)
        session.seed_rank()
        yield Started(progress=session.view.progress, num_eval_batches=loop.num_batches)

    def _start_fit(self, session: Session, command: Start, train_source: Callable[[], TrainSource]) -> Iterator[Report]:
        with without_compiler():
            optimizers = read_configured_optimizers(session.module)
        session.strategy.check_optimizers(optimizers.optimizers)
        session.view.optimizers = optimizers.optimizers
        session.view.lr_schedulers = [schedule.scheduler for schedule in optimizers.schedules]
        session.view.lr_scheduler_configs = optimizers.schedules
        data = train_source()
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
        self._saving = session.view.saving = StateCapture(
            session, optimizers=optimizers.optimizers, schedules=optimizers.schedules, loop=loop
        )
        if command.checkpoint is not None:
            with without_compiler():
                self._saving.apply(command.checkpoint, is_resuming=command.is_resuming)
        _enable_training(session.module)
        session.hooks.call("on_fit_start")
        yield Started(
            progress=session.view.progress,
            num_training_batches=loop.num_batches,
            num_batches_in_epoch=loop.num_batches_in_epoch,
            num_eval_batches=self._num_val_batches,
            summary=self._summary(session),
        )

    def _summary(self, session: Session) -> Summary | None:
        depth = self._plan.reporting.summary_depth
        # With an example input it runs the module, for which a rank that shards needs the others.
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
        # Where a hook draws random numbers, to split a data set, all ranks are to draw the same.
        with (
            nullcontext() if self._collectives.world_size == 1 else IsolatedRandom(self._plan.seed + view.current_epoch)
        ):
            if is_from_hook(self._job, "train"):
                source = self._train_source(session)
                loop.load(source)
            is_overfitting = self._plan.limits.overfit_batches > 0
            if validation is not None and (is_overfitting or is_from_hook(self._job, "validate")):
                validation.load()
        self._check_ranks_agree(source)
        view.num_val_batches = list(self._num_val_batches)
        yield Reloaded(num_training_batches=loop.num_batches, num_eval_batches=self._num_val_batches)

    def _check_ranks_agree(self, source: TrainSource | None) -> None:
        """About the loaders of a fit. Collective."""
        described: dict[str, Callable[[], list[Description]]] = {}
        if source is not None:
            described["training"] = source.descriptions
        if self._validation_loop is not None:
            described[self._validation_loop.data_name] = self._validation_loop.descriptions
        check_ranks_agree(self._collectives, described)

    @property
    def _num_val_batches(self) -> tuple[float, ...]:
        return () if self._validation_loop is None else self._validation_loop.num_batches

    def _train_source(self, session: Session) -> TrainSource:
        loader = loader_of(self._job, "train")
        if loader is None:
            raise ModuleError("train_dataloader returned None: return a DataLoader or another iterable of batches")
        is_overfitting = self._plan.limits.overfit_batches > 0
        session.view.train_dataloader = loader = remove_shuffling(loader) if is_overfitting else loader
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
        return SameEpoch(source) if is_overfitting else source

    def _save(self, command: Save) -> Iterator[Report]:
        assert self._saving is not None
        with without_compiler():
            held = self._saving.hold(command)
        yield held

    def _finish(self, command: Finish) -> Iterator[Report]:
        assert self._session is not None
        session = self._session
        if command.interruption is not None:
            _tell(session, KeyboardInterrupt() if command.interruption == "SIGINT" else SystemExit())
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
        """After an end outside the worker's commands: the module is an ordinary one again."""
        session, self._session = self._session, None
        if session is not None:
            session.let_go()
        if self._train_loop is not None:
            self._train_loop.metrics.discard_objects()
        if self._recording is not None:
            self._recording.close()

    def _fail(self, error: BaseException) -> None:
        """`on_exception` of everyone; the module is an ordinary one again."""
        session = self._session
        try:
            if session is not None:
                try:
                    _tell(session, error)
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
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for of deterministic cuBLAS
        if self._plan.benchmark is not None or self._plan.deterministic:
            # The fastest kernel of a benchmark may be another one in each run.
            torch.backends.cudnn.benchmark = bool(self._plan.benchmark)
        self._accelerator.set_up(num_threads=self._context.num_threads)


def _advise(error: BaseException) -> None:
    """Add to errors of torch's what the user can do."""
    explain_dead_process(error)
    _advise_on_batch_norm(error)


def _advise_on_batch_norm(error: BaseException) -> None:
    """What torch says of a batch norm without more than one value leaves open where such a batch comes from."""
    if isinstance(error, ValueError) and str(error).startswith("Expected more than 1 value per channel"):
        error.args = (
            f"{error}. The batch has one sample, of which a batch norm can take no variance; mostly it is what is left "
            "for the last batch of an epoch: pass drop_last=True to the DataLoader, or choose another batch_size",
        )


def _tell(session: Session, error: BaseException) -> None:
    """The hooks for an end before its time."""
    if isinstance(error, KeyboardInterrupt):
        session.hooks.call("on_keyboard_interrupt")
    session.hooks.call("on_exception", error)


def _tear_down_after(session: Session, error: KeyboardInterrupt) -> None:
    """`teardown` of everyone, as at the end that Ctrl-C asks for between two steps; what it raises is told, not raised.

    Not after other exceptions, as in Lightning: one rank's `teardown` might wait there for the others.
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
    """Train mode, but submodules that the user has put into eval mode stay frozen in it."""
    if not module.training:
        module.train()
    torch.set_grad_enabled(True)

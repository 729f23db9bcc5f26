"""The driver's loop: chooses the workers' next command and handles their reports, whatever kind of group they are."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from time import perf_counter
from typing import Any, Protocol

from raylit.callbacks.base import DriverCallback
from raylit.callbacks.model_checkpoint import ModelCheckpoint
from raylit.callbacks.progress_bar import start_is_shown
from raylit.checkpoint import format, sharded
from raylit.checkpoint.index import Publication
from raylit.checkpoint.pending import PendingCheckpoint
from raylit.checkpoint.remote import StoreUnreachable
from raylit.config import Plan
from raylit.driver.loop import predictions
from raylit.driver.loop.checkpoint_queue import CheckpointQueue, CheckpointWriter, FlushLogsFirst, SaveRequest
from raylit.driver.loop.driver_profiler import DriverProfiler
from raylit.driver.loop.goodput import Cause, Goodput, GoodputLedger, describe_slowest_rank
from raylit.driver.loop.log_writer import LogWriter
from raylit.driver.loop.schedule import Schedule
from raylit.driver.loop.signals import SignalHandler
from raylit.errors import CheckpointError, RaylitError, WorkerDied
from raylit.loggers.base import Logger
from raylit.protocol.messages import (
    Command,
    EndEpoch,
    EpochEnded,
    Evaluate,
    Evaluated,
    Finish,
    Finished,
    HookedCommand,
    LogCall,
    LookAhead,
    Measured,
    Metrics,
    Paused,
    Predict,
    Predicted,
    Profile,
    Raised,
    Reload,
    Reloaded,
    Report,
    Start,
    Started,
    Stepped,
    Ticked,
    Train,
    Weights,
    Written,
)
from raylit.protocol.process_settings import TorchSettings
from raylit.protocol.state import RunState, Stage
from raylit.worker.data.loader_processes import explain_dead_process
from raylit.worker.job import Job, StopBarrier, WorkerContext
from raylit.worker.process import result_sync
from raylit.worker.worker import Worker

_REPORTED_CAUSES: tuple[Cause, Cause] = ("data_wait", "compilation")


class CallbackStates:
    """States of the driver callbacks, sent to the workers whenever they have changed."""

    def __init__(self, callbacks: Sequence[DriverCallback]) -> None:
        self._callbacks = callbacks
        self._last_sent = b""

    def collect(self) -> dict[str, Any]:
        return {callback.state_key: state for callback in self._callbacks if (state := callback.state_dict())}

    def reset(self) -> None:
        """Reset every callback's state at the start of a new run."""
        for callback in self._callbacks:
            callback.reset_state()

    def load(self, checkpoint: dict[str, Any]) -> None:
        for callback in self._callbacks:
            if callback.state_key in checkpoint.get("callbacks", {}):
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])

    def attach_to(self, command: Command) -> Command:
        """Return the command with the callback states, if they have changed since they were last sent.

        The workers are idle at this point, so the states stay valid for as long as the command runs.
        """
        if not isinstance(command, HookedCommand):
            return command
        try:
            states = pickle.dumps(format.to_plain_values(self.collect(), "a driver callback's state"))
        except CheckpointError:  # only checkpoints need these states, and the driver's own saves raise this error
            return command
        if states == self._last_sent:
            return command
        self._last_sent = states
        return replace(command, callback_states=states)


class Coordinator:
    """Coordinator of one run: the only writer of its RunState, and the `run` that driver callbacks receive."""

    def __init__(
        self,
        *,
        plan: Plan,
        job: Job,
        callbacks: Sequence[DriverCallback],
        loggers: Sequence[Logger],
        stage: Stage,
        started_at: float | None = None,
    ) -> None:
        """Create the coordinator; nothing runs before one of the entry points is called.

        Args:
            plan: The run's configuration.
            job: The user's objects.
            callbacks: The driver callbacks, in the order of their calls.
            loggers: The loggers.
            stage: The entry point.
            started_at: Time of `perf_counter` from which the run's goodput counts; None: now.
        """
        self.ledger = GoodputLedger(started_at=perf_counter() if started_at is None else started_at)
        self._reported_s = (0.0, 0.0)
        """Seconds of data wait and compilation in the command under way, on the rank with the largest sum."""
        self.plan = plan
        self._profiler = None if job.profiler is None else DriverProfiler()
        self.loggers = list(loggers)
        log_writer = LogWriter(self.loggers, is_direct=plan.workers.num_workers == 0)
        self._log_writer = (
            log_writer if self._profiler is None else self._profiler.time_methods_of(log_writer, name="loggers")
        )
        self.state = RunState(stage=stage)
        self.log_dir = job.log_dir
        self._job = job
        self._callbacks = (
            callbacks
            if self._profiler is None
            else [self._profiler.time_methods_of(callback) for callback in callbacks]
        )
        self._checkpoint_callbacks = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        self._callback_states = CallbackStates(callbacks if stage == "fit" else ())
        self._schedule = Schedule(plan)
        self._group: WorkerGroup | None = None
        self._signals = SignalHandler(on_first=self._arm_stop)
        self._is_training = False
        """True while the workers run a Train command."""
        self._written: list[Written] = []
        self._checkpoint_queue = CheckpointQueue(self, self._log_writer)
        self.is_saving_to = self._checkpoint_queue.is_writing
        self._notified: DriverCallback | None = None
        """The callback whose hook is running."""
        self._gathered_weights = result_sync.GatheredWeights(job.module)
        """The weights at the end of the run, gathered from workers that each hold a shard."""
        self._profiles: list[Profile] = []
        self.finished: Finished | None = None
        """Rank 0's result at the end of the run; an interrupted run has one, too."""

    # Entry points

    def fit(self, *, checkpoint: dict[str, Any] | None = None) -> None:
        """Train to the end; continue from the checkpoint's position if one is given."""
        self._callback_states.reset()
        with self._run_with_group(checkpoint, is_resuming=True):
            if checkpoint is None and self._schedule.has_sanity_check(self.state):
                self._check_sanity()
            self._schedule.begin(self.state, is_continued=checkpoint is not None)
            self._notify("on_train_start")
            while not self._schedule.is_finished(self.state):
                self._train_epoch()
            self._notify("on_train_end")
            self._finish_run()
        self._checkpoint_queue.raise_last()
        self._log_writer.raise_failures()

    def evaluate(self, *, checkpoint: dict[str, Any] | None = None) -> list[dict[str, float]]:
        """Validate or test; return the metrics by name for each loader."""
        with self._run_with_group(checkpoint, is_resuming=False):
            evaluated = self._evaluate(self.state.stage)
            self._finish_run()
            return [dict(metrics) for metrics in evaluated.per_loader]

    def predict(self, *, checkpoint: dict[str, Any] | None = None, is_returning: bool = True) -> list[list[Any]]:
        """Return for each loader the outputs of its batches, in data-set order."""
        with self._run_with_group(checkpoint, is_resuming=False):
            self._notify("on_evaluation_start", "predict")
            with self.ledger.measure("steps"):
                reports = [*self._run(Predict(is_returning=is_returning))]
            parts = [report for report in reports if isinstance(report, Predicted)]
            self._signals.check()
            self._notify("on_evaluation_end", "predict")
            self._finish_run()
            return predictions.restore_sample_order(parts)

    # What a driver callback may call

    def stop(self, reason: str) -> None:
        self._note_stop(reason)
        if self._is_training and self._schedule.may_stop(self.state):
            self._arm_stop()

    def save_checkpoint(self, path: str, *, is_weights_only: bool = False, then: Publication | None = None) -> None:
        assert self._group is not None
        self.finish_saves(is_earlier_only=True)
        states = format.to_plain_values({} if is_weights_only else self._callback_states.collect(), "callbacks")
        request = SaveRequest(
            path=path, callback=self._notified, publication=then, is_weights_only=is_weights_only, callbacks=states
        )
        if self._checkpoint_queue.try_join(request):
            return
        self.finish_saves()
        with self.ledger.measure("saving"):
            reports = [*self._run(request.command(is_copying=self.plan.is_saving_async, seed=self.plan.seed))]
        writer = self._group.checkpoint_writer(is_in_parts=self.plan.strategy.is_saving_parts)
        # A run that resumes from the file must find everything in the logs that was logged before the save.
        self._checkpoint_queue.start(request, FlushLogsFirst(writer, self._log_writer.flush()), reports)
        if not self.plan.is_saving_async:
            self.finish_saves()

    @property
    def is_idle(self) -> bool:
        return self._group is not None and self._group.is_idle and self.finished is None

    def finish_saves(self, *, is_earlier_only: bool = False) -> None:
        if self._checkpoint_queue.is_earlier_under_way if is_earlier_only else self._checkpoint_queue.is_under_way:
            with self._measure("write checkpoint"), self.ledger.measure("saving"):
                self._checkpoint_queue.finish()

    # The loop

    def _train_epoch(self) -> None:
        self.state.progress = self.state.progress.at_next_batch()
        self._schedule.begin_epoch(self.state)
        if self.state.progress.batch == 0:
            if self._schedule.is_reload_due(self.state):
                with self.ledger.measure("data_wait"):
                    self._run_for_report(Reload())
            self._notify("on_train_epoch_start")
        is_over = is_complete = False
        while not is_over:
            is_owed = self._schedule.is_validation_owed(self.state)
            is_complete = self._train().is_epoch_finished
            if not is_owed:
                self._notify("on_train_pause")
            is_complete = is_complete or self._is_run_over_at_epoch_end()
            if self._schedule.is_validation_due(self.state, is_epoch_finished=is_complete):
                self._validate()
                is_complete = is_complete or self._is_run_over_at_epoch_end()
            is_over = is_complete or self._schedule.is_run_over(self.state)
        self._run_for_report(EndEpoch(is_complete=is_complete))
        self._notify("on_train_epoch_end")

    def _is_run_over_at_epoch_end(self) -> bool:
        """Return True if the run ends here and the epoch has no further batch.

        An iterable data set without a length needs a look ahead on the workers to know that.
        """
        if not self._schedule.is_run_over(self.state):
            return False
        with self.ledger.measure("data_wait"):
            paused = self._run_for_report(LookAhead())
        assert isinstance(paused, Paused)
        return paused.is_epoch_finished

    def _train(self) -> Paused:
        assert self._group is not None
        requested_steps = [step for callback in self._callbacks if (step := callback.next_pause_step(self)) is not None]
        until_step = min([self._schedule.next_decision_step(self.state), *requested_steps])
        self._signals.check()
        self._is_training = True
        command = Train(until_batch=self._schedule.next_validation_batch(self.state), until_step=until_step)
        with self._measure_loop("steps"):
            paused = self._run_for_report(command)
        self._is_training = False
        self._group.record_goodput(self.ledger.read())
        self._signals.check()
        self._group.disarm_stop()
        assert isinstance(paused, Paused)
        return paused

    def _validate(self) -> None:
        self._evaluate("validate")
        self._notify("on_validation_end")

    def _check_sanity(self) -> None:
        self.state.is_sanity_checking = True
        self._evaluate("validate", is_sanity_check=True)
        self.state.is_sanity_checking = False

    def _evaluate(self, stage: Stage, *, is_sanity_check: bool = False) -> Evaluated:
        self._signals.check()
        self._notify("on_evaluation_start", stage)
        with self._measure_loop("validation" if self.state.stage == "fit" else "steps"):
            evaluated = self._run_for_report(Evaluate(stage=stage, is_sanity_check=is_sanity_check))
        self._signals.check()
        assert isinstance(evaluated, Evaluated)
        if self._written:
            written, self._written = self._written, []
            predictions.write(written)
        self._notify("on_evaluation_end", stage)
        return evaluated

    @contextmanager
    def _measure_loop(self, cause: Cause) -> Iterator[None]:
        """Charge a command to the cause, except for the data wait and the compilation that its reports tell of."""
        self._reported_s = (0.0, 0.0)
        with self.ledger.measure(cause):
            yield
        for seconds, target in zip(self._reported_s, _REPORTED_CAUSES, strict=True):
            self.ledger.move(seconds, source=cause, target=target)

    def _note_stop(self, reason: str) -> None:
        self.state.stop_reason = self.state.stop_reason or reason

    def _finish_run(self) -> None:
        finished = self._run_for_report(Finish(interruption=self._signals.pending))
        assert isinstance(finished, Finished)
        self.finished = replace(finished, state_dict=self._gathered_weights.state_dict or finished.state_dict)
        if self.state.stage == "fit":
            self.finish_saves()
            if self._group is not None:
                self._group.record_goodput(self.ledger.read())
            metrics = {**self.ledger.read().to_metrics(), "epoch": self.state.log_epoch}
            self._log_writer.log_metrics(metrics, step=self.state.log_step)

    def _arm_stop(self) -> None:
        if self._group is not None:
            self._group.arm_stop()

    def _handle_connection(self) -> None:
        self._signals.install()
        self._signals.is_connecting = False
        self._signals.check()

    def _end_interrupted_run(self) -> None:
        """Save and return the results of an interrupted run whose workers are idle and can still run commands."""
        if self.state.stage == "fit":
            self._notify("on_interrupt")
        self._finish_run()

    def _measure(self, name: str) -> AbstractContextManager[None]:
        return nullcontext() if self._profiler is None else self._profiler.measure(name)

    def _describe_profiles(self) -> None:
        """Print the profiler's result once the workers have reported theirs, however the run has ended."""
        if self._job.profiler is not None and self._profiler is not None and self._profiles:
            profiles = self._profiler.append_own_profile(self._profiles)
            self._job.profiler.describe(self.state.stage, profiles, log_dir=self.log_dir)

    # The workers

    @contextmanager
    def _run_with_group(self, checkpoint: dict[str, Any] | None, *, is_resuming: bool) -> Iterator[None]:
        """Start the group, the callbacks and the loggers, and end them after success, failure or interruption."""
        started: list[DriverCallback] = []
        self._signals.install()
        try:
            self._signals.is_connecting = self.plan.workers.num_workers > 0
            with self._measure("get workers"), start_is_shown(self.plan.workers.num_workers, self._callbacks):
                self._group = build_group(self.plan, self._job, on_connected=self._handle_connection)
            self._start(checkpoint, is_resuming=is_resuming)
            self._signals.is_deferring = True
            for callback in self._callbacks:
                started.append(callback)
                callback.on_start(self)
            self.ledger.charge("other")
            yield
            self._signals.check()
            self.finish_saves()
            self._log_writer.drain()
            status = "success"
        except BaseException as error:
            if self.plan.workers.num_workers == 0:
                # torch's handler of SIGCHLD may raise anywhere in this process.
                explain_dead_process(error)
            status = self._signals.status_after(error)
            self.state.is_interrupted = status == "interrupted"
            try:
                is_interruption = self.state.is_interrupted and isinstance(error, (KeyboardInterrupt, SystemExit))
                if is_interruption and self.is_idle:
                    self._end_interrupted_run()
                if not self._signals.is_ending_at_once:
                    self.finish_saves()
            finally:
                for callback in started:
                    callback.on_exception(self, error)
            if isinstance(error, WorkerDied) and self.state.stage == "fit":
                error.advise(self._describe_how_to_continue())
            raise
        finally:
            try:
                for callback in started:
                    callback.on_end(self)
                self._log_writer.finalize(status)
            finally:
                with self._measure("release workers"):
                    if self._group is not None:
                        self._group.release(is_kept=not self.state.is_interrupted)
                self._signals.restore()
                self._describe_profiles()

    def _describe_how_to_continue(self) -> str:
        """Describe how far the failed run got and which checkpoint the next run can start from."""
        progress = self.state.progress
        text = f"The last step that it reported is {progress.global_step}, in epoch {progress.epoch}. "
        newest = next(
            (callback.newest_model_path for callback in self._checkpoint_callbacks if callback.newest_model_path), ""
        )
        if newest:
            return text + f'The newest checkpoint is {newest}: Trainer(resume="auto") continues from it'
        if self._checkpoint_callbacks:
            return text + (
                "No checkpoint has been saved yet: ModelCheckpoint(every_n_train_steps=N) saves inside an epoch, too, "
                'and Trainer(resume="auto") continues from the newest checkpoint'
            )
        return text + 'The run keeps no checkpoints: with some, Trainer(resume="auto") would continue from the newest'

    def _start(self, checkpoint: dict[str, Any] | None, *, is_resuming: bool) -> None:
        assert self._group is not None
        is_resuming = is_resuming and checkpoint is not None
        checkpoint = checkpoint and sharded.ensure_readable(checkpoint, sees=self._group.can_read)
        if is_resuming:
            assert checkpoint is not None
            self._callback_states.load(checkpoint)
            step = format.read_progress(checkpoint).global_step
            self._log_writer.resume(step=step, positions=format.read_log_positions(checkpoint))
            self.state.callback_metrics.update(format.read_metrics(checkpoint))
        started = self._run_for_report(
            Start(
                stage=self.state.stage,
                checkpoint=checkpoint,
                is_resuming=is_resuming,
                progress=self.state.progress,
                random_state=None if self._group.is_in_driver else format.random_state(self.plan.workers.accelerator),
                torch_settings=None if self._group.is_in_driver else TorchSettings.current(),
            )
        )
        assert isinstance(started, Started)
        if self.state.stage == "fit":
            self._log_writer.log_start(self._job.module, self._job.datamodule)

    def _run_for_report(self, command: Command) -> Report:
        """Run a command and return rank 0's last report."""
        last: Report | None = None
        for report in self._run(command, only_rank=0):
            last = report if not isinstance(report, LogCall) else last
        if last is None:
            raise RaylitError(f"no worker answered {type(command).__name__}")
        return last

    def _run(self, command: Command, *, only_rank: int | None = None) -> Iterator[Report]:
        """Run a command and process every report before it is yielded."""
        assert self._group is not None
        self._checkpoint_queue.note_command()
        reports = self._group.run(self._callback_states.attach_to(command))
        if self._profiler is not None:
            reports = self._profiler.time_items("wait for workers", reports)
        for rank, report in reports:
            # The worker in this process stands still until the report has been processed; actors go on.
            with self.ledger.measure("other") if self._group.is_in_driver else nullcontext():
                self._process_report(rank, report)
            if only_rank is None or rank == only_rank:
                yield report

    def _process_report(self, rank: int, report: Report) -> None:
        self._log_writer.check()
        self._checkpoint_queue.settle()
        if isinstance(report, (Paused, EpochEnded, Evaluated)) and report.stop_reason is not None:
            self._note_stop(report.stop_reason)
        if isinstance(report, Paused):
            self._reported_s = max(self._reported_s, (report.data_wait_s, report.compilation_s), key=sum)
        if isinstance(report, Evaluated):
            self._reported_s = max(self._reported_s, (0.0, report.compilation_s), key=sum)
        if isinstance(report, Raised):
            self._note_raised(report)
        if isinstance(report, Written):
            self._written.append(report)
        if isinstance(report, Profile):
            self._profiles.append(report)
        if rank == 0:
            self._receive(report)

    def _receive(self, report: Report) -> None:
        """Apply rank 0's report to the state and notify callbacks and loggers."""
        state = self.state
        match report:
            case Ticked():
                state.progress_bar_metrics.update(report.metrics)
                self._notify("on_tick", report.batch, report.dataloader_idx)
            case Measured():
                state.slowest_rank = describe_slowest_rank(report.ranks)
            case Stepped():
                state.progress = report.progress
                self._record_metrics(report.metrics)
                self._notify("on_step_metrics")
            case Paused():
                state.progress = report.progress
                self._record_metrics(report.metrics, is_logged=False)
            case Evaluated() if not report.is_broken_off:
                state.progress = self._schedule.progress_after_evaluation(state)
                for step, metrics in report.steps:
                    self._log_metrics(metrics, step=step)
                self._record_metrics(report.metrics, is_flushed=True)
            case EpochEnded():
                state.progress = report.progress
                state.is_epoch_cut_short = not report.progress.is_epoch_ended
                self._record_metrics(report.metrics, is_flushed=True)
            case Started():
                state.progress = report.progress
                state.summary = report.summary
                self._schedule.set_sizes(state, report)
            case Weights():
                self._gathered_weights.take(report.state_dict)
            case LogCall():
                self._log_writer.queue_call(report)
            case Reloaded():
                self._schedule.set_sizes(state, report)

    def _note_raised(self, report: Raised) -> None:
        """Record the progress of a rank whose hook has raised.

        Any rank may report it: the ranks that wait for it are in the same step and report nothing further.
        """
        reported, current = report.progress, self.state.progress
        if (reported.batch_in_all, reported.global_step) >= (current.batch_in_all, current.global_step):
            self.state.progress = reported

    def _record_metrics(self, metrics: Metrics, *, is_logged: bool = True, is_flushed: bool = False) -> None:
        state = self.state
        state.callback_metrics.update({name: metric.value for name, metric in metrics.items()})
        state.metric_steps.update(dict.fromkeys(metrics, state.progress.global_step))
        state.progress_bar_metrics.update({name: metric.value for name, metric in metrics.items() if metric.prog_bar})
        if is_logged and self._log_metrics(metrics, step=state.log_step) and is_flushed:
            self._log_writer.save()

    def _log_metrics(self, metrics: Metrics, *, step: int) -> bool:
        """Send the metrics to the loggers; return True if there were any."""
        logged = {name: metric.value for name, metric in metrics.items() if metric.logger}
        if logged:
            self.state.logged_metrics.update(logged)
            self._log_writer.log_metrics({**logged, "epoch": self.state.log_epoch}, step=step)
        return bool(logged)

    def _notify(self, hook: str, *args: Any) -> None:
        self._checkpoint_queue.settle()
        before = self._notified
        for callback in self._callbacks:
            self._notified = callback
            try:
                getattr(callback, hook)(self, *args)
            except StoreUnreachable as error:  # raised when the callback looks for a free file name before a save
                self._checkpoint_queue.note_failed(callback, error.url, error)
        self._notified = before


class WorkerGroup(Protocol):
    """Group of workers that all run the same commands, one after the other."""

    is_in_driver: bool
    """True if the workers' objects are the driver's own."""

    @property
    def is_idle(self) -> bool:
        """True if every worker has finished its last command and can run another."""
        ...

    def can_read(self, path: str) -> bool:
        """Return True if every worker can read the file at a path or URL at which the driver finds one."""
        ...

    def checkpoint_writer(self, *, is_in_parts: bool) -> CheckpointWriter:
        """Return the writer of the checkpoint that the last Save command left pending.

        With `is_in_parts` it has a shard on each worker.
        """
        ...

    def record_goodput(self, goodput: Goodput) -> None:
        """Record the run's wall time by cause so far as metrics of Ray's; nothing without Ray."""
        ...

    def arm_stop(self) -> None:
        """Make the command under way, and any later one, end its loop after the current step or batch.

        Returns at once; it is called in a signal handler.
        """
        ...

    def disarm_stop(self) -> None:
        """Let later commands run to their own ends again."""
        ...

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        """Run the command on every worker; yield (rank, report) as they arrive, until all have finished.

        Raises a hook's exception, or WorkerDied for a lost worker. Either leaves the group unusable.
        """
        ...

    def release(self, *, is_kept: bool = True) -> None:
        """Release the workers, however the run has ended; may be called more than once.

        With `is_kept`, healthy workers may stay in the pool for another run.
        """
        ...


class InlineGroup:
    """Group of one worker in the driver's process, for `num_workers=0`."""

    is_in_driver = True

    def __init__(self, plan: Plan, job: Job) -> None:
        self.is_idle = True
        self._is_stop_armed = False
        self._stop_barrier = StopBarrier()
        self._settings = TorchSettings.current()
        self._worker = Worker(
            plan=plan, context=WorkerContext(), job=job, is_in_driver=True, stop_barrier=self._stop_barrier
        )

    def run(self, command: Command) -> Iterator[tuple[int, Report]]:
        self.is_idle = False
        self._stop_barrier.reset()
        if self._is_stop_armed:
            self.arm_stop()
        for report in self._worker.run(command):
            yield 0, report
        self.is_idle = True

    def can_read(self, path: str) -> bool:
        return True

    def record_goodput(self, goodput: Goodput) -> None:
        """Do nothing: there is no Ray."""

    def checkpoint_writer(self, *, is_in_parts: bool) -> PendingCheckpoint:
        assert not is_in_parts, "one worker has nothing to share"
        return self._worker.pending_checkpoint

    def arm_stop(self) -> None:
        # This runs in the loop's own thread, between two of its instructions: no other worker has to wait.
        self._is_stop_armed = True
        self._stop_barrier.release(self._stop_barrier.num_done + 1)

    def disarm_stop(self) -> None:
        self._is_stop_armed = False

    def release(self, *, is_kept: bool = True) -> None:
        self._worker.abandon()
        self._settings.apply()


def build_group(plan: Plan, job: Job, *, on_connected: Callable[[], None]) -> WorkerGroup:
    """Create the workers that the plan asks for, ready for commands; call `on_connected` once Ray is connected."""
    if plan.workers.num_workers == 0:
        return InlineGroup(plan, job)
    # Importing Ray takes half a second, which a run without it does not spend.
    from raylit.driver.ray.worker_pool import acquire_group

    return acquire_group(plan, job, on_connected=on_connected)

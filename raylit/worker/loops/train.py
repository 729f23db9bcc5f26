"""Training loop of one worker: it runs the epoch's batches from one pause to the next.

One pass of the loop in `TrainLoop.run` is one micro-batch: fetch it (the feed has moved it to the device), call
`on_train_batch_start`, run forward, backward and, at the end of an accumulation window, the optimizer step, and call
`on_train_batch_end`. Between two reports nothing waits for the device.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic, perf_counter
from typing import Any

import torch
from torch import Tensor

from raylit.checkpoint import format
from raylit.compat.torch_optim import mark_stepped
from raylit.config import BatchLimit, Limits
from raylit.errors import ModuleError
from raylit.profilers.base import NEXT_BATCH
from raylit.protocol.messages import EndEpoch, EpochEnded, LookAhead, Paused, Report, Stepped, Ticked, Train
from raylit.strategies.sync_batch_norm import SyncedBatchNorms
from raylit.worker.data.agreement import check_epoch
from raylit.worker.data.batches import MovedFeed, PeekableFeed, TimedFeed, TrainSource
from raylit.worker.data.sampling import Feed
from raylit.worker.loops.step_outputs import EpochOutputs, detach_outputs, join_outputs
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.buffer import MetricBuffer, sum_states
from raylit.worker.optimization import Optimization
from raylit.worker.optimization.base import average_saved_gradients
from raylit.worker.optimization.configured import Schedule
from raylit.worker.session import Session

_END = object()

NO_SHARE_OF_LAST_BATCH = (
    "with sync_batchnorm=True on GPUs every worker needs a part of each batch, as batch norms wait for all of them, "
    "and the last step of the training epoch has fewer samples (or batches, where they are dealt out whole) than there "
    "are workers: pass drop_last=True to the DataLoader, or choose another batch_size"
)


class TrainLoop:
    """Training loop of one rank: position in the epoch, loop state and metric buffer between two pauses."""

    def __init__(
        self,
        session: Session,
        *,
        data: TrainSource,
        optimization: Optimization,
        schedules: list[Schedule],
        metrics: MetricBuffer,
    ) -> None:
        """Create the loop; nothing runs before the first `run`.

        Args:
            session: What the loops of this run share.
            data: Source of the training batches.
            optimization: Runs forward, backward and optimizer step of a batch.
            schedules: Learning-rate schedules that raylit steps.
            metrics: Buffer of the values that are logged during training.
        """
        self._session = session
        self._view = session.view
        self._optimization = optimization
        self._schedules = schedules
        self._step_schedules: list[Schedule] = []
        self._feed: Feed | TimedFeed | MovedFeed | PeekableFeed | None = None
        self._peekable: PeekableFeed | None = None
        """The feed, where its end is not known in advance; else None."""
        self._opening_s = 0.0
        """Seconds in which the command under way has opened the epoch's loader."""
        self._is_exhausted = False
        """True where the feed or a hook has ended the epoch under way; False where its length does."""
        self._sums_before_epoch_end: dict[str, Any] | None = None
        """Sums from before the hooks at the epoch's end, for checkpoints of a run that ended inside the epoch."""
        self._has_started = False
        self._is_stop_agreed = False
        self.metrics = metrics
        self._epoch_outputs = EpochOutputs.from_hook(
            session,
            hook="training_epoch_end",
            metrics=metrics,
            num_lists=optimization.num_outputs,
            collectives=session.collectives,
        )
        self.load(data)

    def load(self, data: TrainSource) -> None:
        """Train on `data` from the next epoch on."""
        self._data = data
        self.num_batches = count_epoch_batches(data, self._session.plan.limits)
        """Number of batches of a whole epoch on each rank; infinite if unknown."""
        self._set_epoch_length(self.num_batches)

    def run(self, command: Train) -> Iterator[Report]:
        """Train until the command's limits, the end of the epoch or a stop on which the ranks have agreed.

        Yields:
            `Measured` and, on rank 0, `Stepped` at each logging interval, `Ticked` on rank 0, and a last `Paused`.

        Raises:
            ModuleError: A rank has no share of the last batch, which the strategy does not allow.
        """
        session, view, metrics, optimization = self._session, self._view, self.metrics, self._optimization
        compiled_before_s = session.compilation_s
        feed = self._begin_command()
        data_wait_s = self._opening_s
        session.clock.restart(data_wait_s=data_wait_s)
        on_batch_start = session.hooks.list_calls("on_train_batch_start")
        on_batch_end = session.hooks.list_calls("on_train_batch_end")
        # For batches of which some ranks have no share: the hooks get None as the batch on these ranks.
        on_uneven_batch_start = [session.uneven.wrap_hook(hook, is_answer_needed=True) for hook in on_batch_start]
        on_uneven_batch_end = [session.uneven.wrap_hook(hook) for hook in on_batch_end]
        if self._epoch_outputs is not None:
            on_batch_end = (self._epoch_outputs.add_batch, *on_batch_end)
            on_uneven_batch_end = [self._epoch_outputs.add_share, *on_uneven_batch_end]
        run_batch, run_share = optimization.run_batch, optimization.run_share
        num_batches, is_single_rank = self.num_batches_in_epoch, session.collectives.world_size == 1
        stop_barrier, peekable_feed = session.stop_barrier, self._peekable
        window = session.plan.optimization.window_in(view.current_epoch)
        log_every = session.plan.reporting.log_every_n_steps or math.inf
        period_s = session.plan.reporting.refresh_period_s if session.context.rank == 0 else math.inf
        next_tick = monotonic() + period_s
        end_batch = min(command.until_batch, num_batches)
        is_stopping = is_exhausted = False

        while (
            view.num_batches_done < end_batch
            and view.global_step < command.until_step
            and not is_stopping
            and (stop_barrier.num_done < stop_barrier.limit or stop_barrier.may_continue())
        ):
            # Fetch: the feed has moved the batch to the device.
            fetch_began_at = perf_counter()
            batch = next(feed, _END)
            data_wait_s += perf_counter() - fetch_began_at
            if batch is _END:
                is_exhausted = True
                break
            batch_idx = view.batch_idx = view.num_batches_done
            weight = feed.weight
            is_step_due = (
                window == 1
                or (batch_idx + 1) % window == 0
                or batch_idx + 1 == num_batches
                or (peekable_feed is not None and not peekable_feed.has_next(num_done=batch_idx + 1))
            )
            metrics.batch = batch
            is_uneven = weight != 1.0
            if is_uneven:
                view.is_uneven = True

            # Hooks before the batch; one that returns -1 ends the epoch.
            start_hooks = on_uneven_batch_start if is_uneven else on_batch_start
            if start_hooks and any([hook(batch, batch_idx) == -1 for hook in start_hooks]):
                is_exhausted = True
                break

            # Forward, backward and, at the end of an accumulation window, the optimizer step.
            if is_uneven:
                if batch is None and session.strategy.needs_batch_on_every_rank:
                    raise ModuleError(NO_SHARE_OF_LAST_BATCH)
                outputs = run_share(batch, batch_idx, is_step_due, weight)
            else:
                outputs = run_batch(batch, batch_idx, is_step_due)
            view.num_batches_done = batch_idx + 1
            view.total_batches += 1
            if is_step_due:
                self._count_step()

            # Hooks after the batch, reports and the decision to stop.
            for hook in on_uneven_batch_end if is_uneven else on_batch_end:
                hook(detach_outputs(outputs), batch, batch_idx)
            if is_uneven:
                view.is_uneven = False
            if is_step_due and view.num_windows % log_every == 0:
                yield from self._report_step(data_wait_s=data_wait_s)
            is_stopping = view.should_stop and (is_single_rank or self._is_stop_agreed)
            if monotonic() >= next_tick:
                yield Ticked(
                    batch=view.num_batches_done, metrics=_to_plain_values(session.module.get_progress_bar_dict())
                )
                next_tick = monotonic() + period_s

        # The epoch may end inside an accumulation window: a hook has ended it, or a resumed run has fewer batches left.
        self._is_exhausted = is_exhausted
        if is_exhausted and optimization.finish_window():
            self._count_step()
            if view.num_windows % log_every == 0:
                yield from self._report_step(data_wait_s=data_wait_s)
        if peekable_feed is not None:
            data_wait_s += peekable_feed.look_ahead_s
        yield self._pause(
            is_epoch_finished=is_exhausted or view.num_batches_done >= num_batches,
            data_wait_s=data_wait_s,
            compilation_s=session.compilation_s - compiled_before_s,
        )

    def run_detecting_anomaly(self, command: Train) -> Iterator[Report]:
        """Call `run` with torch's anomaly detection, whose errors show the forward pass that made the nan."""
        with torch.autograd.set_detect_anomaly(True):
            yield from self.run(command)

    def look_ahead(self, command: LookAhead) -> Iterator[Report]:
        """Yield a `Paused` that says whether the epoch has no further batch. Collective."""
        is_finished = self._view.num_batches_done >= self.num_batches_in_epoch
        if not is_finished and self._peekable is not None:
            # A resumed run fetches this batch again, with the same random numbers.
            random_state = format.random_state(self._session.accelerator)
            is_finished = not self._peekable.has_next(num_done=self._view.num_batches_done)
            format.set_random_state(random_state, self._session.accelerator)
        yield Paused(progress=self._view.progress, is_epoch_finished=is_finished)

    def end_epoch(self, command: EndEpoch) -> Iterator[Report]:
        """Run the hooks at the epoch's end, reduce its metrics and step its schedulers if it is complete. Collective.

        Where the run ends inside the epoch, checkpoints keep what a resumed run needs to complete it: the sums and
        random numbers from before the hooks. The hooks and the loggers get the values so far.
        """
        session, view = self._session, self._view
        random_state = None if command.is_complete else format.random_state(session.accelerator)
        view.is_epoch_cut_short = not command.is_complete
        if not command.is_complete:
            self._sums_before_epoch_end = self._copy_epoch_sums()
        self.metrics.is_training_batch, self.metrics.batch = False, None
        if self._epoch_outputs is not None:
            self._epoch_outputs.call_hook()
        with self.metrics.override_logged():
            session.hooks.call("on_train_epoch_end")
        metrics, _ = self.metrics.read_epoch()
        view.receive(metrics)
        if command.is_complete:
            self._step_schedulers(
                [schedule for schedule in self._schedules if schedule.interval == "epoch"], view.current_epoch + 1
            )
            view.is_epoch_ended = True
            self._feed = self._peekable = None
            self._is_exhausted = False
            self._set_epoch_length(self.num_batches)
        if random_state is not None:
            format.set_random_state(random_state, session.accelerator)
        session.strategy.sync_buffers(session.module)
        yield EpochEnded(progress=view.progress, metrics=metrics, stop_reason=self._describe_stop())

    def end(self) -> None:
        """Call `on_train_end` after the last epoch, if `on_train_start` has been called."""
        self._session.module.redirect_log(None)
        if self._has_started:
            self._session.hooks.call("on_train_end")

    def forward_epoch(self) -> None:
        """Run `training_step` over an epoch's batches without training or logging. Collective.

        It updates what forward passes change, such as the statistics of batch norms, which are computed over all ranks.
        """
        run_forward_epoch(self._session, self._data, metrics=self.metrics, epoch=self._view.current_epoch + 1)

    def rank_state(self) -> dict[str, Any]:
        """Return the state that differs between ranks: sums of the unfinished epoch, generators and data position."""
        data_state = None if self._peekable is None else self._peekable.state_before
        if data_state is None:
            data_state = self._data.state_dict(num_done=self._view.num_batches_done)
        return {
            **(self._copy_epoch_sums() if self._sums_before_epoch_end is None else self._sums_before_epoch_end),
            "optimization": self._optimization.state_dict(),
            "reduced": self._view.metrics_state(),
            # A stateful loader whose epoch has ended may already be at the start of the next one.
            "is_exhausted": self._is_exhausted,
            "data": data_state,
            "is_finding_unused": self._session.strategy.is_finding_unused,
        }

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Load what `rank_state` returned on this rank, in a run with the same world size."""
        module = self._session.module
        self.metrics.load_state_dict(state["metrics"], module)
        torchmetrics_adapter.load_states(module, state.get("objects", {}))
        if self._epoch_outputs is not None:
            self._epoch_outputs.load_state_dict(state.get("outputs", []))
        self._optimization.load_state_dict(state.get("optimization", {}))
        self._view.load_metrics_state(state.get("reduced", {}))
        self._load_data_state(state)

    def load_redistributed_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Load states saved with another world size: redistribute partial sums over the ranks."""
        context, module = self._session.context, self._session.module
        states_of_rank = states[context.rank :: context.world_size]
        unmerged = torchmetrics_adapter.load_merged_states(
            module, [state.get("objects", {}) for state in states_of_rank]
        )
        if unmerged and context.rank == 0:
            warnings.warn(
                f"of {', '.join(unmerged)} the states of {len(states)} workers cannot be merged: in the epoch under "
                "way some of the samples before the checkpoint do not count",
                stacklevel=2,
            )
        self.metrics.load_state_dict(sum_states([state["metrics"] for state in states_of_rank]), module)
        if self._epoch_outputs is not None:
            self._epoch_outputs.load_state_dict(join_outputs([state.get("outputs", []) for state in states_of_rank]))
        self._optimization.load_state_dict(average_saved_gradients([state.get("optimization", {}) for state in states]))
        self._view.load_metrics_state(states[0].get("reduced", {}))
        # The number of samples dealt out and the states of the samplers' generators are equal on all ranks.
        self._load_data_state(states[0])

    def _set_epoch_length(self, num_batches: float) -> None:
        self.num_batches_in_epoch = self._view.num_training_batches = num_batches

    def _begin_command(self) -> Feed | TimedFeed | MovedFeed | PeekableFeed:
        """Start the training and the epoch, where that has not happened yet; return the epoch's feed. Collective."""
        view, hooks = self._view, self._session.hooks
        view.metrics = self.metrics
        self._opening_s = 0.0
        if self._peekable is not None:
            self._peekable.look_ahead_s = 0.0
        self._session.module.redirect_log(self.metrics)
        self._is_stop_agreed = view.should_stop = view.is_uneven = False
        self.metrics.is_training_batch, self.metrics.batch = False, None
        if not self._has_started:
            self._has_started = True
            hooks.call("on_train_start")
        view.move_to(view.progress.at_next_batch())
        if self._feed is None:
            if view.num_batches_done == 0:
                hooks.call("on_train_epoch_start")
            # Read after the hook, which may have replaced schedules.
            self._step_schedules = [schedule for schedule in self._schedules if schedule.interval == "step"]
            self._session.uneven.start()
            self._optimization.start_epoch(window=self._session.plan.optimization.window_in(view.current_epoch))
            began_at = perf_counter()
            self._feed = self._open_feed()
            self._opening_s = perf_counter() - began_at
            self._session.restore_random_state()
        self.metrics.is_training_batch = True
        return self._feed

    def _open_feed(self) -> Feed | TimedFeed | MovedFeed | PeekableFeed:
        """Return the epoch's batches from the view's position on, measured and moved to the device. Collective."""
        session, epoch = self._session, self._view.current_epoch
        # A run that was interrupted after the last batch of its epoch has no batch left to fetch.
        if self._is_exhausted:
            batches = Feed(iter(()))
        else:
            batches = self._data.epoch(epoch, skip=self._view.num_batches_done)
            check_epoch(
                session.collectives,
                name="training",
                order=self._data.order_fingerprint(),
                num_batches=self.num_batches_in_epoch,
            )
        feed = batches if session.profiler is None else TimedFeed(batches, session.profiler, NEXT_BATCH["fit"])
        moved = feed if session.mover is None else MovedFeed(feed, session.mover)
        if self._data.has_exact_length:
            return moved
        state_of_source = self._data.state_dict if self._data.has_own_state else None
        self._peekable = PeekableFeed(moved, state_of_source=state_of_source)
        return self._peekable

    def _count_step(self) -> None:
        """Count an accumulation window, whether or not its optimizer step took place; step the schedulers due."""
        view = self._view
        view.num_windows += 1
        self._session.stop_barrier.num_done += 1
        if self._step_schedules:
            self._step_schedulers(self._step_schedules, view.num_windows)

    def _report_step(self, *, data_wait_s: float) -> Iterator[Report]:
        """Gather the interval's metrics, times and stop wishes of all ranks at once; report them. Collective.

        Args:
            data_wait_s: This rank's wait for data since the command began.
        """
        view, clock = self._view, self._session.clock
        times = clock.read(data_wait_s=data_wait_s)
        metrics, self._is_stop_agreed, times_of_ranks = self.metrics.read_step(
            stop_wish=view.should_stop, own_numbers=times
        )
        if self._is_stop_agreed:
            view.should_stop = True
        view.receive(metrics)
        yield clock.build_report(times_of_ranks, batch_size=self.metrics.get_batch_size())
        # All ranks have the same values: with 1,000 workers the driver would read 1,000 equal reports.
        if metrics and self._session.context.rank == 0:
            yield Stepped(progress=view.progress, metrics=metrics)
        clock.restart(data_wait_s=data_wait_s)

    def _pause(self, *, is_epoch_finished: bool, data_wait_s: float, compilation_s: float) -> Paused:
        """Reduce metrics and stop wishes, synchronize buffers and return the report of the pause. Collective."""
        view = self._view
        metrics, self._is_stop_agreed, _ = self.metrics.read_step(stop_wish=view.should_stop)
        view.receive(metrics)
        self._session.strategy.sync_buffers(self._session.module)
        return Paused(
            progress=view.progress,
            is_epoch_finished=is_epoch_finished,
            stop_reason=self._describe_stop(),
            metrics=metrics,
            data_wait_s=data_wait_s,
            compilation_s=compilation_s,
        )

    def _describe_stop(self) -> str | None:
        return "trainer.should_stop was set" if self._is_stop_agreed or self._view.should_stop else None

    def _copy_epoch_sums(self) -> dict[str, Any]:
        """Return copies of what the unfinished epoch has accumulated on this rank, as plain values."""
        module = self._session.module
        return {
            "metrics": self.metrics.state_dict(module),
            "objects": torchmetrics_adapter.copy_module_states(module),
            "outputs": [] if self._epoch_outputs is None else self._epoch_outputs.state_dict(),
        }

    def _step_schedulers(self, schedules: list[Schedule], count: int) -> None:
        for schedule in schedules:
            if count % schedule.frequency == 0 and (
                schedule.interval == "epoch" or self._is_scheduler_active(schedule)
            ):
                schedule.step(self._view.metric_values() if schedule.reduce_on_plateau else {})

    def _is_scheduler_active(self, schedule: Schedule) -> bool:
        return self._optimization.is_active(schedule.opt_idx)

    def _load_data_state(self, state: dict[str, Any]) -> None:
        """Load the data's position; the view has the saved progress already."""
        if state.get("is_finding_unused", False):
            # Find unused parameters from the first step on, as the uninterrupted run does.
            self._session.strategy.find_unused()
        self._data.load_state_dict(state["data"])
        self._is_exhausted = state.get("is_exhausted", False)
        progress = self._view.progress
        if progress.global_step > 0:
            for optimizer in self._view.optimizers:
                # Only scheduler steps may be left of the epoch; torch warns of these before an optimizer step.
                mark_stepped(optimizer)
        if progress.is_inside_epoch:
            self._set_epoch_length(self._count_resumed_epoch(progress.epoch, progress.batch))

    def _count_resumed_epoch(self, epoch: int, num_done: int) -> float:
        """Count the batches of an epoch whose first `num_done` came from other batch sizes or another world size."""
        limits, num_usual = self._session.plan.limits, self._data.num_batches
        num_left = self._data.num_left(epoch, num_done)
        limit = limits.overfit_batches or limits.train_batches
        if math.isinf(num_usual) or isinstance(limit, int):
            return apply_limit(num_done + num_left, limit)
        # The limit is a fraction: count its end in batches of today's size, less those that are done.
        return num_done + max(0, apply_limit(num_usual, limit) - (num_usual - num_left))


def count_epoch_batches(data: TrainSource, limits: Limits) -> float:
    """Return the number of batches that an epoch takes of the data; infinite where its length is unknown."""
    return apply_limit(data.num_batches, limits.overfit_batches or limits.train_batches)


def apply_limit(num_batches: float, limit: BatchLimit) -> float:
    """Return the number of batches after a limit: a float is a fraction of them, an int a count."""
    if isinstance(limit, int):
        return min(num_batches, limit)
    return num_batches if limit == 1.0 or math.isinf(num_batches) else int(num_batches * limit)


def _to_plain_values(values: dict[str, Any]) -> dict[str, float | str]:
    """Convert the values of a user's `get_progress_bar_dict` to numbers and strings, which can cross to the driver."""
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}


def run_forward_epoch(session: Session, data: TrainSource, *, metrics: MetricBuffer, epoch: int) -> None:
    """Run `training_step` over the batches of an epoch in train mode and discard its losses and metrics.

    Batch norms compute their statistics over all ranks, as one process would over their batches together. Collective.
    """
    feed: Any = data.epoch(epoch)
    if session.mover is not None:
        feed = MovedFeed(feed, session.mover)
    step, collectives = session.module.training_step, session.collectives
    with _suspend_logging(session, metrics), _sync_batch_norms(session) as batch_norms:
        for batch_idx, batch in enumerate(feed):
            is_excluded = False
            if feed.weight != 1.0:
                # A rank without a share of this batch runs another rank's: the batch norms' all-reduce needs all ranks.
                batches = collectives.gather_objects(batch)
                is_excluded = batch is None
                batch = next(one for one in batches if one is not None) if is_excluded else batch
            if batch_norms is not None:
                batch_norms.exclude_rank(is_excluded=is_excluded)
            session.strategy.exclude_rank(is_excluded=is_excluded)
            with session.step_context():
                step(batch, batch_idx)
        session.strategy.exclude_rank(is_excluded=False)


@contextmanager
def _suspend_logging(session: Session, metrics: MetricBuffer) -> Iterator[None]:
    """Discard what the module logs inside the context."""
    module = session.module
    previous = module.redirect_log(metrics)
    metrics.is_suspended = metrics.is_training_batch = True
    try:
        yield
    finally:
        module.redirect_log(previous)
        metrics.is_suspended = metrics.is_training_batch = False


@contextmanager
def _sync_batch_norms(session: Session) -> Iterator[SyncedBatchNorms | None]:
    """Synchronize the statistics of batch norms over the ranks inside the context.

    Yields None with one rank, or where the compiled graph computes them over all devices.
    """
    if session.collectives.world_size == 1 or session.accelerator.is_spmd:
        yield None
        return
    norms = SyncedBatchNorms(session.module, device=session.device)
    try:
        yield norms
    finally:
        norms.restore()

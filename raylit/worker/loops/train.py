"""The training loop of one worker."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from raylit.checkpoint import format
from raylit.compat.torch_optim import mark_stepped
from raylit.config.plan import BatchLimit, Limits
from raylit.errors import ModuleError
from raylit.profilers.base import NEXT_BATCH
from raylit.protocol.messages import EndEpoch, EpochEnded, LookAhead, Paused, Report, Stepped, Ticked, Train
from raylit.strategies.sync_batch_norm import SyncedBatchNorms
from raylit.worker.data.agreement import check_epoch
from raylit.worker.data.batches import Feed, PeekableFeed, TrainSource
from raylit.worker.data.transfer import MovedFeed
from raylit.worker.loops.step_outputs import EpochOutputs, detach_outputs, join_outputs
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.metrics.entry import sum_states
from raylit.worker.optimization import Optimization
from raylit.worker.optimization.configured import Schedule
from raylit.worker.optimization.gradient_sync import average_saved_gradients
from raylit.worker.process.profiling import TimedFeed
from raylit.worker.session import Session


def run_forward(session: Session, data: TrainSource, *, metrics: MetricBuffer, epoch: int) -> None:
    """The training step over the batches of an epoch, in train mode; its losses and metrics count for nothing.

    Batch norms take their statistics over all ranks, as one process would over their batches together. Collective.
    """
    feed: Any = data.epoch(epoch)
    if session.mover is not None:
        feed = MovedFeed(feed, session.mover)
    step, collectives = session.module.training_step, session.collectives
    with _unlogged(session, metrics), _synced(session) as norms:
        for batch_idx, batch in enumerate(feed):
            is_excluded = False
            if feed.weight != 1.0:
                # A rank without a share runs another's: the statistics of all wait for it.
                offers = collectives.gather_objects(batch)
                is_excluded = batch is None
                batch = next(offer for offer in offers if offer is not None) if is_excluded else batch
            if norms is not None:
                norms.exclude_rank(is_excluded=is_excluded)
            session.strategy.exclude_rank(is_excluded=is_excluded)
            with session.around_step():
                step(batch, batch_idx)
        session.strategy.exclude_rank(is_excluded=False)


@contextmanager
def _unlogged(session: Session, metrics: MetricBuffer) -> Iterator[None]:
    module = session.module
    before = module.redirect_log(metrics)
    metrics.is_suspended = metrics.is_training_batch = True
    try:
        yield
    finally:
        module.redirect_log(before)
        metrics.is_suspended = metrics.is_training_batch = False


@contextmanager
def _synced(session: Session) -> Iterator[SyncedBatchNorms | None]:
    if session.collectives.world_size == 1:
        yield None
        return
    norms = SyncedBatchNorms(session.module, device=session.device)
    try:
        yield norms
    finally:
        norms.restore()


_END = object()

NO_SHARE_OF_LAST_BATCH = (
    "with sync_batchnorm=True on GPUs every worker needs a part of each batch, as batch norms wait for all of them, "
    "and the last step of the training epoch has fewer samples (or batches, where they are dealt out whole) than there "
    "are workers: pass drop_last=True to the DataLoader, or choose another batch_size"
)


class TrainLoop:
    """Position and buffers of the training; runs from pause to pause."""

    def __init__(
        self,
        session: Session,
        *,
        data: TrainSource,
        optimization: Optimization,
        schedules: list[Schedule],
        metrics: MetricBuffer,
    ) -> None:
        """`schedules`: those that step by themselves."""
        self._session = session
        self._view = session.view
        self._optimization = optimization
        self._schedules = schedules
        self._step_schedules: list[Schedule] = []
        self._feed: Feed | TimedFeed | MovedFeed | PeekableFeed | None = None
        self._peekable: PeekableFeed | None = None
        """The feed, where it is one whose end may come unforeseen."""
        self._is_exhausted = False
        """The epoch under way has no further batch, as its feed or a hook has said; not where its length says so."""
        self._cut_sums: dict[str, Any] | None = None
        """Of an epoch that the run has ended in: its sums before the hooks at the epoch's end, for its checkpoints."""
        self._has_started = False
        self._is_stop_agreed = False
        self.metrics = metrics
        self._kept = EpochOutputs.of(
            session, hook="training_epoch_end", metrics=metrics, num_lists=optimization.num_outputs
        )
        self.load(data)

    def load(self, data: TrainSource) -> None:
        """Train on `data` from the next epoch on."""
        self._data = data
        self.num_batches = batches_of_epoch(data, self._session.plan.limits)
        """Of an epoch."""
        self._set_length(self.num_batches)

    def run(self, command: Train) -> Iterator[Report]:
        """Train until the command's limits, the epoch's end or an agreed stop."""
        session, view, metrics, optimization = self._session, self._view, self.metrics, self._optimization
        feed = self._begin()
        on_batch_start = session.hooks.of("on_train_batch_start")
        on_batch_end = session.hooks.of("on_train_batch_end")
        # Of batches that some ranks have no share of; these hooks get None there, and decide what is to be done.
        on_uneven_start = [session.uneven.wrap_hook(hook, is_answer_needed=True) for hook in on_batch_start]
        on_uneven_end = [session.uneven.wrap_hook(hook) for hook in on_batch_end]
        if self._kept is not None:
            on_batch_end = (self._kept.keep_batch, *on_batch_end)
            on_uneven_end = [self._kept.keep_share, *on_uneven_end]
        run_batch, run_share = optimization.run_batch, optimization.run_share
        num_batches, is_alone = self.num_batches_in_epoch, session.collectives.world_size == 1
        brake, peekable = session.arm_stop, self._peekable
        window = session.plan.optimization.window_in(view.current_epoch)
        log_every = session.plan.reporting.log_every_n_steps or math.inf
        period_s = session.plan.reporting.refresh_period_s if session.context.rank == 0 else math.inf
        next_tick = monotonic() + period_s
        until_batch = min(command.until_batch, num_batches)
        is_stopping = is_exhausted = False

        while (
            view.num_batches_done < until_batch
            and view.global_step < command.until_step
            and not is_stopping
            and (brake.num_done < brake.limit or brake.may_continue())
        ):
            batch = next(feed, _END)
            if batch is _END:
                is_exhausted = True
                break
            batch_idx = view.batch_idx = view.num_batches_done
            weight = feed.weight
            is_step_due = (
                window == 1
                or (batch_idx + 1) % window == 0
                or batch_idx + 1 == num_batches
                or (peekable is not None and not peekable.has_next(num_done=batch_idx + 1))
            )
            metrics.batch = batch
            is_uneven = weight != 1.0
            if is_uneven:
                view.is_uneven = True
            start_hooks = on_uneven_start if is_uneven else on_batch_start
            if start_hooks and any([hook(batch, batch_idx) == -1 for hook in start_hooks]):
                is_exhausted = True
                break
            if is_uneven:
                if batch is None and session.strategy.needs_batch_on_every_rank:
                    raise ModuleError(NO_SHARE_OF_LAST_BATCH)
                outputs = run_share(batch, batch_idx, is_step_due, weight)
            else:
                outputs = run_batch(batch, batch_idx, is_step_due)
            view.num_batches_done = batch_idx + 1
            view.num_batches_in_all += 1
            if is_step_due:
                self._count_step()
            for hook in on_uneven_end if is_uneven else on_batch_end:
                hook(detach_outputs(outputs), batch, batch_idx)
            if is_uneven:
                view.is_uneven = False
            if is_step_due and view.num_windows % log_every == 0:
                yield from self._report_step()
            is_stopping = view.should_stop and (is_alone or self._is_stop_agreed)
            if monotonic() >= next_tick:
                yield Ticked(batch=view.num_batches_done, metrics=_shown(session.module.get_progress_bar_dict()))
                next_tick = monotonic() + period_s

        # A hook has ended the epoch inside a window, or a resumed run has fewer batches left than it was saved with.
        self._is_exhausted = is_exhausted
        if is_exhausted and optimization.finish_window():
            self._count_step()
            if view.num_windows % log_every == 0:
                yield from self._report_step()
        yield self._pause(is_epoch_finished=is_exhausted or view.num_batches_done >= num_batches)

    def run_detecting_anomaly(self, command: Train) -> Iterator[Report]:
        """`run`; a backward pass that makes nan is an error which shows the forward pass that it belongs to."""
        with torch.autograd.set_detect_anomaly(True):
            yield from self.run(command)

    def look_ahead(self, command: LookAhead) -> Iterator[Report]:
        """Whether the epoch is at its end. Collective."""
        is_over = self._view.num_batches_done >= self.num_batches_in_epoch
        if not is_over and self._peekable is not None:
            # A resumed run fetches the batch again, with these random numbers.
            random_state = format.random_state()
            is_over = not self._peekable.has_next(num_done=self._view.num_batches_done)
            format.set_random_state(random_state)
        yield Paused(progress=self._view.progress, is_epoch_finished=is_over)

    def end_epoch(self, command: EndEpoch) -> Iterator[Report]:
        """The epoch's last hooks and its metrics; its schedulers, where it is complete.

        Where the run ends inside the epoch, checkpoints have what a resumed run needs to do the rest of it: the sums
        and random numbers of before the hooks, while the hooks and the loggers get the values so far.
        """
        session, view = self._session, self._view
        random_state = None if command.is_complete else format.random_state()
        view.is_epoch_cut_short = not command.is_complete
        if not command.is_complete:
            self._cut_sums = self._sums()
        self.metrics.is_training_batch, self.metrics.batch = False, None
        if self._kept is not None:
            self._kept.call_hook()
        with self.metrics.replacing():
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
            self._set_length(self.num_batches)
        if random_state is not None:
            format.set_random_state(random_state)
        session.strategy.sync_buffers(session.module)
        yield EpochEnded(progress=view.progress, metrics=metrics, stop_reason=self._stop_reason())

    def end(self) -> None:
        """After the last epoch."""
        self._session.module.redirect_log(None)
        if self._has_started:
            self._session.hooks.call("on_train_end")

    def forward_epoch(self) -> None:
        """Run the training step over an epoch's batches for what its forward passes keep, such as the statistics of
        batch norms over all ranks; nothing is trained or logged. Collective."""
        run_forward(self._session, self._data, metrics=self.metrics, epoch=self._view.current_epoch + 1)

    def state_of_rank(self) -> dict[str, Any]:
        """What only this rank has of the position: sums of the unfinished epoch, the samplers' generators."""
        ahead = None if self._peekable is None else self._peekable.state_before
        return {
            **(self._sums() if self._cut_sums is None else self._cut_sums),
            "optimization": self._optimization.state_dict(),
            "reduced": self._view.metrics_state(),
            # A loader with a state of its own may stand at the start of the next epoch then.
            "is_exhausted": self._is_exhausted,
            "data": self._data.state_dict(num_done=self._view.num_batches_done) if ahead is None else ahead,
            "is_finding_unused": self._session.strategy.is_finding_unused,
        }

    def load_state_of_rank(self, state: dict[str, Any]) -> None:
        module = self._session.module
        self.metrics.load_state_dict(state["metrics"], module)
        torchmetrics_adapter.load_states(module, state.get("objects", {}))
        if self._kept is not None:
            self._kept.load_state_dict(state.get("outputs", []))
        self._optimization.load_state_dict(state.get("optimization", {}))
        self._view.load_metrics_state(state.get("reduced", {}))
        self._load_data_state(state)

    def load_states_of_others(self, states: Sequence[dict[str, Any]]) -> None:
        """Of another number of ranks: what they had added up is shared out."""
        context, module = self._session.context, self._session.module
        own = states[context.rank :: context.world_size]
        left_out = torchmetrics_adapter.load_merged(module, [state.get("objects", {}) for state in own])
        if left_out and context.rank == 0:
            warnings.warn(
                f"of {', '.join(left_out)} the states of {len(states)} workers cannot be merged: in the epoch under "
                "way some of the samples before the checkpoint do not count",
                stacklevel=2,
            )
        self.metrics.load_state_dict(sum_states([state["metrics"] for state in own]), module)
        if self._kept is not None:
            self._kept.load_state_dict(join_outputs([state.get("outputs", []) for state in own]))
        self._optimization.load_state_dict(average_saved_gradients([state.get("optimization", {}) for state in states]))
        self._view.load_metrics_state(states[0].get("reduced", {}))
        # How far the data was dealt out, and what the samplers' own generators stood at, is alike on all ranks.
        self._load_data_state(states[0])

    # Helpers, in the order in which they are called

    def _sums(self) -> dict[str, Any]:
        """What the unfinished epoch has come to on this rank, in plain values and copies."""
        module = self._session.module
        return {
            "metrics": self.metrics.state_dict(module),
            "objects": torchmetrics_adapter.states_in(module),
            "outputs": [] if self._kept is None else self._kept.state_dict(),
        }

    def _begin(self) -> Feed | TimedFeed | MovedFeed | PeekableFeed:
        """The start of the training and of the epoch, where they are due; the epoch's batches."""
        view, hooks = self._view, self._session.hooks
        view.metrics = self.metrics
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
            # After the hook, which may have exchanged some.
            self._step_schedules = [schedule for schedule in self._schedules if schedule.interval == "step"]
            self._session.uneven.start()
            self._optimization.start_epoch(window=self._session.plan.optimization.window_in(view.current_epoch))
            is_over, skip = self._is_exhausted, view.num_batches_done  # of a run that was interrupted at its last batch
            batches = Feed(iter(())) if is_over else self._data.epoch(view.current_epoch, skip=skip)
            if not is_over:
                check_epoch(
                    self._session.collectives,
                    name="training",
                    order=self._data.order_fingerprint(),
                    num_batches=self.num_batches_in_epoch,
                )
            profiler = self._session.profiler
            feed = batches if profiler is None else TimedFeed(batches, profiler, NEXT_BATCH["fit"])
            mover = self._session.mover
            self._feed = feed if mover is None else MovedFeed(feed, mover)
            if not self._data.has_exact_length:
                self._feed = self._peekable = PeekableFeed(
                    self._feed, state_of_source=self._data.state_dict if self._data.has_own_state else None
                )
            self._session.restore_random_state()
        self.metrics.is_training_batch = True
        return self._feed

    def _load_data_state(self, state: dict[str, Any]) -> None:
        """After the view has moved to where the state was taken."""
        if state.get("is_finding_unused", False):
            # From the first step on, as in the run that goes on without an end.
            self._session.strategy.find_unused()
        self._data.load_state_dict(state["data"])
        self._is_exhausted = state.get("is_exhausted", False)
        progress = self._view.progress
        if progress.global_step > 0:
            for optimizer in self._view.optimizers:
                # An epoch may have nothing left but its schedulers' steps, which torch would take for too early.
                mark_stepped(optimizer)
        if progress.is_inside_epoch:
            self._set_length(self._length_of_rest(progress.epoch, progress.batch))

    def _set_length(self, num_batches: float) -> None:
        self.num_batches_in_epoch = self._view.num_training_batches = num_batches

    def _length_of_rest(self, epoch: int, num_done: int) -> float:
        """Batches of an epoch whose first `num_done` were perhaps not of this size, or of other workers."""
        limits, usual = self._session.plan.limits, self._data.num_batches
        num_left = self._data.num_left(epoch, num_done)
        limit = limits.overfit_batches or limits.train_batches
        if math.isinf(usual) or isinstance(limit, int):
            return apply_limit(num_done + num_left, limit)
        # A fraction's end in these batches, less what they would have been up to here.
        return num_done + max(0, apply_limit(usual, limit) - (usual - num_left))

    def _count_step(self) -> None:
        """After every step, or window of batches at whose end there was to be one."""
        view = self._view
        view.num_windows += 1
        self._session.arm_stop.num_done += 1
        if self._step_schedules:
            self._step_schedulers(self._step_schedules, view.num_windows)

    def _report_step(self) -> Iterator[Report]:
        view = self._view
        metrics, self._is_stop_agreed = self.metrics.read_step(stop_wish=view.should_stop)
        if self._is_stop_agreed:
            view.should_stop = True
        view.receive(metrics)
        if metrics:
            yield Stepped(progress=view.progress, metrics=metrics)

    def _pause(self, *, is_epoch_finished: bool) -> Paused:
        view = self._view
        metrics, self._is_stop_agreed = self.metrics.read_step(stop_wish=view.should_stop)
        view.receive(metrics)
        self._session.strategy.sync_buffers(self._session.module)
        return Paused(
            progress=view.progress,
            is_epoch_finished=is_epoch_finished,
            stop_reason=self._stop_reason(),
            metrics=metrics,
        )

    def _stop_reason(self) -> str | None:
        return "trainer.should_stop was set" if self._is_stop_agreed or self._view.should_stop else None

    def _step_schedulers(self, schedules: list[Schedule], count: int) -> None:
        for schedule in schedules:
            if count % schedule.frequency == 0 and (schedule.interval == "epoch" or self._has_turn(schedule)):
                schedule.step(self._view.metric_values() if schedule.reduce_on_plateau else {})

    def _has_turn(self, schedule: Schedule) -> bool:
        return self._optimization.is_active(schedule.opt_idx)


def batches_of_epoch(data: TrainSource, limits: Limits) -> float:
    """What an epoch takes of the data; infinite where it has no length."""
    return apply_limit(data.num_batches, limits.overfit_batches or limits.train_batches)


def apply_limit(num_batches: float, limit: BatchLimit) -> float:
    """Batches after a limit: a float is a fraction of them, an int a count."""
    if isinstance(limit, int):
        return min(num_batches, limit)
    return num_batches if limit == 1.0 or math.isinf(num_batches) else int(num_batches * limit)


def _shown(values: dict[str, Any]) -> dict[str, float | str]:
    """What a user's `get_progress_bar_dict` gives, in values that travel."""
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}

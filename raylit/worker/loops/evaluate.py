"""Evaluation and prediction loops: this rank's share of the validation, test or prediction batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any

from torch import nn

from raylit.callbacks.prediction_writer import BasePredictionWriter
from raylit.checkpoint import format
from raylit.config import BatchLimit
from raylit.core.module import LightningModule
from raylit.core.step_results import EvalResult
from raylit.profilers.base import NEXT_BATCH
from raylit.protocol.messages import Evaluate, Evaluated, Metrics, Predict, Predicted, Report, Ticked, Written
from raylit.protocol.state import Stage
from raylit.worker.collectives import Collectives
from raylit.worker.data.agreement import Description, check_epoch, check_first_batches
from raylit.worker.data.batches import to_cpu
from raylit.worker.data.combined import build_eval_data, combine_loaders
from raylit.worker.data.sources import build_eval_loaders
from raylit.worker.loops.hooks import adapt_to_batch_index, is_overridden, num_positional
from raylit.worker.loops.step_outputs import EpochOutputs, record_evaluation
from raylit.worker.loops.train import apply_limit
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.process.profiling import timed_items
from raylit.worker.session import Session
from raylit.worker.uneven_inputs import PADDING, iterate_uneven_batches

_PREFIXES = {"validate": "validation", "test": "test", "predict": "predict"}
_DATA_NAMES = {"validate": "validation", "test": "test", "predict": "prediction"}


class _ForwardLoop:
    """Loop over evaluation batches, which are shared out so that each sample is evaluated exactly once.

    Batch i of a single-process pass over the loader goes to rank i modulo the world size; i is the batch's
    `global_idx`.
    """

    _is_recording_indices = False
    """The data-set indices of the batches' samples are recorded."""

    def __init__(self, session: Session, *, stage: Stage) -> None:
        self._session = session
        self._stage = stage
        self._is_one_graph = session.accelerator.is_one_graph
        """All ranks evaluate each batch together, whatever its shape, and have the same results."""
        self._collectives = session.collectives
        if self._is_one_graph:
            self._collectives = Collectives(rank=session.context.rank, world_size=1)
        self.data_name = _DATA_NAMES[stage]
        """The data's name in error messages."""
        self.load()

    def load(self) -> None:
        """Build the loop's loaders; loaders that come from hooks are made anew."""
        session, context, plan = self._session, self._session.context, self._session.plan
        loaders = build_eval_loaders(session.job, self._stage)
        attribute = {"validate": "val"}.get(self._stage, self._stage) + "_dataloaders"
        setattr(session.view, attribute, loaders[0] if len(loaders) == 1 else loaders)
        limit: BatchLimit = getattr(plan.limits, {"validate": "val"}.get(self._stage, self._stage) + "_batches")
        if session.stage == "fit" and plan.limits.overfit_batches:
            # As many loaders as before: `validation_step` is written for their number.
            loaders = [combine_loaders(session.view.train_dataloader, plan.combination)] * len(loaders)
            limit = plan.limits.overfit_batches
        self._loaders = [
            build_eval_data(
                loader,
                rank=0 if self._is_one_graph else context.rank,
                world_size=1 if self._is_one_graph else context.world_size,
                seed=plan.seed,
                shard=plan.use_distributed_sampler,
                is_recording=self._is_recording_indices,
                compare=partial(check_first_batches, session.collectives, name=self.data_name),
            )
            for loader in loaders
        ]
        self.num_batches = tuple(apply_limit(loader.num_batches, limit) for loader in self._loaders)

    def descriptions(self) -> list[Description]:
        """Return, for each loader, the properties that must be equal on all ranks."""
        return [loader.description() for loader in self._loaders]

    def _run_batches(self, index: int, metrics: MetricBuffer, num_batches: float) -> Iterator[tuple[int, Any]]:
        """Run the hooks and the step on each batch of a loader; yield its `global_idx` and the step's output."""
        session = self._session
        step = self._read_step()
        extra = (index,) if len(self._loaders) > 1 else ()
        num_arguments = num_positional(step)
        step_extra = extra if num_arguments >= 3 else ()
        if 3 <= num_arguments < math.inf:
            step_extra = (index,)
        step = session.measure_call(f"{_PREFIXES[self._stage]}_step", step)
        on_start = session.hooks.list_calls(f"on_{_PREFIXES[self._stage]}_batch_start")
        on_end = session.hooks.list_calls(f"on_{_PREFIXES[self._stage]}_batch_end")
        self._num_done, self._next_tick = 0, monotonic()
        batches = self._open_batches(index)
        first_uneven = self._loaders[index].first_uneven
        is_first_uneven_known = first_uneven > 0
        if session.strategy.is_evaluation_collective and not self._is_one_graph:
            batches = iterate_uneven_batches(batches, num_batches=num_batches, collectives=session.collectives)
            num_batches = first_uneven = math.inf
        stop_barrier, uneven = session.stop_barrier, session.uneven
        finish_batch = session.finish_evaluation_batch
        uneven.start()
        run_uneven = partial(self._run_uneven, on_start, step, on_end, extra, step_extra)
        while self._num_done < num_batches and (
            stop_barrier.num_done < stop_barrier.limit or stop_barrier.may_continue()
        ):
            try:
                global_idx, batch = next(batches)
            except StopIteration:
                break
            metrics.batch, metrics.global_batch_idx = batch, global_idx
            if global_idx == PADDING:
                self._run_padding(step, batch, metrics, step_extra)
                continue
            if self._num_done >= first_uneven:
                output = run_uneven(batch, self._num_done)
                if not is_first_uneven_known and not uneven.has_collectives:
                    first_uneven = math.inf
            else:
                for hook in on_start:
                    hook(batch, self._num_done, *extra)
                with session.step_context():
                    output = step(batch, self._num_done, *step_extra)
                for hook in on_end:
                    hook(output, batch, self._num_done, *extra)
            if finish_batch is not None:
                finish_batch()
            self._num_done += 1
            stop_barrier.num_done += 1
            yield global_idx, output
        # Other ranks may have batches left whose steps run collectives: run them without a batch.
        num_steps = self._num_done
        while first_uneven <= num_steps < (num_batches if is_first_uneven_known else math.inf) and (
            stop_barrier.num_done < stop_barrier.limit or stop_barrier.may_continue()
        ):
            metrics.batch, metrics.global_batch_idx = None, None
            run_uneven(None, num_steps)
            if uneven.num_owners == 0 or not (is_first_uneven_known or uneven.has_collectives):
                return
            num_steps += 1
            stop_barrier.num_done += 1

    def _run_uneven(
        self,
        on_start: Sequence[Callable[..., Any]],
        step: Callable[..., Any],
        on_end: Sequence[Callable[..., Any]],
        extra: tuple[int, ...],
        step_extra: tuple[int, ...],
        batch: Any,
        number: int,
    ) -> Any:
        """Run hooks and step on a batch, or without one, where not all ranks have a batch.

        A rank without a batch runs as much of them as the collectives of the other ranks require.
        """
        uneven = self._session.uneven
        arguments = None if batch is None else (batch, number)

        def run_step(*args: Any) -> Any:
            with self._session.step_context():
                return step(*args, *step_extra)

        for hook in on_start:
            start = partial(_with_extra, hook, extra)
            uneven.run(start, arguments, run_padding=start)
        output = uneven.run(run_step, arguments, run_padding=run_step)
        for hook in on_end:
            end = partial(_with_extra, hook, extra)
            uneven.run(end, None if arguments is None else (output, *arguments), run_padding=end)
        return output

    def _run_padding(
        self, step: Callable[..., Any], batch: Any, metrics: MetricBuffer, step_extra: tuple[int, ...]
    ) -> None:
        """Run the step on a padding batch for the collectives of other ranks; its output and metrics are discarded."""
        metrics.is_suspended = True
        try:
            with torchmetrics_adapter.preserve_state(self._session.module), self._session.step_context():
                step(batch, self._num_done, *step_extra)
        finally:
            metrics.is_suspended = False
        self._session.stop_barrier.num_done += 1

    def _open_batches(self, index: int) -> Iterator[tuple[int, Any]]:
        loader, mover = self._loaders[index], self._session.eval_mover
        batches = iter(loader)
        if loader.has_own_order:
            check_epoch(self._session.collectives, order=loader.order_fingerprint(), name=self.data_name)
        if self._session.profiler is not None:
            batches = timed_items(batches, self._session.profiler, NEXT_BATCH[self._stage])
        if mover is None:
            return batches
        return mover.move_batches(batches, dataloader_idx=index, can_prefetch=loader.can_prefetch)

    def _read_step(self) -> Callable[..., Any]:
        step = getattr(self._session.module, f"{_PREFIXES[self._stage]}_step")
        return adapt_to_batch_index(step)

    def _count_batches(self, index: int, is_sanity_check: bool) -> float:
        limit = self._session.plan.limits.sanity_val_batches
        return min(self.num_batches[index], limit) if is_sanity_check and limit >= 0 else self.num_batches[index]

    def _report_tick(self, index: int) -> Ticked | None:
        now = monotonic()
        if self._session.context.rank > 0 or now < self._next_tick:
            return None
        self._next_tick = now + self._session.plan.reporting.refresh_period_s
        return Ticked(batch=self._num_done, dataloader_idx=index)

    def _call_hooks(self, suffix: str) -> None:
        self._session.hooks.call(f"on_{_PREFIXES[self._stage]}_{suffix}")

    @contextmanager
    def _enter_stage(self, metrics: MetricBuffer, *, is_sanity_check: bool = False) -> Iterator[None]:
        """Set the view's stage and the metric buffer of view and module for the time of this loop.

        A sanity check restores the random numbers afterwards, so that the training after it is not affected.
        """
        view, module = self._session.view, self._session.module
        previous = view.stage, view.metrics
        accelerator = self._session.accelerator
        random_state = format.random_state(accelerator) if is_sanity_check else None
        view.stage, view.metrics = self._stage, metrics
        log_before = module.redirect_log(metrics)
        view.sanity_checking = is_sanity_check
        try:
            if is_sanity_check:
                self._session.hooks.call("on_sanity_check_start")
            yield
            if is_sanity_check:
                self._session.hooks.call("on_sanity_check_end")
        finally:
            view.stage, view.metrics = previous
            module.redirect_log(log_before)
            view.sanity_checking = False
            if random_state is not None:
                format.set_random_state(random_state, accelerator)

    @contextmanager
    def _eval_mode(self) -> Iterator[None]:
        """Put the module in eval mode without gradients; restore the mode of each submodule afterwards."""
        module, prefix = self._session.module, _PREFIXES[self._stage]
        modes: list[tuple[nn.Module, bool]] = [(child, child.training) for child in module.modules()]
        getattr(module, f"on_{prefix}_model_eval")()
        try:
            with self._session.strategy.evaluation_context(is_inference_mode=self._session.plan.inference_mode):
                yield
        finally:
            if is_overridden(f"on_{prefix}_model_train", module, LightningModule):
                getattr(module, f"on_{prefix}_model_train")()
            else:
                for child, is_training in modes:
                    child.training = is_training


def _with_extra(hook: Callable[..., Any], extra: tuple[int, ...], *args: Any) -> Any:
    return hook(*args, *extra)


class EvalLoop(_ForwardLoop):
    """Validation or test loop: metrics over every sample of every rank."""

    def __init__(self, session: Session, *, stage: Stage, training_metrics: MetricBuffer | None = None) -> None:
        super().__init__(session, stage=stage)
        self._training_metrics = training_metrics
        self._suspended_states = torchmetrics_adapter.SuspendedStates(session.module, self._collectives)
        self._epoch_outputs: EpochOutputs | None = None
        self._file_rows: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}

    def run(self, command: Evaluate) -> Iterator[Report]:
        """Run the whole loop with its hooks and reduce its metrics over the ranks. Collective."""
        session, view = self._session, self._session.view
        compiled_before_s = session.compilation_s
        metrics = MetricBuffer(self._collectives, is_evaluation=True)
        self._epoch_outputs = EpochOutputs.from_hook(
            session,
            hook=f"{_PREFIXES[self._stage]}_epoch_end",
            metrics=metrics,
            num_lists=max(1, len(self._loaders)),
            collectives=self._collectives,
        )
        self._file_rows = {}
        with (
            self._enter_stage(metrics, is_sanity_check=command.is_sanity_check),
            self._eval_mode(),
            self._discard_states_on_error(metrics),
        ):
            self._call_hooks("start")
            self._call_hooks("epoch_start")
            self._suspended_states.suspend([] if self._training_metrics is None else self._training_metrics.objects)
            for index in range(len(self._loaders)):
                metrics.dataloader_idx = index if len(self._loaders) > 1 else None
                yield from self._run_loader(index, metrics, self._count_batches(index, command.is_sanity_check))
                if len(self._loaders) > 1:
                    metrics.end_loader(index)
            metrics.dataloader_idx, metrics.batch = None, None
            if len(self._loaders) > 1:
                metrics.end_loaders()
            self._suspended_states.restore_unused()
            if self._epoch_outputs is not None:
                self._epoch_outputs.call_hook()
            with metrics.override_logged():
                self._call_hooks("epoch_end")
            reduced, loaders = metrics.read_epoch()
            self._suspended_states.resume()
            view.receive({} if command.is_sanity_check else reduced)
            if self._training_metrics is not None and not command.is_sanity_check:
                self._training_metrics.suppress(reduced)
            session.module.redirect_log(None)
            self._call_hooks("end")
            self._suspended_states.record_counts()
        # Every rank has reached the metrics' collectives, so a stop barrier that ended any rank early is on here too.
        if session.stop_barrier.is_on:
            yield Evaluated(stage=self._stage, metrics={}, is_broken_off=True)
            return
        if session.stage == "fit" and not command.is_sanity_check:
            view.validated_batch = view.num_batches_done
        if self._file_rows and not (self._is_one_graph and session.context.rank > 0):
            yield Written(files={filename: tuple(rows) for filename, rows in self._file_rows.items()})
        per_loader: tuple[dict[str, float], ...] = tuple({} for _ in self._loaders)
        for name, metric in reduced.items():
            if not metric.is_alias:
                per_loader[loaders[name]][name] = metric.value
        yield Evaluated(
            stage=self._stage,
            metrics={} if command.is_sanity_check else reduced,
            per_loader=per_loader,
            stop_reason="trainer.should_stop was set" if view.should_stop else None,
            steps=() if command.is_sanity_check else self._number_step_rows(metrics),
            compilation_s=session.compilation_s - compiled_before_s,
        )

    @contextmanager
    def _discard_states_on_error(self, metrics: MetricBuffer) -> Iterator[None]:
        """Discard the evaluation's states of torchmetrics objects if the evaluation fails."""
        try:
            yield
        except BaseException:
            metrics.discard_objects()
            self._suspended_states.restore()
            raise

    def _run_loader(self, index: int, metrics: MetricBuffer, num_batches: float) -> Iterator[Report]:
        for global_idx, output in self._run_batches(index, metrics, num_batches):
            if output is not None:
                self._record_output(global_idx, output, index, metrics)
            metrics.num_global_batches[index] = global_idx + 1
            if (tick := self._report_tick(index)) is not None:
                yield tick

    def _record_output(self, global_idx: int, output: Any, index: int, metrics: MetricBuffer) -> None:
        """Record a step's output: metrics, outputs for the hook at the epoch's end, rows for files."""
        step = f"{_PREFIXES[self._stage]}_step"
        record_evaluation(output, metrics, step=step, has_hook=self._epoch_outputs is not None)
        if self._epoch_outputs is not None:
            self._epoch_outputs.add(global_idx, output, index=index)
        if self._stage == "test" and isinstance(output, EvalResult):
            for filename, columns in output.columns.items():
                self._file_rows.setdefault(filename, []).append((index, global_idx, to_cpu(columns)))

    def _number_step_rows(self, metrics: MetricBuffer) -> tuple[tuple[int, Metrics], ...]:
        """Return each batch's metrics with its number among all batches of its loader in this run."""
        num_before = self._session.view.num_evaluated
        numbered_rows = tuple((num_before[index] + global_idx, row) for index, global_idx, row in metrics.step_rows)
        for index, num_batches in metrics.num_global_batches.items():
            num_before[index] += num_batches
        return numbered_rows


class PredictLoop(_ForwardLoop):
    """Prediction loop: collects the outputs of `predict_step` with the `global_idx` of their batches."""

    def __init__(self, session: Session) -> None:
        writers = [callback for callback in session.job.callbacks if isinstance(callback, BasePredictionWriter)]
        self._is_recording_indices = bool(writers)
        self._is_collecting = any(writer.interval.on_epoch for writer in writers)
        super().__init__(session, stage="predict")
        self._collected: list[list[tuple[int, Any]]] = []
        self._nums_done: list[int] = []
        session.view.predict_loop = self

    @property
    def predictions(self) -> list[Any]:
        """This rank's predictions so far, on the CPU; one list per loader where there are several."""
        outputs = [[output for _, output in pairs] for pairs in self._collected]
        return outputs[0] if len(outputs) == 1 else outputs

    @property
    def current_batch_indices(self) -> list[Any]:
        """Data-set indices of the samples in the current batch; empty where they are not known."""
        return self._loaders[len(self._collected) - 1].read_indices(self._num_done)

    @property
    def epoch_batch_indices(self) -> list[list[list[Any]]]:
        """Data-set indices of the samples in this rank's batches so far: a list of batches for each loader."""
        return [
            [loader.read_indices(number) for number in range(num_done)]
            for loader, num_done in zip(self._loaders, self._nums_done, strict=False)
        ]

    def run(self, command: Predict) -> Iterator[Report]:
        """Run the whole loop with its hooks; the report has the outputs if the command asks for them."""
        session = self._session
        metrics = MetricBuffer(self._collectives)
        self._collected, self._nums_done = [], []
        is_collecting = command.is_returning or self._is_collecting
        with self._enter_stage(metrics), self._eval_mode():
            session.module.redirect_log(None)
            self._call_hooks("start")
            self._call_hooks("epoch_start")
            for index in range(len(self._loaders)):
                outputs: list[tuple[int, Any]] = []
                self._collected.append(outputs)
                for global_idx, output in self._run_batches(
                    index, metrics, self._count_batches(index, is_sanity_check=False)
                ):
                    if is_collecting:
                        outputs.append((global_idx, to_cpu(output)))
                    if (tick := self._report_tick(index)) is not None:
                        yield tick
                self._nums_done.append(self._num_done)
            self._call_hooks("epoch_end")
            self._call_hooks("end")
        is_reported = command.is_returning and not (self._is_one_graph and session.context.rank > 0)
        collected = self._collected if is_reported else [[] for _ in self._loaders]
        yield Predicted(rank=session.context.rank, outputs=tuple(tuple(outputs) for outputs in collected))
        self._collected = []

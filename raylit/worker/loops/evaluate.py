"""EvalLoop and PredictLoop: this rank's share of the validation, test or prediction batches. Worker."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from time import monotonic
from typing import Any

from torch import nn

from raylit.callbacks.prediction_writer import BasePredictionWriter
from raylit.checkpoint import format
from raylit.config.plan import BatchLimit
from raylit.core.module import LightningModule
from raylit.core.step_results import EvalResult
from raylit.profilers.base import NEXT_BATCH
from raylit.protocol.messages import Evaluate, Evaluated, Metrics, Predict, Predicted, Report, Ticked, Written
from raylit.protocol.state import Stage
from raylit.worker.data.agreement import Description, check_epoch, check_first_batches
from raylit.worker.data.combined import build_eval_data, combine_loaders
from raylit.worker.data.sources import loaders_of
from raylit.worker.data.transfer import to_cpu
from raylit.worker.distributed.uneven_inputs import PADDING, iterate_uneven_batches
from raylit.worker.loops.hooks import adapt_to_batch_index, is_overridden, num_positional
from raylit.worker.loops.step_outputs import EpochOutputs, record_evaluation
from raylit.worker.loops.train import apply_limit
from raylit.worker.metrics import torchmetrics_adapter
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.process.profiling import timed_items
from raylit.worker.session import Session

_PREFIXES = {"validate": "validation", "test": "test", "predict": "predict"}
_DATA_NAMES = {"validate": "validation", "test": "test", "predict": "prediction"}


class _SharedLoop:
    """Batch i goes to rank i modulo the number of ranks, so that every sample is met exactly once."""

    _is_recording = False
    """The indices of the batches' samples are kept."""

    def __init__(self, session: Session, *, stage: Stage) -> None:
        self._session = session
        self._stage = stage
        self.data_name = _DATA_NAMES[stage]
        """How errors call the data."""
        self.load()

    def load(self) -> None:
        """Make the loaders, anew where hooks make them."""
        session, context, plan = self._session, self._session.context, self._session.plan
        loaders = loaders_of(session.job, self._stage)
        attribute = {"validate": "val"}.get(self._stage, self._stage) + "_dataloaders"
        setattr(session.view, attribute, loaders[0] if len(loaders) == 1 else loaders)
        limit: BatchLimit = getattr(plan.limits, {"validate": "val"}.get(self._stage, self._stage) + "_batches")
        if session.stage == "fit" and plan.limits.overfit_batches:
            # For as many validation loaders as there are: the steps are written for their number.
            loaders = [combine_loaders(session.view.train_dataloader, plan.combination)] * len(loaders)
            limit = plan.limits.overfit_batches
        self._loaders = [
            build_eval_data(
                loader,
                rank=context.rank,
                world_size=context.world_size,
                seed=plan.seed,
                shard=plan.use_distributed_sampler,
                is_recording=self._is_recording,
                compare=partial(check_first_batches, session.collectives, name=self.data_name),
            )
            for loader in loaders
        ]
        self.num_batches = tuple(apply_limit(loader.num_batches, limit) for loader in self._loaders)

    def descriptions(self) -> list[Description]:
        """Of each loader what all ranks must have alike."""
        return [loader.description() for loader in self._loaders]

    def _outputs(self, index: int, metrics: MetricBuffer, num_batches: float) -> Iterator[tuple[int, Any]]:
        """Each batch's place in the data set and its step's output."""
        session = self._session
        step = self._step()
        extra = (index,) if len(self._loaders) > 1 else ()
        num_taken = num_positional(step)
        of_step = extra if num_taken >= 3 else ()
        if 3 <= num_taken < math.inf:
            of_step = (index,)
        step = session.timed(f"{_PREFIXES[self._stage]}_step", step)
        on_start = session.hooks.of(f"on_{_PREFIXES[self._stage]}_batch_start")
        on_end = session.hooks.of(f"on_{_PREFIXES[self._stage]}_batch_end")
        self._num_done, self._next_tick = 0, monotonic()
        batches = self._batches(index)
        first_uneven = self._loaders[index].first_uneven
        is_known = first_uneven > 0
        if session.strategy.is_evaluation_collective:
            batches = iterate_uneven_batches(batches, num_batches=num_batches, collectives=session.collectives)
            num_batches = first_uneven = math.inf
        brake, uneven = session.arm_stop, session.uneven
        uneven.start()
        run_uneven = partial(self._run_uneven, on_start, step, on_end, extra, of_step)
        while self._num_done < num_batches and (brake.num_done < brake.limit or brake.may_continue()):
            try:
                place, batch = next(batches)
            except StopIteration:
                break
            metrics.batch, metrics.place = batch, place
            if place == PADDING:
                self._follow(step, batch, metrics, of_step)
                continue
            if self._num_done >= first_uneven:
                output = run_uneven(batch, self._num_done)
                if not is_known and not uneven.has_collectives:
                    first_uneven = math.inf
            else:
                for hook in on_start:
                    hook(batch, self._num_done, *extra)
                with session.around_step():
                    output = step(batch, self._num_done, *of_step)
                for hook in on_end:
                    hook(output, batch, self._num_done, *extra)
            self._num_done += 1
            brake.num_done += 1
            yield place, output
        # Others may have batches left, and collectives in their steps.
        num_steps = self._num_done
        while first_uneven <= num_steps < (num_batches if is_known else math.inf) and (
            brake.num_done < brake.limit or brake.may_continue()
        ):
            metrics.batch, metrics.place = None, None
            run_uneven(None, num_steps)
            if uneven.num_owners == 0 or not (is_known or uneven.has_collectives):
                return
            num_steps += 1
            brake.num_done += 1

    def _run_uneven(
        self,
        on_start: Sequence[Callable[..., Any]],
        step: Callable[..., Any],
        on_end: Sequence[Callable[..., Any]],
        extra: tuple[int, ...],
        of_step: tuple[int, ...],
        batch: Any,
        number: int,
    ) -> Any:
        """A batch, or None, where not all ranks have one: each hook and the step, as far as others wait for it."""
        uneven = self._session.uneven
        own = None if batch is None else (batch, number)

        def run_step(*args: Any) -> Any:
            with self._session.around_step():
                return step(*args, *of_step)

        for hook in on_start:
            start = partial(_with_extra, hook, extra)
            uneven.run(start, own, run_padding=start)
        output = uneven.run(run_step, own, run_padding=run_step)
        for hook in on_end:
            end = partial(_with_extra, hook, extra)
            uneven.run(end, None if own is None else (output, *own), run_padding=end)
        return output

    def _follow(self, step: Callable[..., Any], batch: Any, metrics: MetricBuffer, of_step: tuple[int, ...]) -> None:
        """Run the step as others wait for it; it counts for nothing."""
        metrics.is_suspended = True
        try:
            with torchmetrics_adapter.preserve_state(self._session.module), self._session.around_step():
                step(batch, self._num_done, *of_step)
        finally:
            metrics.is_suspended = False
        self._session.arm_stop.num_done += 1

    def _batches(self, index: int) -> Iterator[tuple[int, Any]]:
        loader, mover = self._loaders[index], self._session.mover
        batches = iter(loader)
        if loader.has_own_order:
            check_epoch(self._session.collectives, order=loader.order_fingerprint(), name=self.data_name)
        if self._session.profiler is not None:
            batches = timed_items(batches, self._session.profiler, NEXT_BATCH[self._stage])
        if mover is None:
            return batches
        return mover.over(batches, dataloader_idx=index, may_run_ahead=loader.may_run_ahead)

    def _step(self) -> Callable[..., Any]:
        step = getattr(self._session.module, f"{_PREFIXES[self._stage]}_step")
        return adapt_to_batch_index(step)

    def _batches_of(self, index: int, is_sanity_check: bool) -> float:
        limit = self._session.plan.limits.sanity_val_batches
        return min(self.num_batches[index], limit) if is_sanity_check and limit >= 0 else self.num_batches[index]

    def _tick(self, index: int) -> Ticked | None:
        now = monotonic()
        if self._session.context.rank > 0 or now < self._next_tick:
            return None
        self._next_tick = now + self._session.plan.reporting.refresh_period_s
        return Ticked(batch=self._num_done, dataloader_idx=index)

    def _call(self, suffix: str) -> None:
        self._session.hooks.call(f"on_{_PREFIXES[self._stage]}_{suffix}")

    @contextmanager
    def _as_stage(self, metrics: MetricBuffer, *, is_sanity_check: bool = False) -> Iterator[None]:
        """The view and the module's buffer for the time of this loop; a sanity check leaves no trace in the random
        numbers of the training that follows."""
        view, module = self._session.view, self._session.module
        stage_before, metrics_before = view.stage, view.metrics
        random_state = format.random_state() if is_sanity_check else None
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
            view.stage, view.metrics = stage_before, metrics_before
            module.redirect_log(log_before)
            view.sanity_checking = False
            if random_state is not None:
                format.set_random_state(random_state)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Eval mode without gradients; afterwards every submodule is in the mode it was in."""
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


class EvalLoop(_SharedLoop):
    """Validation or test: metrics over every sample of every rank."""

    def __init__(self, session: Session, *, stage: Stage, training_metrics: MetricBuffer | None = None) -> None:
        super().__init__(session, stage=stage)
        self._training_metrics = training_metrics
        self._set_aside = torchmetrics_adapter.SuspendedStates(session.module, session.collectives)
        self._kept: EpochOutputs | None = None
        self._rows: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}

    def run(self, command: Evaluate) -> Iterator[Report]:
        """The whole loop with its hooks; its metrics reduced over the ranks."""
        session, view = self._session, self._session.view
        metrics = MetricBuffer(session.collectives, is_evaluation=True)
        self._kept = EpochOutputs.of(
            session, hook=f"{_PREFIXES[self._stage]}_epoch_end", metrics=metrics, num_lists=max(1, len(self._loaders))
        )
        self._rows = {}
        with (
            self._as_stage(metrics, is_sanity_check=command.is_sanity_check),
            self._evaluating(),
            self._objects_of_its_own(metrics),
        ):
            self._call("start")
            self._call("epoch_start")
            self._set_aside.begin([] if self._training_metrics is None else self._training_metrics.objects)
            for index in range(len(self._loaders)):
                metrics.dataloader_idx = index if len(self._loaders) > 1 else None
                yield from self._run_loader(index, metrics, self._batches_of(index, command.is_sanity_check))
                if len(self._loaders) > 1:
                    metrics.end_loader(index)
            metrics.dataloader_idx, metrics.batch = None, None
            if len(self._loaders) > 1:
                metrics.end_loaders()
            self._set_aside.give_back_unused()
            if self._kept is not None:
                self._kept.call_hook()
            with metrics.replacing():
                self._call("epoch_end")
            reduced, loaders = metrics.read_epoch()
            self._set_aside.end()
            view.receive({} if command.is_sanity_check else reduced)
            if self._training_metrics is not None and not command.is_sanity_check:
                self._training_metrics.suppress(reduced)
            session.module.redirect_log(None)
            self._call("end")
            self._set_aside.note_counts()
        # Every rank has come to the metrics by now, so a brake that has ended any of them early is on here.
        if session.arm_stop.is_on:
            yield Evaluated(stage=self._stage, metrics={}, is_broken_off=True)
            return
        if session.stage == "fit" and not command.is_sanity_check:
            view.validated_batch = view.num_batches_done
        if self._rows:
            yield Written(files={filename: tuple(rows) for filename, rows in self._rows.items()})
        per_loader: tuple[dict[str, float], ...] = tuple({} for _ in self._loaders)
        for name, metric in reduced.items():
            if not metric.is_alias:
                per_loader[loaders[name]][name] = metric.value
        yield Evaluated(
            stage=self._stage,
            metrics={} if command.is_sanity_check else reduced,
            per_loader=per_loader,
            stop_reason="trainer.should_stop was set" if view.should_stop else None,
            steps=() if command.is_sanity_check else self._numbered(metrics),
        )

    @contextmanager
    def _objects_of_its_own(self, metrics: MetricBuffer) -> Iterator[None]:
        """Of an evaluation that fails, torchmetrics objects keep nothing."""
        try:
            yield
        except BaseException:
            metrics.discard_objects()
            self._set_aside.restore()
            raise

    def _run_loader(self, index: int, metrics: MetricBuffer, num_batches: float) -> Iterator[Report]:
        for place, output in self._outputs(index, metrics, num_batches):
            if output is not None:
                self._take(place, output, index, metrics)
            metrics.num_places[index] = place + 1
            if (tick := self._tick(index)) is not None:
                yield tick

    def _take(self, place: int, output: Any, index: int, metrics: MetricBuffer) -> None:
        """What a step has returned: metrics, something for the hook at the end, rows for a file."""
        step = f"{_PREFIXES[self._stage]}_step"
        record_evaluation(output, metrics, step=step, has_hook=self._kept is not None)
        if self._kept is not None:
            self._kept.keep(place, output, index=index)
        if self._stage == "test" and isinstance(output, EvalResult):
            for filename, columns in output.columns.items():
                self._rows.setdefault(filename, []).append((index, place, to_cpu(columns)))

    def _numbered(self, metrics: MetricBuffer) -> tuple[tuple[int, Metrics], ...]:
        """Each batch's metrics with its number among all that its loader has given in this run."""
        num_before = self._session.view.num_evaluated
        numbered = tuple((num_before[index] + place, row) for index, place, row in metrics.step_rows)
        for index, num_places in metrics.num_places.items():
            num_before[index] += num_places
        return numbered


class PredictLoop(_SharedLoop):
    """Collects what `predict_step` returns, with each batch's place in the data set."""

    def __init__(self, session: Session) -> None:
        writers = [callback for callback in session.job.callbacks if isinstance(callback, BasePredictionWriter)]
        self._is_recording = bool(writers)
        self._is_keeping = any(writer.interval.on_epoch for writer in writers)
        super().__init__(session, stage="predict")
        self._collected: list[list[tuple[int, Any]]] = []
        self._num_of_loaders: list[int] = []
        session.view.predict_loop = self

    @property
    def predictions(self) -> list[Any]:
        """This rank's so far, on the CPU; a list of these for each loader where there are several."""
        outputs = [[output for _, output in pairs] for pairs in self._collected]
        return outputs[0] if len(outputs) == 1 else outputs

    @property
    def current_batch_indices(self) -> list[Any]:
        """The data set's indices of the samples in the batch under way; empty where they are not known."""
        return self._loaders[len(self._collected) - 1].indices_of(self._num_done)

    @property
    def epoch_batch_indices(self) -> list[list[list[Any]]]:
        """For each loader those of the batches that this rank has had."""
        return [
            [loader.indices_of(number) for number in range(num_done)]
            for loader, num_done in zip(self._loaders, self._num_of_loaders, strict=False)
        ]

    def run(self, command: Predict) -> Iterator[Report]:
        session = self._session
        metrics = MetricBuffer(session.collectives)
        self._collected, self._num_of_loaders = [], []
        is_kept = command.is_returning or self._is_keeping
        with self._as_stage(metrics), self._evaluating():
            session.module.redirect_log(None)
            self._call("start")
            self._call("epoch_start")
            for index in range(len(self._loaders)):
                outputs: list[tuple[int, Any]] = []
                self._collected.append(outputs)
                for place, output in self._outputs(index, metrics, self._batches_of(index, is_sanity_check=False)):
                    if is_kept:
                        outputs.append((place, to_cpu(output)))
                    if (tick := self._tick(index)) is not None:
                        yield tick
                self._num_of_loaders.append(self._num_done)
            self._call("epoch_end")
            self._call("end")
        collected = self._collected if command.is_returning else [[] for _ in self._loaders]
        yield Predicted(rank=session.context.rank, outputs=tuple(tuple(outputs) for outputs in collected))
        self._collected = []

"""Outputs of the user's steps: their loss, their metrics, and what the hooks get of them."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from raylit.accelerators.transfer import map_tensors, to_device
from raylit.core.module import LightningModule
from raylit.core.step_results import EvalResult, Result, TrainResult, is_plain
from raylit.errors import ModuleError
from raylit.worker.collectives import Collectives
from raylit.worker.data.batches import to_cpu
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.session import Session

_RESERVED = ("log", "progress_bar", "hiddens")
"""Keys of a returned dict that are not metrics."""


def read_loss(outputs: Any, metrics: MetricBuffer) -> Tensor | None:
    """Return the loss from `training_step`'s output, or None to skip the batch; record metrics that came with it.

    Raises:
        ModuleError: The output has no loss tensor.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if outputs is None:
        return None
    if isinstance(outputs, TrainResult):
        loss = outputs.minimize
        if loss is None:
            raise ModuleError(
                "training_step returned a TrainResult with nothing to minimize: return TrainResult(minimize=loss), or "
                "None to skip the batch"
            )
    elif isinstance(outputs, Mapping) and not isinstance(outputs, Result):
        loss = outputs.get("loss")
    else:
        raise ModuleError(_describe_wrong_type("training_step", outputs))
    if not isinstance(loss, Tensor):
        raise ModuleError(
            "training_step returned a dict without a tensor under 'loss' (its keys: "
            f"{', '.join(map(str, outputs)) or 'none'}): return the loss as a tensor with a gradient, a dict with it "
            "under 'loss', a TrainResult(minimize=loss), or None to skip the batch"
        )
    record_metrics(outputs, metrics)
    return loss


def hiddens_of(outputs: Any) -> Any:
    """Return the hidden state for the next piece of truncated back-propagation."""
    if isinstance(outputs, Result):
        return outputs.hiddens
    return outputs.get("hiddens") if isinstance(outputs, Mapping) else None


def detach_outputs(outputs: Any) -> Any:
    """Return what `on_train_batch_end` and `training_epoch_end` get: Lightning's dict with the detached loss."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach()}
    if outputs is None:
        return None
    if isinstance(outputs, list):
        return [detach_outputs(one) for one in outputs]
    if isinstance(outputs, TrainResult):
        outputs = {**({} if outputs.minimize is None else {"loss": outputs.minimize}), **outputs}
    return map_tensors({name: value for name, value in outputs.items() if name != "hiddens"}, Tensor.detach)


def record_metrics(outputs: Any, metrics: MetricBuffer) -> None:
    """Record the metrics of a dict or result in the buffer that `self.log` fills; tensors and None carry none."""
    if isinstance(outputs, Tensor) or outputs is None:
        return
    if isinstance(outputs, EvalResult) or not isinstance(outputs, Mapping):
        raise ModuleError(_describe_wrong_type("training_step", outputs))
    if isinstance(outputs, Result):
        _record_result(outputs, metrics)
    else:
        _record_dict(outputs, metrics)


def record_evaluation(outputs: Any, metrics: MetricBuffer, *, step: str, has_hook: bool) -> None:
    """Record the metrics of the output of a validation or test `step`.

    The keys of a dict are left to the hook at the epoch's end where the module has one.
    """
    if isinstance(outputs, EvalResult):
        _record_result(outputs, metrics)
    elif isinstance(outputs, Result):
        raise ModuleError(f"{step} returned a TrainResult: return an EvalResult; TrainResult is for training_step")
    elif isinstance(outputs, Mapping) and not has_hook:
        _record_dict(outputs, metrics)


class EpochOutputs:
    """Outputs of an epoch's steps on this rank, for the hook that gets those of all ranks at the epoch's end."""

    def __init__(
        self, session: Session, *, hook: str, metrics: MetricBuffer, collectives: Collectives, num_lists: int = 1
    ) -> None:
        """Create empty lists; the hook gets one list, or with several loaders or optimizers a list of lists."""
        self._session = session
        self._collectives = collectives
        self._hook = hook
        self._metrics = metrics
        self._outputs: list[list[tuple[int, Any]]] = [[] for _ in range(num_lists)]

    @classmethod
    def from_hook(
        cls, session: Session, *, hook: str, metrics: MetricBuffer, collectives: Collectives, num_lists: int = 1
    ) -> "EpochOutputs | None":
        """Return an EpochOutputs, or None where the module does not override the hook."""
        if not is_overridden(hook, session.module, LightningModule):
            return None
        return cls(session, hook=hook, metrics=metrics, collectives=collectives, num_lists=num_lists)

    def add(self, global_idx: int, outputs: Any, *, index: int = 0) -> None:
        """Add a step's outputs unless they are None.

        Args:
            global_idx: Index of the batch in the data set.
            outputs: What the step returned.
            index: Index of the loader or optimizer.
        """
        if isinstance(outputs, Result):
            outputs = {name: value for name, value in outputs.items() if name != "hiddens"}
        if outputs is not None:
            self._outputs[index].append((global_idx, outputs))

    def add_batch(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Add the outputs of a training batch; called as `on_train_batch_end`.

        With several optimizers or truncated back-propagation `outputs` is a list of one output per piece, per
        optimizer, or both.
        """
        if len(self._outputs) == 1:
            self.add(batch_idx, outputs)
            return
        is_truncated = isinstance(outputs[0], list)
        for index in range(len(self._outputs)):
            outputs_of_optimizer = (
                [piece[index] for piece in outputs if piece[index] is not None] if is_truncated else outputs[index]
            )
            self.add(batch_idx, outputs_of_optimizer or None, index=index)

    def add_share(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Call `add_batch` unless this rank has no share of the batch."""
        if batch is not None:
            self.add_batch(outputs, batch, batch_idx)

    def state_dict(self) -> list[list[tuple[int, Any]]]:
        """Return the unfinished epoch's outputs so far, without values that a checkpoint cannot read back."""
        return [
            [(global_idx, to_cpu(output)) for global_idx, output in outputs if is_plain(output)]
            for outputs in self._outputs
        ]

    def load_state_dict(self, state: list[list[tuple[int, Any]]]) -> None:
        if len(state) == len(self._outputs):
            self._outputs = to_device(state, self._session.device)

    def call_hook(self) -> None:
        """Call the hook on every rank with the outputs of all ranks in data-set order. Collective.

        What the hook logs or returns counts as reduced over the ranks already.
        """
        session, outputs_of_rank = self._session, self._outputs
        self._outputs = [[] for _ in outputs_of_rank]
        outputs_of_ranks = [outputs_of_rank]
        if self._collectives.world_size > 1:
            outputs_of_ranks = to_device(self._collectives.gather_objects(to_cpu(outputs_of_rank)), session.device)
        lists = [
            # The sort is stable and by batch alone: ranks that share a batch stay in order.
            [outputs for _, outputs in sorted(chain.from_iterable(parts), key=lambda pair: pair[0])]
            for parts in zip(*outputs_of_ranks, strict=True)
        ]
        hook = session.measure_call(
            f"{type(session.module).__name__}.{self._hook}", getattr(session.module, self._hook)
        )
        with self._metrics.already_reduced():
            _record_epoch_end(hook(lists[0] if len(lists) == 1 else lists), self._metrics, hook=self._hook)


def join_outputs(states: Sequence[list[list[tuple[int, Any]]]]) -> list[list[tuple[int, Any]]]:
    """Join the states of several ranks' EpochOutputs as if they were one rank's."""
    return [[*chain.from_iterable(parts)] for parts in zip(*states, strict=True)]


def _record_epoch_end(outputs: Any, metrics: MetricBuffer, *, hook: str) -> None:
    """Record what the hook at the epoch's end returned."""
    if isinstance(outputs, Result):
        _record_result(outputs, metrics, is_epoch_end=True)
    elif isinstance(outputs, Mapping):
        _record_dict(outputs, metrics)
    elif outputs is not None:
        raise ModuleError(f"{hook} returned a {type(outputs).__name__}: return a dict of metrics, a result, or None")


def _record_result(result: Result, metrics: MetricBuffer, *, is_epoch_end: bool = False) -> None:
    if isinstance(result, TrainResult) and result.is_checkpoint_default:
        metrics.defaults.add("checkpoint_on")
    for name in ("early_stop_on", "checkpoint_on"):
        if (value := getattr(result, name)) is not None:
            metrics.record(
                name,
                value,
                prog_bar=False,
                logger=False,
                on_step=False,
                on_epoch=True,
                piece_fx="mean",
                add_dataloader_idx=False,
            )
    for name, record in result.records.items():
        metrics.record(
            name,
            record.value,
            prog_bar=record.prog_bar,
            logger=record.logger,
            on_step=record.on_step and not is_epoch_end,
            on_epoch=record.on_epoch or is_epoch_end,
            reduce_fx=record.reduce_fx,
            piece_fx=record.tbptt_reduce_fx,
        )


def _record_dict(outputs: Mapping[str, Any], metrics: MetricBuffer) -> None:
    logged = outputs.get("log") or {}
    in_progress_bar = outputs.get("progress_bar") or {}
    values = {name: value for name, value in outputs.items() if name not in _RESERVED and _is_scalar(value)}
    values.update(in_progress_bar)
    values.update(logged)
    for name, value in values.items():
        metrics.record(name, value, prog_bar=name in in_progress_bar, logger=name in logged)


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))


def _describe_wrong_type(step: str, outputs: Any) -> str:
    if isinstance(outputs, EvalResult):
        return f"{step} returned an EvalResult: return a TrainResult(minimize=loss); EvalResult is for evaluation"
    return (
        f"{step} returned a {type(outputs).__name__}: return the loss as a tensor with a gradient, a dict with it "
        "under 'loss', a TrainResult(minimize=loss), or None to skip the batch"
    )

"""What steps return: the loss in it, the metrics it carries, and what hooks get to see of it. Worker."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from raylit.accelerators.transfer import map_tensors, to_device
from raylit.core.module import LightningModule
from raylit.core.step_results import EvalResult, Result, TrainResult, is_plain
from raylit.errors import ModuleError
from raylit.worker.data.transfer import to_cpu
from raylit.worker.loops.hooks import is_overridden
from raylit.worker.metrics.buffer import MetricBuffer
from raylit.worker.session import Session

_RESERVED = ("log", "progress_bar", "hiddens")
"""Keys of a returned dict that are no metrics."""


def loss_of(outputs: Any, metrics: MetricBuffer) -> Tensor | None:
    """The loss that `training_step` has returned, None to skip the batch; metrics that came with it are filed."""
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
        raise ModuleError(_wrong_kind("training_step", outputs))
    if not isinstance(loss, Tensor):
        raise ModuleError(
            "training_step returned a dict without a tensor under 'loss' (its keys: "
            f"{', '.join(map(str, outputs)) or 'none'}): return the loss as a tensor with a gradient, a dict with it "
            "under 'loss', a TrainResult(minimize=loss), or None to skip the batch"
        )
    record_metrics(outputs, metrics)
    return loss


def hiddens_of(outputs: Any) -> Any:
    """What goes into the next piece of truncated back-propagation."""
    if isinstance(outputs, Result):
        return outputs.hiddens
    return outputs.get("hiddens") if isinstance(outputs, Mapping) else None


def detach_outputs(outputs: Any) -> Any:
    """What `on_train_batch_end` and `training_epoch_end` get: Lightning's dict with the detached loss."""
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
    """The metrics of a dict or result into the buffer that `self.log` fills; tensors and None carry none."""
    if isinstance(outputs, Tensor) or outputs is None:
        return
    if isinstance(outputs, EvalResult) or not isinstance(outputs, Mapping):
        raise ModuleError(_wrong_kind("training_step", outputs))
    if isinstance(outputs, Result):
        _file_result(outputs, metrics)
    else:
        _file_dict(outputs, metrics)


def record_evaluation(outputs: Any, metrics: MetricBuffer, *, step: str, has_hook: bool) -> None:
    """The metrics of what `step`, of validation or test, has returned. The keys of a dict are left to the hook at the
    epoch's end where the module has one."""
    if isinstance(outputs, EvalResult):
        _file_result(outputs, metrics)
    elif isinstance(outputs, Result):
        raise ModuleError(f"{step} returned a TrainResult: return an EvalResult; TrainResult is for training_step")
    elif isinstance(outputs, Mapping) and not has_hook:
        _file_dict(outputs, metrics)


class EpochOutputs:
    """What an epoch's steps have returned on this rank, kept for the module's hook that gets those of all ranks."""

    def __init__(self, session: Session, *, hook: str, metrics: MetricBuffer, num_lists: int = 1) -> None:
        """The hook gets a list, or for several loaders or optimizers a list of as many."""
        self._session = session
        self._hook = hook
        self._metrics = metrics
        self._kept: list[list[tuple[int, Any]]] = [[] for _ in range(num_lists)]

    @classmethod
    def of(cls, session: Session, *, hook: str, metrics: MetricBuffer, num_lists: int = 1) -> "EpochOutputs | None":
        """None where the module does not define the hook."""
        if not is_overridden(hook, session.module, LightningModule):
            return None
        return cls(session, hook=hook, metrics=metrics, num_lists=num_lists)

    def keep(self, place: int, outputs: Any, *, index: int = 0) -> None:
        """`place`: the batch's in the data set; `index`: of the loader or optimizer. None is not kept."""
        if isinstance(outputs, Result):
            outputs = {name: value for name, value in outputs.items() if name != "hiddens"}
        if outputs is not None:
            self._kept[index].append((place, outputs))

    def keep_batch(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """As `on_train_batch_end`: one output, a list of pieces' outputs, or either with a list for the optimizers."""
        if len(self._kept) == 1:
            self.keep(batch_idx, outputs)
            return
        is_truncated = isinstance(outputs[0], list)
        for index in range(len(self._kept)):
            own = [piece[index] for piece in outputs if piece[index] is not None] if is_truncated else outputs[index]
            self.keep(batch_idx, own or None, index=index)

    def keep_share(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """`keep_batch`, of a batch that this rank may have no share of."""
        if batch is not None:
            self.keep_batch(outputs, batch, batch_idx)

    def state_dict(self) -> list[list[tuple[int, Any]]]:
        """What an unfinished epoch has returned so far; without what a checkpoint does not read back."""
        return [[(place, to_cpu(one)) for place, one in kept if is_plain(one)] for kept in self._kept]

    def load_state_dict(self, state: list[list[tuple[int, Any]]]) -> None:
        if len(state) == len(self._kept):
            self._kept = to_device(state, self._session.device)

    def call_hook(self) -> None:
        """Call the hook, on every rank with the outputs of all of them in data-set order. Collective.

        What it logs or returns is the value over all ranks already.
        """
        session, kept = self._session, self._kept
        self._kept = [[] for _ in kept]
        ranked = [kept]
        if session.collectives.world_size > 1:
            ranked = to_device(session.collectives.gather_objects(to_cpu(kept)), session.device)
        lists = [
            # Sorted by place alone; ranks stay in order where they share a batch.
            [outputs for _, outputs in sorted(chain.from_iterable(parts), key=lambda placed: placed[0])]
            for parts in zip(*ranked, strict=True)
        ]
        hook = session.timed(f"{type(session.module).__name__}.{self._hook}", getattr(session.module, self._hook))
        with self._metrics.already_reduced():
            _file_end(hook(lists[0] if len(lists) == 1 else lists), self._metrics, hook=self._hook)


def join_outputs(states: Sequence[list[list[tuple[int, Any]]]]) -> list[list[tuple[int, Any]]]:
    """Several ranks' outputs, as EpochOutputs keeps them, as one rank's."""
    return [[*chain.from_iterable(parts)] for parts in zip(*states, strict=True)]


def _file_end(outputs: Any, metrics: MetricBuffer, *, hook: str) -> None:
    if isinstance(outputs, Result):
        _file_result(outputs, metrics, is_epoch_end=True)
    elif isinstance(outputs, Mapping):
        _file_dict(outputs, metrics)
    elif outputs is not None:
        raise ModuleError(f"{hook} returned a {type(outputs).__name__}: return a dict of metrics, a result, or None")


def _file_result(result: Result, metrics: MetricBuffer, *, is_epoch_end: bool = False) -> None:
    if isinstance(result, TrainResult) and result.is_checkpoint_default:
        metrics.defaults.add("checkpoint_on")
    for name in ("early_stop_on", "checkpoint_on"):
        if (value := getattr(result, name)) is not None:
            metrics.file(
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
        metrics.file(
            name,
            record.value,
            prog_bar=record.prog_bar,
            logger=record.logger,
            on_step=record.on_step and not is_epoch_end,
            on_epoch=record.on_epoch or is_epoch_end,
            reduce_fx=record.reduce_fx,
            piece_fx=record.tbptt_reduce_fx,
        )


def _file_dict(outputs: Mapping[str, Any], metrics: MetricBuffer) -> None:
    logged = outputs.get("log") or {}
    shown = outputs.get("progress_bar") or {}
    values = {name: value for name, value in outputs.items() if name not in _RESERVED and _is_scalar(value)}
    values.update(shown)
    values.update(logged)
    for name, value in values.items():
        metrics.file(name, value, prog_bar=name in shown, logger=name in logged)


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))


def _wrong_kind(step: str, outputs: Any) -> str:
    if isinstance(outputs, EvalResult):
        return f"{step} returned an EvalResult: return a TrainResult(minimize=loss); EvalResult is for evaluation"
    return (
        f"{step} returned a {type(outputs).__name__}: return the loss as a tensor with a gradient, a dict with it "
        "under 'loss', a TrainResult(minimize=loss), or None to skip the batch"
    )

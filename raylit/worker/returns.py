"""What steps return: the loss in it, the metrics it carries, and what hooks get to see of it. Worker."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from raylit.errors import ModuleError
from raylit.results import EvalResult, Result, TrainResult
from raylit.worker.metrics import MetricBuffer
from raylit.worker.transfer import map_tensors

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
    file_metrics(outputs, metrics)
    return loss


def hiddens_of(outputs: Any) -> Any:
    """What goes into the next piece of truncated back-propagation."""
    if isinstance(outputs, Result):
        return outputs.hiddens
    return outputs.get("hiddens") if isinstance(outputs, Mapping) else None


def detached(outputs: Any) -> Any:
    """What `on_train_batch_end` and `training_epoch_end` get: Lightning's dict with the detached loss."""
    if isinstance(outputs, Tensor):
        return {"loss": outputs.detach()}
    if outputs is None:
        return None
    if isinstance(outputs, list):
        return [detached(one) for one in outputs]
    if isinstance(outputs, TrainResult):
        values: dict[str, Any] = {} if outputs.minimize is None else {"loss": outputs.minimize}
        outputs = {**values, **{name: record.value for name, record in outputs.records.items()}}
    return map_tensors({name: value for name, value in outputs.items() if name != "hiddens"}, Tensor.detach)


def file_metrics(outputs: Any, metrics: MetricBuffer) -> None:
    """The metrics of a dict or result into the buffer that `self.log` fills; tensors and None carry none."""
    if isinstance(outputs, Tensor) or outputs is None:
        return
    if isinstance(outputs, Result):
        _file_result(outputs, metrics)
    elif isinstance(outputs, Mapping):
        _file_dict(outputs, metrics)
    else:
        raise ModuleError(_wrong_kind("training_step", outputs))


def _file_result(result: Result, metrics: MetricBuffer) -> None:
    for name in ("early_stop_on", "checkpoint_on"):
        if (value := getattr(result, name)) is not None:
            metrics.log(name, value, False, False, False, True, "mean", None, True)
    for name, record in result.records.items():
        metrics.log(
            name,
            record.value,
            record.prog_bar,
            record.logger,
            record.on_step,
            record.on_epoch,
            record.reduce_fx,
            None,
            True,
        )


def _file_dict(outputs: Mapping[str, Any], metrics: MetricBuffer) -> None:
    logged = outputs.get("log") or {}
    shown = outputs.get("progress_bar") or {}
    values = {name: value for name, value in outputs.items() if name not in _RESERVED and _is_scalar(value)}
    values.update(shown)
    values.update(logged)
    for name, value in values.items():
        metrics.log(name, value, name in shown, name in logged, None, None, "mean", None, True)


def _is_scalar(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))


def _wrong_kind(step: str, outputs: Any) -> str:
    kind = type(outputs).__name__
    if isinstance(outputs, EvalResult):
        return f"{step} returned an EvalResult: return a TrainResult(minimize=loss); EvalResult is for evaluation"
    return (
        f"{step} returned a {kind}: return the loss as a tensor with a gradient, a dict with it under 'loss', a "
        "TrainResult(minimize=loss), or None to skip the batch"
    )


class EpochOutputs:
    """The outputs of a training epoch's batches, kept for `training_epoch_end`."""

    def __init__(self, metrics: MetricBuffer) -> None:
        self._metrics = metrics
        self._kept: list[tuple[int, Any]] = []

    def keep(self, batch_idx: int, outputs: Any) -> None:
        """`outputs`: as `detached` gives them."""
        if outputs is not None:
            self._kept.append((batch_idx, outputs))

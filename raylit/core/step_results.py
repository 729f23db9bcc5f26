"""TrainResult and EvalResult: results that a step may return instead of a loss or a dict. Workers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raylit.errors import ModuleError

_RESERVED = ("minimize", "early_stop_on", "checkpoint_on", "hiddens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A logged value with the options of its `log` call."""

    value: Any
    prog_bar: bool
    logger: bool
    on_step: bool
    on_epoch: bool
    reduce_fx: Any
    tbptt_reduce_fx: Any


class Result(Mapping[str, Any]):
    """Base of both results; reads like a dict of the values: `result["val_loss"]`."""

    _on_step: bool
    _on_epoch: bool

    def __init__(self, *, early_stop_on: Tensor | None, checkpoint_on: Tensor | None, hiddens: Any) -> None:
        for name, value in (("early_stop_on", early_stop_on), ("checkpoint_on", checkpoint_on)):
            self._check_scalar(name, value)
        self.early_stop_on = early_stop_on
        self.checkpoint_on = checkpoint_on
        self.hiddens = hiddens
        self.records: dict[str, Record] = {}

    def log_dict(self, dictionary: Mapping[str, Any], **kwargs: Any) -> None:
        """Log each entry; the keywords are those of `log`."""
        for name, value in dictionary.items():
            self.log(name, value, **kwargs)

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    def _record(self, name: str, value: Any, *, enable_graph: bool, sync_dist_op: Any, **arguments: Any) -> None:
        kind = type(self).__name__
        if not isinstance(name, str) or name in _RESERVED:
            raise ModuleError(
                f"{kind}.log({name!r}, ...): the name must be a string, and {', '.join(_RESERVED)} are arguments of "
                f"{kind}(...)"
            )
        if sync_dist_op not in ("mean", "avg", "sum", "min", "max") and not callable(sync_dist_op):
            raise ModuleError(
                f"{kind}.log({name!r}, sync_dist_op={sync_dist_op!r}): must be 'mean', 'sum', 'min' or 'max'; what "
                "reduces over batches and workers alike is reduce_fx"
            )
        if isinstance(value, Tensor) and not enable_graph:
            value = value.detach()
        self.records[name] = Record(value=value, **arguments)

    def _check_scalar(self, name: str, value: Any) -> None:
        if value is not None and not (isinstance(value, Tensor) and value.numel() == 1):
            description = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ModuleError(f"{type(self).__name__}({name}=...) got {description}: must be a tensor with one element")

    def __getitem__(self, name: str) -> Any:
        if name in self.records:
            return self.records[name].value
        value = getattr(self, name, None) if name in _RESERVED else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in _RESERVED if getattr(self, name, None) is not None)
        yield from self.records

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)!r})"


class TrainResult(Result):
    """Result of `training_step`: the loss to minimize, and values to log.

    Args:
        minimize: The loss, a tensor with one element and a gradient.
        early_stop_on: Value that EarlyStopping follows if it monitors nothing else, one element.
        checkpoint_on: Value that ModelCheckpoint follows if it monitors nothing else, one element; None: the loss.
        hiddens: Hidden state for the next piece of truncated back-propagation.

    Raises:
        ModuleError: if a value has more than one element, or the loss has no gradient.
    """

    def __init__(
        self,
        minimize: Tensor | None = None,
        early_stop_on: Tensor | None = None,
        checkpoint_on: Tensor | None = None,
        hiddens: Any = None,
    ) -> None:
        self._check_scalar("minimize", minimize)
        if minimize is not None and not minimize.requires_grad:
            raise ModuleError(
                "TrainResult(minimize=...) got a tensor without a gradient: pass the loss as it was computed, without "
                "detach() or item(); in validation_step and test_step, where there are no gradients, return an "
                "EvalResult"
            )
        self.minimize = minimize
        self.is_checkpoint_default = checkpoint_on is None and minimize is not None
        if checkpoint_on is None and minimize is not None:
            checkpoint_on = minimize.detach()
        super().__init__(early_stop_on=early_stop_on, checkpoint_on=checkpoint_on, hiddens=hiddens)

    def log(  # type: ignore[override]
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool = True,
        on_epoch: bool = False,
        reduce_fx: Any = torch.mean,
        tbptt_reduce_fx: Any = torch.mean,
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_op: Any = "mean",
        sync_dist_group: Any = None,
    ) -> None:
        """Log a value, as `self.log` of the module does.

        It is always reduced over the workers, whatever `sync_dist` says. The defaults log each step and not the epoch.

        Args:
            name: Name of the metric.
            value: Scalar.
            prog_bar: Show it in the progress bar.
            logger: Send it to the loggers.
            on_step: Log each logging step's value.
            on_epoch: Log the epoch's reduced value.
            reduce_fx: Reduction over batches and workers.
            tbptt_reduce_fx: Reduction over the pieces of a batch in truncated back-propagation.
            enable_graph: Keep the value's graph.
            sync_dist: Accepted for compatibility, without effect.
            sync_dist_op: Accepted for compatibility; must be a known reduction.
            sync_dist_group: Accepted for compatibility, without effect.

        Raises:
            ModuleError: if the name is reserved, or `sync_dist_op` unknown.
        """
        self._record(
            name,
            value,
            prog_bar=prog_bar,
            logger=logger,
            on_step=on_step,
            on_epoch=on_epoch,
            reduce_fx=reduce_fx,
            tbptt_reduce_fx=tbptt_reduce_fx,
            enable_graph=enable_graph,
            sync_dist_op=sync_dist_op,
        )


class EvalResult(Result):
    """Result of `validation_step` and `test_step`: values to log, and rows for a file of predictions.

    Args:
        early_stop_on: Value that EarlyStopping follows if it monitors nothing else, one element.
        checkpoint_on: Value that ModelCheckpoint follows if it monitors nothing else, one element.
        hiddens: Accepted for compatibility.

    Raises:
        ModuleError: if a value has more than one element.
    """

    def __init__(
        self,
        early_stop_on: Tensor | None = None,
        checkpoint_on: Tensor | None = None,
        hiddens: Any = None,
    ) -> None:
        super().__init__(early_stop_on=early_stop_on, checkpoint_on=checkpoint_on, hiddens=hiddens)
        self.columns: dict[str, dict[str, Any]] = {}
        """For each file its columns by name, each with a row per sample of the batch."""

    def log(  # type: ignore[override]
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool = False,
        on_epoch: bool = True,
        reduce_fx: Any = torch.mean,
        tbptt_reduce_fx: Any = torch.mean,
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_op: Any = "mean",
        sync_dist_group: Any = None,
    ) -> None:
        """Log a value, with the arguments of `TrainResult.log`; by default the epoch's and not each step's."""
        self._record(
            name,
            value,
            prog_bar=prog_bar,
            logger=logger,
            on_step=on_step,
            on_epoch=on_epoch,
            reduce_fx=reduce_fx,
            tbptt_reduce_fx=tbptt_reduce_fx,
            enable_graph=enable_graph,
            sync_dist_op=sync_dist_op,
        )

    def write(self, name: str, values: Any, filename: str = "predictions.pt") -> None:
        """Add a column to the rows that the end of the test loop writes to a file.

        The file is a list of dicts in data-set order, from all workers; `torch.load` reads it. The driver writes it.

        Args:
            name: Name of the column.
            values: Tensor or list with one value per sample of the batch.
            filename: Path relative to the driver's directory, or an fsspec URL.

        Raises:
            ModuleError: if the values are not one plain value per sample.
        """
        values = self._column(name, values)
        columns = self.columns.setdefault(filename, {})
        for other, others in columns.items():
            if len(others) != len(values):
                raise ModuleError(
                    f"EvalResult.write({name!r}, ...) got {len(values)} values, but {other!r} has {len(others)} for "
                    f"the same batch of {filename}"
                )
        columns[name] = values

    def _column(self, name: str, values: Any) -> Any:
        if hasattr(values, "__array__") and not isinstance(values, Tensor):
            values = torch.as_tensor(values)
        if isinstance(values, Tensor) and values.ndim > 0:
            return values.detach()
        if isinstance(values, Tensor) or not isinstance(values, Sequence) or isinstance(values, str):
            raise ModuleError(
                f"EvalResult.write({name!r}, ...) got a {type(values).__name__}: pass a tensor or a list with one "
                "value per sample of the batch"
            )
        # NumPy scalars would be pickled, which weights_only refuses to load.
        rows = [
            value.item() if hasattr(value, "__array__") and not isinstance(value, Tensor) else value for value in values
        ]
        for value in rows:
            if not is_plain(value):
                raise ModuleError(
                    f"EvalResult.write({name!r}, ...) got a {type(value).__name__} as a row: pass tensors, numbers, "
                    "strings, or lists and dicts of them, which torch.load reads without unpickling code"
                )
        return rows

    def write_dict(self, predictions_dict: Mapping[str, Any], filename: str = "predictions.pt") -> None:
        """Add a column for each entry, as `write` does."""
        for name, values in predictions_dict.items():
            self.write(name, values, filename)


def is_plain(value: Any) -> bool:
    """Return whether `torch.load` reads the value with weights_only.

    These are tensors, numbers, strings, and lists, tuples and dicts of them.
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    return value is None or type(value) in (Tensor, str, bool, int, float)

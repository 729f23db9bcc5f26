"""Sweep on TensorBoard's HParams page: the columns, and a session for each trial. Driver and trial processes."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from ray.tune.search.sample import Categorical, Float, Integer
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary

from raylit.callbacks.base import DriverCallback, Run
from raylit.core.hparams import flatten
from raylit.loggers import TensorBoardLogger
from raylit.tune.records import Mode, is_better, is_number

Plain = bool | int | float | str


def write_experiment(directory: str, space: Mapping[str, Any], *, metric: str) -> None:
    """Write the page's columns for everything below `directory`.

    They are the varying parameters, and the best and the last value of the metric.
    """
    parameters = [
        summary_v2.HParam(name, _describe_domain(values))
        for name, values in _iterate_entries(space)
        if _is_varying(values)
    ]
    metrics = [
        summary_v2.Metric(_name_best(metric), display_name=f"best {metric}"),
        summary_v2.Metric(metric, display_name=metric),
    ]
    writer = SummaryWriter(directory)
    _write_summary(writer, summary_v2.hparams_config_pb(parameters, metrics))
    writer.close()


class HParamsSession(DriverCallback):
    """Driver callback that writes a training's session: start, config, best value and end. In the trial's own run.

    It writes to `logger`.
    """

    def __init__(
        self, config: Mapping[str, Any], *, name: str, logger: TensorBoardLogger, metric: str, mode: Mode
    ) -> None:
        self._config = config
        self._name = name
        self._logger = logger
        self._metric = metric
        self._mode: Mode = mode
        self._best: float | None = None
        self._has_failed = False

    def on_start(self, run: Run) -> None:
        hparams = {name: _plain(value) for name, value in flatten(self._config)}
        self._write(summary_v2.hparams_pb(hparams, trial_id=self._name))

    def on_validation_end(self, run: Run) -> None:
        self._log_best(run)

    def on_train_epoch_end(self, run: Run) -> None:
        self._log_best(run)

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._has_failed = True

    def on_end(self, run: Run) -> None:
        status = api_pb2.STATUS_FAILURE if self._has_failed else api_pb2.STATUS_SUCCESS
        end = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
        summary = Summary()
        about = metadata.create_summary_metadata(data)
        summary.value.add(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        self._write(summary)

    def _log_best(self, run: Run) -> None:
        value = run.state.callback_metrics.get(self._metric)
        if is_number(value) and (self._best is None or is_better(value, self._best, self._mode)):
            self._best = value
            self._logger.experiment.add_scalar(_name_best(self._metric), value, run.state.log_step)

    def _write(self, summary: Any) -> None:
        # A separate event file would hide what the logger's file gets later from a running TensorBoard.
        _write_summary(self._logger.experiment, summary)


def _write_summary(writer: SummaryWriter, summary: Any) -> None:
    # It is None only in a writer that has been closed.
    file_writer: Any = writer.file_writer
    file_writer.add_summary(summary)


def _name_best(metric: str) -> str:
    """Return the tag of a metric's best value."""
    return f"best/{metric}"


def _iterate_entries(space: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested spaces like `flatten`, but a grid search as one entry, with its values."""
    for key, value in space.items():
        name = f"{parent}/{key}" if parent else str(key)
        if isinstance(value, Mapping) and set(value) == {"grid_search"}:
            yield name, list(value["grid_search"])
        elif isinstance(value, Mapping):
            yield from _iterate_entries(value, name)
        else:
            yield name, value


def _is_varying(values: Any) -> bool:
    """Return whether the value is one of Tune's that draws, or a grid."""
    return isinstance(values, list) or hasattr(values, "sample")


def _describe_domain(values: Any) -> Any:
    """Return the domain in TensorBoard's form; None if it has none."""
    if isinstance(values, Integer):
        return summary_v2.IntInterval(int(values.lower), int(values.upper))
    if isinstance(values, Float):
        is_bounded = all(is_number(bound) for bound in (values.lower, values.upper))
        return summary_v2.RealInterval(float(values.lower), float(values.upper)) if is_bounded else None
    options = values.categories if isinstance(values, Categorical) else values
    plain = [_plain(option) for option in options] if isinstance(options, (list, tuple)) else []
    if plain and all(isinstance(option, (int, float)) and not isinstance(option, bool) for option in plain):
        return summary_v2.Discrete([float(option) for option in plain])
    return summary_v2.Discrete(plain) if len({type(option) for option in plain}) == 1 else None


def _plain(value: Any) -> Plain:
    return value if isinstance(value, bool | int | float | str) else str(value)

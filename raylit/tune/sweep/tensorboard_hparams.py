"""A sweep on TensorBoard's HParams page: what varies, and a session for each trial. Driver, and the trials' own."""

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
    """For all that is below `directory`: the columns of the page are what varies and the metric, its best and its
    last."""
    parameters = [summary_v2.HParam(name, _domain(values)) for name, values in _leaves(space) if _is_varying(values)]
    metrics = [
        summary_v2.Metric(_best(metric), display_name=f"best {metric}"),
        summary_v2.Metric(metric, display_name=metric),
    ]
    writer = SummaryWriter(directory)
    _write_summary(writer, summary_v2.hparams_config_pb(parameters, metrics))
    writer.close()


class Session(DriverCallback):
    """A training of a trial, with the config that it has: it starts, has a best value, and ends. In the trial's own
    run, to `logger`."""

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
        self._take(run)

    def on_train_epoch_end(self, run: Run) -> None:
        self._take(run)

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

    def _take(self, run: Run) -> None:
        value = run.state.callback_metrics.get(self._metric)
        if is_number(value) and (self._best is None or is_better(value, self._best, self._mode)):
            self._best = value
            self._logger.experiment.add_scalar(_best(self._metric), value, run.state.log_step)

    def _write(self, summary: Any) -> None:
        # An event file of its own would hide what the logger's gets later from a running TensorBoard.
        _write_summary(self._logger.experiment, summary)


def _write_summary(writer: SummaryWriter, summary: Any) -> None:
    # None only in a writer that has been closed.
    file_writer: Any = writer.file_writer
    file_writer.add_summary(summary)


def _best(metric: str) -> str:
    return f"best/{metric}"


def _leaves(space: Mapping[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """As `flat`, but a grid search is one entry: its values."""
    for key, value in space.items():
        name = f"{parent}/{key}" if parent else str(key)
        if isinstance(value, Mapping) and set(value) == {"grid_search"}:
            yield name, list(value["grid_search"])
        elif isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value


def _is_varying(values: Any) -> bool:
    """Something of Tune's that draws, or a grid."""
    return isinstance(values, list) or hasattr(values, "sample")


def _domain(values: Any) -> Any:
    """None: it can be anything."""
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

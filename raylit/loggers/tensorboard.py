"""TensorBoardLogger: event files that TensorBoard reads, and their removal after a checkpoint. Driver only."""

import os
import struct
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raylit.core.export import eval_mode, find_sample
from raylit.core.hparams import flatten
from raylit.loggers.base import FileLogger, is_repeated, plain
from raylit.storage import file_system, is_url, join, replace_file, write_bytes

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_MARK = "events.out.tfevents"
_LENGTH = struct.Struct("<Q")
_CRC_BYTES = 4

_RETRY_S = 5.0
"""Time after a failure until a new writer is tried, in seconds."""


class TensorBoardLogger(FileLogger):
    """Logger that writes event files to `save_dir/name/version_N[/sub_dir]`.

    Args:
        save_dir: Root directory or fsspec URL; None: the Trainer's.
        name: Directory below `save_dir`.
        version: Number or name of the version; None: the next free number.
        log_graph: Log the model's graph when a fit starts.
        default_hp_metric: Log hyper-parameters that come without a metric with `hp_metric=-1`, because TensorBoard's
            HParams page shows only runs that have a metric.
        prefix: Put before every metric's name, with a hyphen.
        sub_dir: Directory below the version.
        **summary_writer: Passed to torch's SummaryWriter.

    Raises:
        ConfigError: if a name leads out of `save_dir`.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | None = None,
        **summary_writer: Any,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, sub_dir)
        self._has_graph = log_graph
        self._default_hp_metric = default_hp_metric
        self._summary_writer = summary_writer
        self._experiment: SummaryWriter | None = None
        self._is_continued = False
        """The run is resumed, so hyper-parameters have been written before."""
        self._purge_step: int | None = None
        """Passed to the next writer: a running TensorBoard discards the points from this step on."""
        self._broken: tuple[OSError, float] | None = None
        """The error that closed the writer, and the time from which a new one is tried."""

    @property
    def experiment(self) -> "SummaryWriter":
        """The open SummaryWriter, for images, histograms and similar."""
        if self._experiment is None:
            if self._broken is not None and time.monotonic() < self._broken[1]:
                raise self._broken[0]
            # Imported here because tensorboard takes 1 s to import and is optional.
            from torch.utils.tensorboard import SummaryWriter

            arguments = {"purge_step": self._purge_step, **self._summary_writer}
            with self._reopening():
                if self._is_continued:
                    wait_for_later_name(self.log_dir)
                self._experiment = SummaryWriter(log_dir=self.log_dir, **arguments)
            self._purge_step, self._broken = None, None
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars; a dict among the values becomes a chart with a curve for each entry."""
        with self._reopening():
            for name, value in self._add_prefix(metrics).items():
                if isinstance(value, Mapping):
                    self.experiment.add_scalars(name, dict(value), step)
                else:
                    self.experiment.add_scalar(name, float(value), step)

    def log_hyperparams(
        self, params: Mapping[str, Any] | Namespace, metrics: Mapping[str, float] | float | None = None, step: int = 0
    ) -> None:
        """Log hyper-parameters.

        Args:
            params: A mapping or a Namespace.
            metrics: Names, with initial values, that the HParams page shows with the hyper-parameters; a number is the
                value of `hp_metric`.
            step: Step of the initial values.
        """
        super().log_hyperparams(params)
        if metrics is None:
            metrics = {"hp_metric": -1.0} if self._default_hp_metric and not self._is_continued else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": float(metrics)}
        if metrics:
            self.log_metrics(metrics, step=step)
            self._write_hparams_summary(metrics)

    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        """Log the model's graph, if `log_graph=True`, traced with `input_array` or `model.example_input_array`."""
        if not self._has_graph:
            return
        sample = find_sample(model, input_array, what="an input_array, for TensorBoardLogger(log_graph=True)")
        with eval_mode(model), torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
            self.experiment.add_graph(model, sample)

    def save(self) -> None:
        if self._experiment is not None:
            with self._reopening():
                self._experiment.flush()

    def position(self) -> Any:
        if not self.has_log_dir:
            return None
        return {"log_dir": self.log_dir, "num_bytes": read_event_file_sizes(self.log_dir)}

    def resume(self, step: int, position: Any) -> None:
        self._close()
        if not self.has_log_dir or not (sizes := read_event_file_sizes(self.log_dir)):
            return
        self._is_continued = True
        sure = position["num_bytes"] if self._is_own(position) else None
        is_all_before = remove_points_after(self.log_dir, list(sizes), step=step, sure=sure)
        self._purge_step = step if is_all_before else None

    def finalize(self, status: str) -> None:
        with self._reopening():
            self._close()

    def _close(self) -> None:
        experiment, self._experiment = self._experiment, None
        if experiment is not None:
            experiment.close()

    @contextmanager
    def _reopening(self) -> Iterator[None]:
        """Drop the writer if its file could not be written, so that a new one is tried later.

        A writer that has failed once, because the disk was full or the directory removed, never writes again.
        """
        try:
            yield
        except OSError as error:
            broken, self._experiment = self._experiment, None
            if broken is not None:
                with suppress(OSError):
                    broken.close()
            if self._broken is None or time.monotonic() >= self._broken[1]:
                self._broken = error, time.monotonic() + _RETRY_S
            raise

    def __getstate__(self) -> dict[str, Any]:
        # An open writer has a thread and a file, so a copy in another process opens its own.
        return {**self.__dict__, "_experiment": None}

    def _write_hparams_summary(self, metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams  # slow to import, see `experiment`

        # SummaryWriter.add_hparams would open a second event file, and a running TensorBoard only follows the newest
        # file of a directory: it would not show what is written to the first one afterwards.
        file_writer: Any = self.experiment.file_writer
        values = {name: _to_hparam_value(value) for name, value in flatten(plain(self._hparams))}
        for summary in hparams(values, self._convert_metrics(metrics)):
            file_writer.add_summary(summary)


def read_event_file_sizes(directory: str) -> dict[str, int]:
    """Return the size in bytes of each event file in or below the directory, by its relative path."""
    if is_url(directory):
        files, root = file_system(directory)
        files.invalidate_cache()
        details = files.find(root, detail=True) if files.exists(root) else {}
        paths_by_name = {
            path[path.index(root.strip("/")) + len(root.strip("/")) :].strip("/"): path for path in details
        }
        return {name: int(details[path]["size"]) for name, path in paths_by_name.items() if _is_event_file(name)}
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(directory) for name in names]
    return {os.path.relpath(path, directory): os.path.getsize(path) for path in paths if _is_event_file(path)}


def remove_points_after(directory: str, names: Sequence[str], *, step: int, sure: Mapping[str, int] | None) -> bool:
    """Remove the points that a run that continues from a checkpoint after `step` steps will log again.

    Args:
        directory: Directory of the event files.
        names: Relative paths of the files.
        step: Number of optimizer steps at the checkpoint.
        sure: Size of each file at the checkpoint, beyond which points are removed; None if unknown: points at `step` or
            later are removed.

    Returns:
        Whether points were removed and none is left at `step` or later.
    """
    contents = {name: _read_file(join(directory, name)) for name in names}
    starts = {name: sure.get(name, 0) for name in names} if sure is not None else {}
    others = {
        tag
        for content in contents.values()
        for _, event in _iterate_records(content)
        if event.step != step
        for tag in _read_tags(event)
    }
    has_removed, newest_kept = False, -1
    for name, content in contents.items():
        remaining = bytearray()
        num_read = num_out = 0
        for record, event in _iterate_records(content):
            tags = _read_tags(event)
            is_before = num_read < starts[name] if sure is not None else event.step < step
            num_read += len(record)
            if is_before or not tags or not is_repeated(event.step, tags, limit=step, others=others):
                remaining += record
                newest_kept = max(newest_kept, event.step if tags else -1)
            else:
                num_out += 1
        if num_out > 0:
            has_removed = True
            _replace_file(join(directory, name), bytes(remaining))
    return has_removed and newest_kept < step


def wait_for_later_name(directory: str) -> None:
    """Wait until a new event file's name, which contains the second, sorts after the existing ones.

    Readers order files by name, and a file that continues others must be the last.
    """
    seconds = [
        os.path.basename(name).partition(f"{_MARK}.")[2].partition(".")[0] for name in read_event_file_sizes(directory)
    ]
    newest_s = max((int(text) for text in seconds if text.isdecimal()), default=0)
    if (left_s := newest_s + 1 - time.time()) <= 1.0:
        time.sleep(max(0.0, left_s))


def _is_event_file(path: str) -> bool:
    return _MARK in os.path.basename(path)


def _iterate_records(content: bytes) -> Iterator[tuple[bytes, Any]]:
    """Yield each complete record with its event; a record that was cut off while it was written is ignored."""
    from tensorboard.compat.proto.event_pb2 import Event  # slow to import

    start = 0
    while start + _LENGTH.size + _CRC_BYTES <= len(content):
        (length,) = _LENGTH.unpack_from(content, start)
        first = start + _LENGTH.size + _CRC_BYTES
        end = first + length + _CRC_BYTES
        if end > len(content):
            return
        yield content[start:end], Event.FromString(content[first : first + length])
        start = end


def _read_tags(event: Any) -> list[str]:
    return [value.tag for value in event.summary.value] if event.HasField("summary") else []


def _read_file(path: str) -> bytes:
    if is_url(path):
        files, place = file_system(path)
        return bytes(files.cat_file(place))
    with open(path, "rb") as file:
        return file.read()


def _replace_file(path: str, content: bytes) -> None:
    if is_url(path):
        write_bytes(content, path)
        return
    replace_file(content, path)


def _to_hparam_value(value: Any) -> bool | int | float | str:
    """Convert a value that the HParams page cannot show to a string."""
    return value if isinstance(value, bool | int | float | str) else str(value)

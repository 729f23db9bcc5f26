"""TensorBoardLogger: event files that TensorBoard reads."""

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

from raylit.core.export import evaluating, sample_of
from raylit.core.hparams import flatten
from raylit.loggers.file import FileLogger, is_past, plain
from raylit.storage import file_system, is_url, join, replace_file, write_bytes

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_MARK = "events.out.tfevents"
_LENGTH = struct.Struct("<Q")
_CRC_BYTES = 4


def event_file_sizes(directory: str) -> dict[str, int]:
    """The bytes of each event file in the directory or below it, by its path there."""
    if is_url(directory):
        files, root = file_system(directory)
        files.invalidate_cache()
        found = files.find(root, detail=True) if files.exists(root) else {}
        named = {path[path.index(root.strip("/")) + len(root.strip("/")) :].strip("/"): path for path in found}
        return {name: int(found[path]["size"]) for name, path in named.items() if _is_event_file(name)}
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(directory) for name in names]
    return {os.path.relpath(path, directory): os.path.getsize(path) for path in paths if _is_event_file(path)}


def remove_points_after(directory: str, names: Sequence[str], *, step: int, sure: Mapping[str, int] | None) -> bool:
    """Take out what comes again in a run that goes on from a checkpoint after `step` steps: what lies beyond the
    numbers of bytes that files had then, or, where those are not known, what stands at that step or later. Returns
    whether there was anything, and nothing is left at that step or later."""
    contents = {name: _read(join(directory, name)) for name in names}
    starts = {name: sure.get(name, 0) for name in names} if sure is not None else {}
    others = {
        tag
        for content in contents.values()
        for _, event in _records(content)
        if event.step != step
        for tag in _tags(event)
    }
    has_removed, newest_kept = False, -1
    for name, content in contents.items():
        kept = bytearray()
        num_read = num_out = 0
        for record, event in _records(content):
            tags = _tags(event)
            is_before = num_read < starts[name] if sure is not None else event.step < step
            num_read += len(record)
            if is_before or not tags or not is_past(event.step, tags, limit=step, others=others):
                kept += record
                newest_kept = max(newest_kept, event.step if tags else -1)
            else:
                num_out += 1
        if num_out > 0:
            has_removed = True
            _replace(join(directory, name), bytes(kept))
    return has_removed and newest_kept < step


def wait_for_later_name(directory: str) -> None:
    """Readers go by the files' names, which have the second in them: one that continues others is to be the last."""
    seconds = [
        os.path.basename(name).partition(f"{_MARK}.")[2].partition(".")[0] for name in event_file_sizes(directory)
    ]
    newest_s = max((int(text) for text in seconds if text.isdecimal()), default=0)
    if (left_s := newest_s + 1 - time.time()) <= 1.0:
        time.sleep(max(0.0, left_s))


def _is_event_file(path: str) -> bool:
    return _MARK in os.path.basename(path)


def _records(content: bytes) -> Iterator[tuple[bytes, Any]]:
    """Each whole record and the event in it; what was cut off while it was written comes to nothing."""
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


def _tags(event: Any) -> list[str]:
    return [value.tag for value in event.summary.value] if event.HasField("summary") else []


def _read(path: str) -> bytes:
    if is_url(path):
        files, place = file_system(path)
        return bytes(files.cat_file(place))
    with open(path, "rb") as file:
        return file.read()


def _replace(path: str, content: bytes) -> None:
    if is_url(path):
        write_bytes(content, path)
        return
    replace_file(content, path)


_RETRY_S = 5.0


class TensorBoardLogger(FileLogger):
    """Event files in `save_dir/name/version_N[/sub_dir]`; further keywords go to torch's SummaryWriter.

    With `default_hp_metric`, hyper-parameters that come without a metric get `hp_metric=-1`: TensorBoard's HParams
    page shows only runs that have one.
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
        """A resumed run writes where hyper-parameters have been written before."""
        self._purge_step: int | None = None
        """For the next writer: a TensorBoard that is running forgets what comes again from this step on."""
        self._broken: tuple[OSError, float] | None = None
        """Why there is no writer, and when one is to be made again."""

    @property
    def experiment(self) -> "SummaryWriter":
        """The open SummaryWriter, for images, histograms and the like."""
        if self._experiment is None:
            if self._broken is not None and time.monotonic() < self._broken[1]:
                raise self._broken[0]
            # Importing tensorboard takes a second; runs without this logger need not have it.
            from torch.utils.tensorboard import SummaryWriter

            arguments = {"purge_step": self._purge_step, **self._summary_writer}
            with self._reopening():
                if self._is_continued:
                    wait_for_later_name(self.log_dir)
                self._experiment = SummaryWriter(log_dir=self.log_dir, **arguments)
            self._purge_step, self._broken = None, None
        return self._experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """A dict among the values is a chart with a curve for each of its entries."""
        with self._reopening():
            for name, value in self._named(metrics).items():
                if isinstance(value, Mapping):
                    self.experiment.add_scalars(name, dict(value), step)
                else:
                    self.experiment.add_scalar(name, float(value), step)

    def log_hyperparams(
        self, params: Mapping[str, Any] | Namespace, metrics: Mapping[str, float] | float | None = None, step: int = 0
    ) -> None:
        """`metrics`: names, with first values, that the HParams page shows beside the hyper-parameters; a number is
        the value of `hp_metric`."""
        super().log_hyperparams(params)
        if metrics is None:
            metrics = {"hp_metric": -1.0} if self._default_hp_metric and not self._is_continued else {}
        elif not isinstance(metrics, Mapping):
            metrics = {"hp_metric": float(metrics)}
        if metrics:
            self.log_metrics(metrics, step=step)
            self._write_hparams_summary(metrics)

    def log_graph(self, model: nn.Module, input_array: Any = None) -> None:
        """The model's graph, with `log_graph=True`; traced with `input_array` or `model.example_input_array`."""
        if not self._has_graph:
            return
        sample = sample_of(model, input_array, what="an input_array, for TensorBoardLogger(log_graph=True)")
        with evaluating(model), torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)
            self.experiment.add_graph(model, sample)

    def save(self) -> None:
        if self._experiment is not None:
            with self._reopening():
                self._experiment.flush()

    def position(self) -> Any:
        if not self.has_log_dir:
            return None
        return {"log_dir": self.log_dir, "num_bytes": event_file_sizes(self.log_dir)}

    def resume(self, step: int, position: Any) -> None:
        self._close()
        if not self.has_log_dir or not (sizes := event_file_sizes(self.log_dir)):
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
        """A writer whose file could not be written once, as the disk was full or the directory gone, never writes
        again: another one is tried later."""
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
        # An open writer is a thread and a file: a copy in another process opens its own.
        return {**self.__dict__, "_experiment": None}

    def _write_hparams_summary(self, metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams  # slow to import, see `experiment`

        # SummaryWriter.add_hparams would open a second event file, and a running TensorBoard reads on in the newest
        # file of a directory only: everything that the first one gets afterwards would stay unseen.
        file_writer: Any = self.experiment.file_writer
        shown = {name: _shown(value) for name, value in flatten(plain(self._hparams))}
        for summary in hparams(shown, self._prefixed(metrics)):
            file_writer.add_summary(summary)


def _shown(value: Any) -> bool | int | float | str:
    """What the HParams page cannot show as it is becomes a string."""
    return value if isinstance(value, bool | int | float | str) else str(value)

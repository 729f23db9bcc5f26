"""TensorBoardLogger: metrics and hyper-parameters as event files for TensorBoard. Driver only."""

import os
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from raylit.export import evaluating, sample_of
from raylit.hparams import flattened
from raylit.loggers import event_files
from raylit.loggers.file import FileLogger, plain

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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
                    event_files.wait_for_later_name(self.log_dir)
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
        return {"log_dir": self.log_dir, "num_bytes": event_files.sizes(self.log_dir)}

    def resume(self, step: int, position: Any) -> None:
        self._close()
        if not self.has_log_dir or not (sizes := event_files.sizes(self.log_dir)):
            return
        self._is_continued = True
        sure = position["num_bytes"] if self._is_own(position) else None
        is_all_before = event_files.remove_past(self.log_dir, list(sizes), step=step, sure=sure)
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
        shown = {name: _shown(value) for name, value in flattened(plain(self._hparams))}
        for summary in hparams(shown, self._prefixed(metrics)):
            file_writer.add_summary(summary)


def _shown(value: Any) -> bool | int | float | str:
    """What the HParams page cannot show as it is becomes a string."""
    return value if isinstance(value, bool | int | float | str) else str(value)

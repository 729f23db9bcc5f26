"""ProgressBar: how far the run is, as bars on a terminal and as plain lines anywhere else. Driver only."""

import math
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, TextIO

from raylit.callbacks.base import DriverCallback, Run
from raylit.callbacks.line_stream import lines_above_bars, status_line
from raylit.callbacks.meters import Lines, Meter, NotebookBar, TerminalBar
from raylit.errors import ConfigError

_TITLES = {"validate": "Validating", "test": "Testing", "predict": "Predicting"}


class ProgressBar(DriverCallback):
    """A bar for the epoch and, below it, one for the evaluation inside it: on stderr if that is a terminal, below the
    cell in a notebook, and plain lines on stderr anywhere else.

    `refresh_rate`: batches between two redraws, 0 shows nothing. `leave`: every epoch's bar stays, not just the last.
    Ticks are thinned out on their way here: where a loop ends, the bar takes its place from the run's state.
    """

    line_period_s = 10.0
    """Least time between two lines where stderr is no terminal."""

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        if refresh_rate < 0:
            raise ConfigError(f"refresh_rate={refresh_rate}: must be 0 (off) or a number of batches")
        self.refresh_rate = refresh_rate
        self.leave = leave
        self._epoch: Meter | None = None
        self._evaluation: Meter | None = None
        self._bars_at: TextIO | None = None
        self._redirection: ExitStack | None = None
        self._free_outputs: list[Any] = []
        """Of a notebook's cell."""

    def on_train_start(self, run: Run) -> None:
        if run.state.progress.batch > 0 and not run.state.progress.is_epoch_ended:
            self.on_train_epoch_start(run)  # a run resumed inside an epoch does not start that epoch again

    def on_train_epoch_start(self, run: Run) -> None:
        if self._epoch is not None:
            self._epoch.close(leave=self.leave)
        progress = run.state.progress
        epoch, done = (progress.epoch + 1, 0) if progress.is_epoch_ended else (progress.epoch, progress.batch)
        last = run.plan.limits.max_epochs
        title = f"Epoch {epoch}" if last is None else f"Epoch {epoch}/{last - 1}"
        self._epoch = self._opened(run, title, total=run.state.num_training_batches, done=done, is_outer=True)
        if self._epoch is not None and run.state.progress_bar_metrics:
            self._epoch.show(done, run.state.progress_bar_metrics)  # the last epoch's, until there are new ones

    def on_tick(self, run: Run, batch: int, dataloader_idx: int) -> None:
        if self._evaluation is not None:
            self._evaluation.show(sum(_eval_sizes(run)[:dataloader_idx]) + batch, {})
        elif self._epoch is not None:
            self._epoch.show(batch, run.state.progress_bar_metrics)

    def on_evaluation_start(self, run: Run, stage: str) -> None:
        if run.state.is_sanity_checking:
            title = "Sanity Checking"
        else:
            title = "Validation" if run.state.stage == "fit" else _TITLES[stage]
        if self._epoch is not None:
            self._epoch.show(run.state.progress.batch, run.state.progress_bar_metrics)
        is_outer = run.state.stage != "fit"
        self._evaluation = self._opened(run, title, total=sum(_eval_sizes(run)), done=0, is_outer=is_outer)

    def on_evaluation_end(self, run: Run, stage: str) -> None:
        meter, self._evaluation = self._evaluation, None
        if meter is None:
            return
        if run.state.stage != "fit":
            done = meter.total if math.isfinite(meter.total) else meter.done
            meter.show(done, run.state.progress_bar_metrics, is_final=True)
            meter.close(leave=True)
            return
        meter.close(leave=False)
        if self._epoch is not None:
            self._epoch.resume(meter.started_at)
            self._epoch.show(self._epoch.done, run.state.progress_bar_metrics)

    def on_train_epoch_end(self, run: Run) -> None:
        if self._epoch is not None:
            self._epoch.show(run.state.progress.batch, run.state.progress_bar_metrics, is_final=True)

    def on_end(self, run: Run) -> None:
        self._close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._close()

    def _opened(self, run: Run, title: str, *, total: float, done: float, is_outer: bool) -> Meter | None:
        if self.refresh_rate == 0:
            return None
        is_notebook = _is_notebook()
        if not sys.stderr.isatty() and not is_notebook:
            return Lines(title, total=total, done=done, period_s=self.line_period_s)
        version = run.loggers[0].version if run.loggers and is_outer else None
        lead = {} if version is None else {"v_num": str(version) if isinstance(version, int) else version[-4:]}
        if is_notebook:
            return NotebookBar(title, total=total, done=done, lead=lead, free=self._free_outputs)
        stream = self._stream_of_bars()
        above = self._epoch if not is_outer and isinstance(self._epoch, TerminalBar) else None
        return TerminalBar(
            title, total=total, done=done, every=self.refresh_rate, lead=lead, stream=stream, above=above
        )

    def _stream_of_bars(self) -> TextIO:
        if self._bars_at is None:
            self._redirection = ExitStack()
            self._bars_at = self._redirection.enter_context(lines_above_bars())
        return self._bars_at

    def _close(self) -> None:
        # The lower bar first: the one that stays ends its line below itself.
        if self._evaluation is not None:
            self._evaluation.close(leave=False)
        if self._epoch is not None:
            self._epoch.close(leave=True)
        if self._redirection is not None:
            self._redirection.close()
        self._epoch = self._evaluation = self._bars_at = self._redirection = None
        self._free_outputs = []


TQDMProgressBar = ProgressBar


def _eval_sizes(run: Run) -> tuple[float, ...]:
    sizes, limit = run.state.num_val_batches, run.plan.limits.sanity_val_batches
    return tuple(min(size, limit) for size in sizes) if run.state.is_sanity_checking and limit >= 0 else sizes


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def start_is_shown(num_workers: int, callbacks: Sequence[DriverCallback]) -> AbstractContextManager[None]:
    """While workers start, where one of the callbacks shows the rest."""
    is_shown = num_workers > 0 and any(isinstance(c, ProgressBar) and c.refresh_rate for c in callbacks)
    workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    return status_line(f"Starting {workers} ...") if is_shown else nullcontext()

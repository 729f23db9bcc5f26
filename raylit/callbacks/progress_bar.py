"""ProgressBar: how far the run is, as bars on a terminal and as plain lines anywhere else. Driver only."""

import math
import sys
from contextlib import ExitStack
from time import monotonic
from typing import Protocol, TextIO

from raylit.callbacks.base import DriverCallback, Run
from raylit.callbacks.line_stream import lines_above_bars
from raylit.errors import ConfigError

_TITLES = {"validate": "Validating", "test": "Testing", "predict": "Predicting"}


class ProgressBar(DriverCallback):
    """A bar for the epoch and, below it, one for the evaluation inside it; both on stderr.

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
        self._epoch: _Meter | None = None
        self._evaluation: _Meter | None = None
        self._bars_at: TextIO | None = None
        self._redirection: ExitStack | None = None

    def on_train_start(self, run: Run) -> None:
        if run.state.progress.batch > 0 and not run.state.progress.is_epoch_ended:
            self.on_train_epoch_start(run)  # a run resumed inside an epoch does not start that epoch again

    def on_train_epoch_start(self, run: Run) -> None:
        if self._epoch is not None:
            self._epoch.close(leave=self.leave)
        progress = run.state.progress
        epoch, done = (progress.epoch + 1, 0) if progress.is_epoch_ended else (progress.epoch, progress.batch)
        self._epoch = self._opened(
            run, f"Epoch {epoch}", total=run.state.num_training_batches, done=done, is_outer=True
        )

    def on_tick(self, run: Run, batch: int, dataloader_idx: int) -> None:
        if self._evaluation is not None:
            self._evaluation.show(sum(_eval_sizes(run)[:dataloader_idx]) + batch)
        elif self._epoch is not None:
            self._epoch.show(batch, _metrics(run))

    def on_evaluation_start(self, run: Run, stage: str) -> None:
        if run.state.is_sanity_checking:
            title = "Sanity Checking"
        else:
            title = "Validation" if run.state.stage == "fit" else _TITLES[stage]
        if self._epoch is not None:
            self._epoch.show(run.state.progress.batch, _metrics(run))
        is_outer = run.state.stage != "fit"
        self._evaluation = self._opened(run, title, total=sum(_eval_sizes(run)), done=0, is_outer=is_outer)

    def on_evaluation_end(self, run: Run, stage: str) -> None:
        meter, self._evaluation = self._evaluation, None
        if meter is None:
            return
        if run.state.stage != "fit":
            meter.show(meter.total if math.isfinite(meter.total) else meter.done, _metrics(run), is_final=True)
            meter.close(leave=True)
            return
        meter.close(leave=False)
        if self._epoch is not None:
            self._epoch.resume(meter.started_at)
            self._epoch.show(self._epoch.done, _metrics(run))

    def on_train_epoch_end(self, run: Run) -> None:
        if self._epoch is not None:
            self._epoch.show(run.state.progress.batch, _metrics(run), is_final=True)

    def on_end(self, run: Run) -> None:
        self._close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._close()

    def _opened(self, run: Run, title: str, *, total: float, done: float, is_outer: bool) -> "_Meter | None":
        if self.refresh_rate == 0:
            return None
        if not sys.stderr.isatty() and not _is_notebook():
            return _Lines(title, total=total, done=done, period_s=self.line_period_s)
        version = run.loggers[0].version if run.loggers and is_outer else None
        stream = self._stream_of_bars()
        return _Bar(title, total=total, done=done, every=self.refresh_rate, version=version, stream=stream)

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


TQDMProgressBar = ProgressBar


class _Meter(Protocol):
    """A bar or its replacement in plain lines. Counts are batches; infinite totals are unknown ones."""

    total: float
    done: float
    started_at: float

    def show(self, done: float, metrics: str = "", *, is_final: bool = False) -> None: ...

    def resume(self, paused_at: float) -> None:
        """Leave the time since then out of the speed."""

    def close(self, *, leave: bool) -> None: ...


class _Bar:
    def __init__(
        self, title: str, *, total: float, done: float, every: int, version: int | str | None, stream: TextIO
    ) -> None:
        # With the first bar only: without a terminal nothing needs it, and in a notebook it brings ipywidgets along.
        from tqdm.auto import tqdm

        self.total = total
        self.done = done
        self.started_at = monotonic()
        self._every = every
        self._lead = "" if version is None else f"v_num={version if isinstance(version, int) else version[-4:]}"
        self._bar = tqdm(
            desc=title,
            total=int(total) if math.isfinite(total) else None,
            initial=int(done),
            dynamic_ncols=True,
            mininterval=0.05,
            miniters=0,
            file=stream,
        )
        self._set_metrics("")

    def show(self, done: float, metrics: str = "", *, is_final: bool = False) -> None:
        num_new = int(done) - self._bar.n
        # tqdm drops redraws that come too fast; not the last one, nor the same place again, which means new metrics.
        is_forced = is_final or done in (self.done, self.total)
        self.done = done
        if is_forced or num_new >= self._every:
            self._set_metrics(metrics)
            is_drawn = self._bar.update(num_new)
            if is_forced and not is_drawn:
                self._bar.refresh()

    def resume(self, paused_at: float) -> None:
        pause_s = monotonic() - paused_at
        self._bar.start_t += pause_s
        self._bar.last_print_t += pause_s

    def close(self, *, leave: bool) -> None:
        self._bar.leave = leave
        self._bar.close()

    def _set_metrics(self, metrics: str) -> None:
        self._bar.set_postfix_str(", ".join(filter(None, (self._lead, metrics))), refresh=False)


class _Lines:
    def __init__(self, title: str, *, total: float, done: float, period_s: float) -> None:
        self.total = total
        self.done = done
        self.started_at = monotonic()
        self._title = title.lower()
        self._initial = done
        self._metrics = ""
        self._period_s = period_s
        self._due_at = self.started_at + period_s
        self._printed = (done, "")

    def show(self, done: float, metrics: str = "", *, is_final: bool = False) -> None:
        self.done, self._metrics = done, metrics
        if is_final or monotonic() >= self._due_at:
            self._print()

    def resume(self, paused_at: float) -> None:
        self.started_at += monotonic() - paused_at

    def close(self, *, leave: bool) -> None:
        if leave:
            self._print()

    def _print(self) -> None:
        if self._printed == (self.done, self._metrics):
            return
        now = monotonic()
        batches = f"{self.done:.0f}/{self.total:.0f}" if math.isfinite(self.total) else f"{self.done:.0f}"
        speed = f"{(self.done - self._initial) / max(now - self.started_at, 1e-9):.3g} it/s"
        text = ", ".join(filter(None, (f"{self._title}: {batches} batches", speed, self._metrics)))
        print(text, file=sys.stderr, flush=True)
        self._due_at = now + self._period_s
        self._printed = (self.done, self._metrics)


def _eval_sizes(run: Run) -> tuple[float, ...]:
    sizes, limit = run.state.num_val_batches, run.plan.limits.sanity_val_batches
    return tuple(min(size, limit) for size in sizes) if run.state.is_sanity_checking and limit >= 0 else sizes


def _metrics(run: Run) -> str:
    return ", ".join(f"{name}={_compact(value)}" for name, value in run.state.progress_bar_metrics.items())


def _compact(value: float | str) -> str:
    """Three digits, so that a bar does not twitch with every value; texts as they are."""
    if isinstance(value, str):
        return value
    return f"{value:#.3g}".removesuffix(".")


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config

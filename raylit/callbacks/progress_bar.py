"""ProgressBar: bars in a terminal or a notebook, or plain lines. Driver only."""

import contextlib
import html
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import RLock
from time import monotonic
from typing import Any, Protocol, TextIO, cast

from raylit.callbacks.base import DriverCallback, Run
from raylit.errors import ConfigError

Values = Mapping[str, float | str]
"""Metrics by name, in the order in which they are shown."""

_VALUE_WIDTH = 8
"""Columns for each value, so that a bar keeps its width for any value: -1.23e-05."""
_MIN_BAR_WIDTH = 16
"""If the bar would be narrower, the metrics get a line of their own."""
_LEAST_BAR_WIDTH = 4
_TITLE_WIDTH = 12
"""Aligns the bars of an epoch and of its validation."""
_TITLES = {"validate": "Validating", "test": "Testing", "predict": "Predicting"}


class Meter(Protocol):
    """Display of the progress of one loop. Counts are batches; an infinite total is an unknown one."""

    total: float
    done: float
    started_at: float

    def show(self, done: float, metrics: Values, *, is_final: bool = False) -> None: ...

    def resume(self, paused_at: float) -> None:
        """Exclude the time since `paused_at` from the speed."""

    def close(self, *, leave: bool) -> None: ...


class ProgressBar(DriverCallback):
    """Driver callback that shows a bar for the epoch and, below it, one for the evaluation inside it.

    The bars are on stderr if that is a terminal, below the cell in a notebook; otherwise plain lines are printed on
    stderr. Ticks reach the driver at a limited rate: at the end of a loop, the bar takes its position from the run's
    state.

    Args:
        refresh_rate: Number of batches between two redraws; 0 shows nothing.
        leave: Keep every epoch's bar, not only the last one.

    Raises:
        ConfigError: if `refresh_rate` is negative.
    """

    line_period_s = 10.0
    """Least time between two lines if stderr is not a terminal, in seconds."""

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
        """Outputs of a notebook's cell that can be reused."""

    def on_train_start(self, run: Run) -> None:
        if run.state.progress.batch > 0 and not run.state.progress.is_epoch_ended:
            self.on_train_epoch_start(run)  # not called for the epoch in which a run is resumed

    def on_train_epoch_start(self, run: Run) -> None:
        if self._epoch is not None:
            self._epoch.close(leave=self.leave)
        progress = run.state.progress
        epoch, done = (progress.epoch + 1, 0) if progress.is_epoch_ended else (progress.epoch, progress.batch)
        last = run.plan.limits.max_epochs
        title = f"Epoch {epoch}" if last is None else f"Epoch {epoch}/{last - 1}"
        self._epoch = self._open_meter(run, title, total=run.state.num_training_batches, done=done, is_outer=True)
        if self._epoch is not None and (values := _collect_values(run)):
            self._epoch.show(done, values)  # the last epoch's metrics, until there are new ones

    def on_tick(self, run: Run, batch: int, dataloader_idx: int) -> None:
        if self._evaluation is not None:
            self._evaluation.show(sum(_count_eval_batches(run)[:dataloader_idx]) + batch, {})
        elif self._epoch is not None:
            self._epoch.show(batch, _collect_values(run))

    def on_evaluation_start(self, run: Run, stage: str) -> None:
        if run.state.is_sanity_checking:
            title = "Sanity Checking"
        else:
            title = "Validation" if run.state.stage == "fit" else _TITLES[stage]
        if self._epoch is not None:
            self._epoch.show(run.state.progress.batch, _collect_values(run))
        is_outer = run.state.stage != "fit"
        self._evaluation = self._open_meter(run, title, total=sum(_count_eval_batches(run)), done=0, is_outer=is_outer)

    def on_evaluation_end(self, run: Run, stage: str) -> None:
        meter, self._evaluation = self._evaluation, None
        if meter is None:
            return
        if run.state.stage != "fit":
            done = meter.total if math.isfinite(meter.total) else meter.done
            meter.show(done, _collect_values(run), is_final=True)
            meter.close(leave=True)
            return
        meter.close(leave=False)
        if self._epoch is not None:
            self._epoch.resume(meter.started_at)
            self._epoch.show(self._epoch.done, _collect_values(run))

    def on_train_epoch_end(self, run: Run) -> None:
        if self._epoch is not None:
            self._epoch.show(run.state.progress.batch, _collect_values(run), is_final=True)

    def on_end(self, run: Run) -> None:
        self._close()

    def on_exception(self, run: Run, error: BaseException) -> None:
        self._close()

    def _open_meter(self, run: Run, title: str, *, total: float, done: float, is_outer: bool) -> Meter | None:
        if self.refresh_rate == 0:
            return None
        is_notebook = _is_notebook()
        if not sys.stderr.isatty() and not is_notebook:
            return PlainLines(title, total=total, done=done, period_s=self.line_period_s)
        version = run.loggers[0].version if run.loggers and is_outer else None
        lead = {} if version is None else {"v_num": str(version) if isinstance(version, int) else version[-4:]}
        if is_notebook:
            return NotebookBar(title, total=total, done=done, lead=lead, free=self._free_outputs)
        stream = self._open_stream()
        above = self._epoch if not is_outer and isinstance(self._epoch, TerminalBar) else None
        return TerminalBar(
            title, total=total, done=done, every=self.refresh_rate, lead=lead, stream=stream, above=above
        )

    def _open_stream(self) -> TextIO:
        if self._bars_at is None:
            self._redirection = ExitStack()
            self._bars_at = self._redirection.enter_context(lines_above_bars())
        return self._bars_at

    def _close(self) -> None:
        # The lower bar first, because the one that stays ends its line below itself.
        if self._evaluation is not None:
            self._evaluation.close(leave=False)
        if self._epoch is not None:
            self._epoch.close(leave=True)
        if self._redirection is not None:
            self._redirection.close()
        self._epoch = self._evaluation = self._bars_at = self._redirection = None
        self._free_outputs = []


TQDMProgressBar = ProgressBar


def start_is_shown(num_workers: int, callbacks: Sequence[DriverCallback]) -> AbstractContextManager[None]:
    """Show a status line while workers start, if one of the callbacks is a progress bar."""
    is_shown = num_workers > 0 and any(isinstance(c, ProgressBar) and c.refresh_rate for c in callbacks)
    workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    return status_line(f"Starting {workers} ...") if is_shown else nullcontext()


@contextlib.contextmanager
def status_line(text: str) -> Iterator[None]:
    """Show a line at the bottom of the terminal during the block; show nothing if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from tqdm import tqdm

    with lines_above_bars() as stream:
        bar = tqdm(bar_format=text, file=stream, leave=False, dynamic_ncols=True)
        try:
            yield
        finally:
            bar.close()


@contextlib.contextmanager
def lines_above_bars() -> Iterator[TextIO]:
    """Yield stderr, the stream for bars; what is printed to a terminal during the block goes above them."""
    with contextlib.ExitStack() as stack:
        bars = sys.stderr
        for stream, redirect in ((sys.stdout, contextlib.redirect_stdout), (sys.stderr, contextlib.redirect_stderr)):
            if stream.isatty():
                lines = LineStream(stream, bars)
                stack.callback(lines.finish)
                stack.enter_context(redirect(cast(TextIO, lines)))
        yield bars


def _is_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config


def _collect_values(run: Run) -> Values:
    """Return the metrics for the bar, with the rank that holds the others up, if there is one."""
    slowest = {"slowest": run.state.slowest_rank} if run.state.slowest_rank else {}
    return {**run.state.progress_bar_metrics, **slowest}


def _count_eval_batches(run: Run) -> tuple[float, ...]:
    sizes, limit = run.state.num_val_batches, run.plan.limits.sanity_val_batches
    return tuple(min(size, limit) for size in sizes) if run.state.is_sanity_checking and limit >= 0 else sizes


class TerminalBar:
    """A tqdm bar, with a second line for the metrics if they do not fit beside it."""

    def __init__(
        self,
        title: str,
        *,
        total: float,
        done: float,
        every: int,
        lead: Values,
        stream: TextIO,
        above: "TerminalBar | None" = None,
    ) -> None:
        """Open the bar; it gets the width of `above`, if that is given."""
        from tqdm import tqdm  # imported with the first bar: without a terminal it is not needed

        self._tqdm = tqdm
        self.total = total
        self.done = done
        self.started_at = monotonic()
        self._title = f"{title}: ".ljust(_TITLE_WIDTH)
        self._every = every
        self._lead = lead
        self._stream = stream
        self._above = above
        self._below: tqdm[Any] | None = None
        self.bar_width = _LEAST_BAR_WIDTH
        self._bar = tqdm(
            desc=self._title,
            total=int(total) if math.isfinite(total) else None,
            initial=int(done),
            dynamic_ncols=True,
            mininterval=0.05,
            miniters=0,
            file=stream,
            bar_format=self._title,  # until `_lay_out` below
        )
        self._lay_out({})
        self._bar.refresh()

    def show(self, done: float, metrics: Values, *, is_final: bool = False) -> None:
        num_new = int(done) - self._bar.n
        # tqdm drops redraws that come too fast. Force the last one, and one at the same place, which has new metrics.
        is_forced = is_final or done in (self.done, self.total)
        self.done = done
        if is_forced or num_new >= self._every:
            self._lay_out(metrics)
            is_drawn = self._bar.update(num_new)
            if is_forced and not is_drawn:
                self._bar.refresh()

    def resume(self, paused_at: float) -> None:
        pause_s = monotonic() - paused_at
        self._bar.start_t += pause_s
        self._bar.last_print_t += pause_s

    def close(self, *, leave: bool) -> None:
        # Bars that stay are closed top down, each ending its line; bars that vanish are closed bottom up.
        bars = [self._bar] if self._below is None else [self._bar, self._below]
        for bar in bars if leave else reversed(bars):
            bar.leave = leave
            bar.close()

    def _lay_out(self, metrics: Values) -> None:
        width = self._bar.format_dict["ncols"] or 80
        metrics = {**self._lead, **metrics}
        wanted = sum(
            len(name) + 3 + (len(value) if isinstance(value, str) else _VALUE_WIDTH) for name, value in metrics.items()
        )
        if math.isfinite(self.total):
            counts = 2 * len(str(self._bar.total)) + 1
            room = width - len(self._title) - counts - len("100%||  [00:00<00:00, 1000.00it/s]")
            is_beside = self._below is None and (not metrics or room - wanted >= _MIN_BAR_WIDTH)
            bar_width = room - wanted if is_beside else room
            times = "{elapsed}<{remaining}, {rate_fmt}"
            if bar_width < _LEAST_BAR_WIDTH:  # not enough room: show only the remaining time
                bar_width += len("00:00<, 1000.00it/s")
                times = "{remaining}"
            self.bar_width = max(_LEAST_BAR_WIDTH, bar_width if self._above is None else self._above.bar_width)
            bar = f"{{percentage:3.0f}}%|{{bar:{self.bar_width}}}| {{n_fmt}}/{{total_fmt}}"
        else:
            is_beside = self._below is None and wanted <= width - len(self._title) - len(
                "1000000it [00:00:00, 00.00it/s]"
            )
            bar, times = "{n_fmt}it", "{elapsed}, {rate_fmt}"
        self._bar.bar_format = f"{self._title}{bar} [{times}{{postfix}}]"
        self._bar.set_postfix_str(format_metrics(metrics, width) if is_beside else "", refresh=False)
        if not is_beside:
            self._show_below(format_metrics(metrics, width - 3))

    def _show_below(self, text: str) -> None:
        if self._below is None:
            self._below = self._tqdm(bar_format="  {desc}", file=self._stream, dynamic_ncols=True)
        if self._below.desc != text:
            self._below.set_description_str(text)


class NotebookBar:
    """An output of a notebook's cell that is updated in place; needs only IPython.

    `free` contains outputs of removed bars, which later bars reuse.
    """

    _PERIOD_S = 0.1

    def __init__(self, title: str, *, total: float, done: float, lead: Values, free: list[Any]) -> None:
        from IPython.display import display

        self.total = total
        self.done = done
        self.started_at = monotonic()
        self._title = title
        self._initial = done
        self._lead = lead
        self._values: Values = {}
        self._drawn_at = self.started_at
        self._free = free
        self._display: Any = free.pop() if free else display(self._bundle(), raw=True, display_id=True)
        self._draw()

    def show(self, done: float, metrics: Values, *, is_final: bool = False) -> None:
        self.done, self._values = done, dict(metrics)
        if is_final or monotonic() - self._drawn_at >= self._PERIOD_S:
            self._draw()

    def resume(self, paused_at: float) -> None:
        self.started_at += monotonic() - paused_at

    def close(self, *, leave: bool) -> None:
        if leave:
            self._draw()
        else:
            self._display.update({"text/plain": "", "text/html": ""}, raw=True)
            self._free.append(self._display)

    def _draw(self) -> None:
        self._drawn_at = monotonic()
        self._display.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, str]:
        elapsed_s = max(monotonic() - self.started_at, 1e-9)
        rate = (self.done - self._initial) / elapsed_s
        is_sized = math.isfinite(self.total)
        counts = f"{self.done:.0f}/{self.total:.0f}" if is_sized else f"{self.done:.0f}"
        times = _format_time(elapsed_s)
        if is_sized and rate > 0:
            times += f"<{_format_time((self.total - self.done) / rate)}"
        metrics = format_metrics({**self._lead, **self._values})
        text = f"{counts} [{', '.join(filter(None, [times, f'{rate:.3g} it/s', metrics]))}]"
        bar = f'<progress max="{self.total:.0f}" value="{self.done:.0f}"></progress> ' if is_sized else ""
        line = f"{html.escape(f'{self._title}: '.ljust(_TITLE_WIDTH))}{bar}{html.escape(text)}"
        return {
            "text/plain": f"{self._title}: {text}",
            "text/html": f'<div style="font-family:monospace;white-space:pre-wrap">{line}</div>',
        }


class PlainLines:
    """Progress as whole lines on stderr, with at least `period_s` seconds between them."""

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

    def show(self, done: float, metrics: Values, *, is_final: bool = False) -> None:
        self.done, self._metrics = done, format_metrics(metrics)
        if is_final or monotonic() >= self._due_at:
            self._print(is_going_on=not is_final)

    def resume(self, paused_at: float) -> None:
        self.started_at += monotonic() - paused_at

    def close(self, *, leave: bool) -> None:
        if leave:
            self._print(is_going_on=False)

    def _print(self, *, is_going_on: bool) -> None:
        if self._printed == (self.done, self._metrics):
            return
        now = monotonic()
        batches = f"{self.done:.0f}/{self.total:.0f}" if math.isfinite(self.total) else f"{self.done:.0f}"
        rate = (self.done - self._initial) / max(now - self.started_at, 1e-9)
        remaining = ""
        if is_going_on and math.isfinite(self.total) and rate > 0:
            remaining = f"{_format_time((self.total - self.done) / rate)} left"
        text = ", ".join(
            filter(None, (f"{self._title}: {batches} batches", f"{rate:.3g} it/s", remaining, self._metrics))
        )
        print(text, file=sys.stderr, flush=True)
        self._due_at = now + self._period_s
        self._printed = (self.done, self._metrics)


class LineStream:
    """Stream that writes whole lines to a terminal above the bars; an unfinished line is kept until its end.

    Any thread may write: Ray brings the workers' output in a thread of its own.
    """

    def __init__(self, terminal: TextIO, bars: TextIO) -> None:
        self._terminal = terminal
        self._bars = bars
        self._rest = ""
        self._lock = RLock()

    def write(self, text: str) -> int:
        with self._lock:
            lines, newline, self._rest = (self._rest + text).rpartition("\n")
            self._print(lines + newline)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def finish(self) -> None:
        """Write an unfinished line as it is."""
        with self._lock:
            rest, self._rest = self._rest, ""
            self._print(rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)

    def _print(self, text: str) -> None:
        from tqdm import tqdm  # already imported by the code that opened a bar

        if text:
            with tqdm.external_write_mode(file=self._bars):
                self._terminal.write(text)
                self._terminal.flush()


def format_metrics(metrics: Values, width: float = math.inf) -> str:
    """Format as many metrics as fit into `width`, and the number of the others: `loss=0.123, acc=0.900, +2`."""
    texts = [f"{name}={_format_value(value)}" for name, value in metrics.items()]
    whole = ", ".join(texts)
    num_shown = len(texts)
    while len(whole) > width and num_shown > 0:
        num_shown -= 1
        whole = ", ".join([*texts[:num_shown], f"+{len(texts) - num_shown}"])
    return whole


def _format_value(value: float | str) -> str:
    """Format a number with three digits, so that the bar's width does not change with every value; keep texts."""
    if isinstance(value, str):
        return value
    return f"{value:#.3g}".removesuffix(".")


def _format_time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02.0f}:{seconds:02.0f}" if hours else f"{minutes:02.0f}:{seconds:02.0f}"

"""What the progress bar shows, on a pseudo-terminal and in a file."""

import contextlib
import io
import math
import os
import re
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from fcntl import ioctl
from types import SimpleNamespace
from typing import Any

import pytest

from raylit.callbacks.progress_bar import ProgressBar, TQDMProgressBar, status_line
from raylit.config import Limits, Plan
from raylit.errors import ConfigError
from raylit.loggers.base import Logger
from raylit.protocol.state import Progress, RunState, Stage

REDRAW_S = 0.1
"""More than the least time between two redraws."""


class Run:
    """What the coordinator is to a callback, driven by hand."""

    def __init__(self, bar: ProgressBar, stage: Stage = "fit", **state: Any) -> None:
        self.bar = bar
        self.plan = Plan(limits=Limits(sanity_val_batches=2, max_epochs=10))
        self.state = RunState(stage=stage, **{"num_training_batches": 4, "num_val_batches": (3.0, 2.0)} | state)
        self.loggers: list[Logger] = []
        self.log_dir = "."
        bar.on_start(self)

    def stop(self, reason: str) -> None: ...
    def save_checkpoint(self, path: str, *, is_weights_only: bool = False) -> None: ...
    def remove_checkpoint(self, path: str) -> None: ...

    def start_epoch(self, epoch: int) -> None:
        self.state.progress = Progress(epoch=epoch)
        self.bar.on_train_epoch_start(self)

    def tick(self, batch: int, dataloader_idx: int = 0, **metrics: float) -> None:
        self.state.progress_bar_metrics |= metrics
        self.bar.on_tick(self, batch, dataloader_idx)

    def end_epoch(self, batch: int, **metrics: float) -> None:
        self.state.progress = Progress(epoch=self.state.progress.epoch, batch=batch, is_epoch_ended=True)
        self.state.progress_bar_metrics |= metrics
        self.bar.on_train_epoch_end(self)


class Terminal:
    """A pseudo-terminal; `rows` is what a screen that got everything so far would show."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self._raw = bytearray()
        master, slave = os.openpty()
        ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._reader = threading.Thread(target=self._read, args=(master,), daemon=True)
        self._reader.start()

    def rows(self) -> list[str]:
        """Close the terminal and return its rows without the empty ones."""
        self.stream.close()
        self._reader.join(timeout=10)
        rows: dict[int, list[str]] = {}
        row = column = 0
        for escape, character in re.findall(r"\x1b(\[A)|(.)", self._raw.decode(), re.DOTALL):
            if escape:
                row -= 1
            elif character == "\n":
                row += 1
            elif character == "\r":
                column = 0
            else:
                assert column < self.columns, "a line is wider than the terminal"
                line = rows.setdefault(row, [" "] * self.columns)
                line[column] = character
                column += 1
        lines = ["".join(rows[row]).rstrip() for row in sorted(rows)]
        return [line for line in lines if line]

    def text(self) -> str:
        """Everything that was written, once the terminal is ended."""
        return self._raw.decode()

    def _read(self, master: int) -> None:
        # Linux answers with an error once the other end is closed.
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                self._raw += data
        os.close(master)


@pytest.fixture(params=[80, 200])
def open_terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """To be called in the test: pytest puts its own streams in place between the fixtures and the test."""

    def opened() -> Terminal:
        terminal = Terminal(request.param)
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        monkeypatch.setattr(sys, "stdout", terminal.stream)
        return terminal

    return opened


def test_a_terminal_shows_epoch_version_and_metrics(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar())
    run.loggers = [SimpleNamespace(version=7)]  # type: ignore[list-item]
    run.start_epoch(3)
    run.tick(1, loss=0.123456)
    run.tick(4, loss=0.5)
    run.end_epoch(4, acc=1.0)
    run.bar.on_end(run)
    rows = terminal.rows()
    # At 80 columns the metrics have a line of their own.
    assert len(rows) == (2 if terminal.columns == 80 else 1)
    shown = r"Epoch 3/9: +100%\|█+\| 4/4 \[.*it/s[],] +v_num=7, loss=0\.500, acc=1\.00]?"
    assert re.fullmatch(shown, " ".join(rows))


def test_validation_has_a_second_bar_while_it_runs(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.tick(2)
    run.state.progress = Progress(batch=4)
    run.bar.on_evaluation_start(run, "validate")
    time.sleep(REDRAW_S)
    run.tick(1, dataloader_idx=1)
    first, second = terminal.rows()
    assert re.match("Epoch 0/9: +100%", first)  # the last tick was batch 2, the state knows of 4
    assert second.startswith("Validation:")
    assert [first.index("|"), first.rindex("|")] == [second.index("|"), second.rindex("|")]
    assert " 4/5 " in second


def test_after_validation_its_bar_is_removed_and_its_metrics_are_shown(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.tick(4)
    run.bar.on_evaluation_start(run, "validate")
    run.tick(1)
    run.state.progress_bar_metrics["val_loss"] = 0.25
    run.bar.on_evaluation_end(run, "validate")
    run.end_epoch(4)
    run.bar.on_end(run)
    *_, row = terminal.rows()
    assert "val_loss=0.250" in row
    assert "Validation" not in row


def test_the_sanity_check_leaves_nothing_behind(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar(), is_sanity_checking=True)
    run.bar.on_evaluation_start(run, "validate")
    run.tick(2)
    run.bar.on_evaluation_end(run, "validate")
    run.bar.on_end(run)
    assert terminal.rows() == []


def test_the_sanity_check_counts_its_own_batches(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar(), is_sanity_checking=True, num_val_batches=(30.0, 1.0))
    run.bar.on_evaluation_start(run, "validate")
    run.tick(1, dataloader_idx=1)
    (row,) = terminal.rows()
    assert re.match("Sanity Checking: +100%", row)
    assert " 3/3 " in row


@pytest.mark.parametrize(("leave", "epochs"), [(False, ["Epoch 1/9"]), (True, ["Epoch 0/9", "Epoch 1/9"])])
def test_leave_keeps_the_bar_of_every_epoch(
    leave: bool, epochs: list[str], open_terminal: Callable[[], Terminal]
) -> None:
    terminal = open_terminal()
    run = Run(TQDMProgressBar(leave=leave))
    for epoch in range(2):
        run.start_epoch(epoch)
        run.end_epoch(4)
    run.bar.on_train_end(run)
    run.bar.on_end(run)
    assert [row.split(":")[0] for row in terminal.rows()] == epochs


@pytest.mark.parametrize(
    ("stage", "title"), [("validate", "Validating"), ("test", "Testing"), ("predict", "Predicting")]
)
def test_other_stages_leave_a_full_bar(stage: Stage, title: str, open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar(), stage)
    run.bar.on_evaluation_start(run, stage)
    run.tick(1)
    run.bar.on_evaluation_end(run, stage)
    run.bar.on_end(run)
    (row,) = terminal.rows()
    assert re.match(f"{title}: +100%", row)


def test_printed_lines_appear_above_the_bars(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.tick(1)
    thread = threading.Thread(target=print, args=("a worker's",), kwargs={"end": " line\n"})
    thread.start()
    thread.join()
    run.bar.on_evaluation_start(run, "validate")
    print("a warning", file=sys.stderr)
    print("half", "a line", end="")
    run.bar.on_evaluation_end(run, "validate")
    print(" is whole in the end")
    run.tick(2)
    run.bar.on_end(run)
    print("afterwards")
    *messages, bar, last = terminal.rows()
    assert messages == ["a worker's line", "a warning", "half a line is whole in the end"]
    assert re.match("Epoch 0/9: +50%", bar)
    assert last == "afterwards"


def test_the_streams_are_restored_and_unfinished_lines_are_written(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar())
    run.start_epoch(0)
    assert sys.stdout is not terminal.stream
    assert sys.stdout.isatty()
    print("no end", end="", flush=True)
    run.bar.on_exception(run, RuntimeError("boom"))
    run.bar.on_end(run)
    assert (sys.stdout, sys.stderr) == (terminal.stream, terminal.stream)
    assert terminal.rows()[-1] == "no end"


def test_a_file_as_stdout_is_left_alone(open_terminal: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    open_terminal()
    file = io.StringIO()
    monkeypatch.setattr(sys, "stdout", file)
    run = Run(ProgressBar())
    run.start_epoch(0)
    assert sys.stdout is file
    run.bar.on_end(run)


def test_an_exception_leaves_the_bar_where_it_stood(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.tick(1)
    run.bar.on_evaluation_start(run, "validate")
    run.tick(1)
    run.bar.on_exception(run, RuntimeError("boom"))
    run.bar.on_end(run)
    print("Traceback", file=sys.stderr)
    bar, traceback = terminal.rows()
    assert bar.startswith("Epoch 0/9:")
    assert traceback == "Traceback"


def test_a_loader_without_length_has_no_total(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar(), num_training_batches=math.inf)
    run.start_epoch(0)
    run.tick(3)
    run.end_epoch(5)
    run.bar.on_end(run)
    (row,) = terminal.rows()
    assert re.match(r"Epoch 0/9: +5it \[", row)


def test_a_resumed_epoch_starts_where_it_was(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar(), progress=Progress(epoch=2, batch=3))
    run.bar.on_train_start(run)
    (row,) = terminal.rows()
    assert re.match("Epoch 2/9: +75%", row)


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    run = Run(bar)
    for epoch in range(2):
        run.start_epoch(epoch)
        run.tick(1, train_loss=1.0)
        run.bar.on_evaluation_start(run, "validate")
        run.tick(1)
        run.bar.on_evaluation_end(run, "validate")
        run.end_epoch(4, train_loss=0.123456)
    bar.on_train_end(run)
    bar.on_end(run)
    assert re.fullmatch(
        r"epoch 0/9: 4/4 batches, \S+ it/s, train_loss=0\.123\nepoch 1/9: 4/4 batches, \S+ it/s, train_loss=0\.123\n",
        capsys.readouterr().err,
    )


def test_plain_lines_come_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    run = Run(bar, num_training_batches=math.inf)
    run.start_epoch(0)
    for batch in range(1, 4):
        run.tick(batch)
    assert capsys.readouterr().err == ""
    bar.line_period_s = 0.0
    run.start_epoch(1)
    run.tick(1)
    assert re.fullmatch(r"epoch 1/9: 1 batches, \S+ it/s\n", capsys.readouterr().err.splitlines(keepends=True)[-1])


def test_no_line_is_printed_twice(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    bar.line_period_s = 0.0
    run = Run(bar)
    run.start_epoch(0)
    run.tick(4, loss=0.5)
    run.state.progress = Progress(batch=4)
    run.bar.on_evaluation_start(run, "validate")
    run.bar.on_evaluation_end(run, "validate")
    run.end_epoch(4)
    run.bar.on_end(run)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_slowest_rank_is_shown_after_the_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.state.slowest_rank = "rank 3 +45% data wait"
    run.end_epoch(4, loss=0.5)
    run.bar.on_end(run)
    assert capsys.readouterr().err.endswith("loss=0.500, slowest=rank 3 +45% data wait\n")


def test_an_exception_prints_how_far_it_got(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.tick(3, loss=0.5)
    run.bar.on_exception(run, RuntimeError("boom"))
    run.bar.on_end(run)
    assert re.fullmatch(r"epoch 0/9: 3/4 batches, \S+ it/s, loss=0\.500\n", capsys.readouterr().err)


def test_the_time_of_validation_does_not_count_as_training_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("raylit.callbacks.progress_bar.monotonic", lambda: now[0])
    run = Run(ProgressBar())
    run.start_epoch(0)
    now[0] += 2.0
    run.tick(4)
    run.bar.on_evaluation_start(run, "validate")
    now[0] += 50.0
    run.bar.on_evaluation_end(run, "validate")
    run.end_epoch(4)
    assert capsys.readouterr().err.splitlines()[-1] == "epoch 0/9: 4/4 batches, 2 it/s"


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_refresh_rate_zero_shows_nothing(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(ProgressBar(refresh_rate=0), stage)
    run.start_epoch(0)
    run.bar.on_evaluation_start(run, "test")
    run.tick(1)
    run.bar.on_evaluation_end(run, "test")
    run.end_epoch(4)
    run.bar.on_end(run)
    assert capsys.readouterr().err == ""


def test_a_negative_refresh_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match="refresh_rate=-1"):
        ProgressBar(refresh_rate=-1)


def test_refresh_rate_thins_out_the_redraws(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    run = Run(ProgressBar(refresh_rate=50), num_training_batches=1000)
    run.start_epoch(0)
    time.sleep(REDRAW_S)
    for batch in range(1, 75):
        run.tick(batch)
    (row,) = terminal.rows()
    assert " 50/1000 " in row


def test_metrics_stay_whole_where_there_is_no_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(80)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.tick(2, **{f"a_metric_with_a_long_name_{index}": 1e-5 * index for index in range(5)})
    time.sleep(REDRAW_S)  # ten thousand batches in a second would need more room
    run.end_epoch(4)
    run.bar.on_end(run)
    bar, metrics = terminal.rows()
    assert re.fullmatch(r"Epoch 0/9:  100%\|█+\| 4/4 \[.*it/s]", bar)
    assert metrics.split() == ["a_metric_with_a_long_name_0=0.00,", "a_metric_with_a_long_name_1=1.00e-05,", "+3"]


def test_a_narrow_terminal_keeps_the_bar_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(40)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    run = Run(ProgressBar())
    run.start_epoch(0)
    run.tick(2, loss=0.5)
    time.sleep(REDRAW_S)
    run.tick(3, loss=0.5)
    bar, metrics = terminal.rows()
    assert re.fullmatch(r"Epoch 0/9:   75%\|█+.? *\| 3/4 \[00:00]", bar)
    assert metrics.strip() == "loss=0.500"


def test_the_bar_keeps_its_width_whatever_the_values_become(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    for value in (1.0, -1.2345e-05):
        terminal = Terminal(120)
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        run = Run(ProgressBar())
        run.start_epoch(0)
        run.tick(2, loss=value)
        run.end_epoch(4)
        run.bar.on_end(run)
        (row,) = terminal.rows()
        widths.append(row.count("█"))
    assert widths[0] == widths[1] > 16


def test_a_status_line_is_shown_during_the_block(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    with contextlib.suppress(KeyError), status_line("Starting 2 workers ..."):
        print("said meanwhile")
        raise KeyError
    print("afterwards")
    assert terminal.rows() == ["said meanwhile", "afterwards"]
    assert "Starting 2 workers ..." in terminal.text()


def test_a_status_line_needs_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with status_line("Starting 2 workers ..."):
        pass
    assert capsys.readouterr().err == ""

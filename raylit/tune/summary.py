"""The table that a sweep ends with: its trials, the best first. Driver."""

import math
import shutil
from collections.abc import Sequence

from raylit.tables import drawn, fitting_widths
from raylit.tune.parameters import constant, shown, varying
from raylit.tune.records import Mode, TrialRecord

_MAX_ROWS = 20


def summary(trials: Sequence[TrialRecord], *, metric: str, mode: Mode, directory: str = "", width: int = 0) -> str:
    """A row for each trial with what differs between their configs; below it what does not. `width` in characters;
    0: of the terminal."""
    ranked = sorted(trials, key=lambda trial: _rank(trial, metric, mode))
    parameters = varying(ranked)
    has_epochs = any("epoch" in trial.metrics for trial in trials)
    header = ["trial", *(parameter.name for parameter in parameters), f"best {metric}"]
    header += [*(["epochs"] if has_epochs else []), "time", "status"]
    rows = []
    for index, trial in enumerate(ranked[:_MAX_ROWS]):
        best = trial.best(metric, mode)
        epochs = [str(int(trial.metrics["epoch"]) + 1) if "epoch" in trial.metrics else "-"] if has_epochs else []
        mark = " *" if index == 0 and best is not None else ""
        rows.append(
            [
                f"{trial.id}{mark}",
                *(shown(parameter.values[index]) for parameter in parameters),
                "-" if best is None else f"{best:.5g}",
                *epochs,
                _duration(trial.history[-1].get("time_s") if trial.history else None),
                trial.status,
            ]
        )
    align = "l" + "r" * (len(header) - 2) + "l"
    header, rows, align, num_hidden = _fitted(header, rows, align, width or shutil.get_terminal_size().columns)
    lines = drawn(header, rows, fitting_widths(header, rows), align=align)
    return "\n".join([*lines, *_notes(ranked, num_hidden=num_hidden, directory=directory)])


def _rank(trial: TrialRecord, metric: str, mode: Mode) -> float:
    best = trial.best(metric, mode)
    return math.inf if best is None else best if mode == "min" else -best


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _fitted(
    header: list[str], rows: list[list[str]], align: str, width: int
) -> tuple[list[str], list[list[str]], str, int]:
    """Without the last of the parameters where they do not all fit, and how many those are."""
    num_hidden = 0
    num_after = len(header) - next(index for index, name in enumerate(header) if name.startswith("best "))
    while sum(fitting_widths(header, rows)) + len(header) + 1 > width and len(header) > num_after + 2:
        index = len(header) - num_after - 1
        header, rows = [*header[:index], *header[index + 1 :]], [[*row[:index], *row[index + 1 :]] for row in rows]
        align = align[:index] + align[index + 1 :]
        num_hidden += 1
    return header, rows, align, num_hidden


def _notes(ranked: Sequence[TrialRecord], *, num_hidden: int, directory: str) -> list[str]:
    notes = []
    if len(ranked) > _MAX_ROWS:
        notes.append(f"and {len(ranked) - _MAX_ROWS} more trials")
    if num_hidden:
        notes.append(f"and {num_hidden} more parameter{'s' if num_hidden > 1 else ''}")
    if same := constant(ranked):
        notes.append("in all trials: " + ", ".join(f"{name}={shown(value)}" for name, value in same.items()))
    for trial in ranked:
        if trial.error is not None:
            notes.append(f"trial {trial.id} failed: {trial.error.strip().splitlines()[-1]}")
    if directory:
        notes.append(f"tensorboard --logdir {directory}")
    return notes

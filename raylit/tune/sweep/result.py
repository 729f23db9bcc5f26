"""What a sweep returns: the best trial, all others, tables and figures."""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from raylit.checkpoint import files
from raylit.core.hparams import load_weights
from raylit.core.module import LightningModule
from raylit.errors import ConfigError
from raylit.storage import join
from raylit.text_table import draw_table, fitting_widths, printable
from raylit.tune.records import Mode, TrialRecord, best_of, config_of
from raylit.tune.sweep.figures import is_pictured, objective_figure, parallel_figure
from raylit.tune.sweep.parameters import constant, format_value, varying

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
                *(format_value(parameter.values[index]) for parameter in parameters),
                "-" if best is None else f"{best:.5g}",
                *epochs,
                _duration(trial.history[-1].get("time_s") if trial.history else None),
                trial.status,
            ]
        )
    align = "l" + "r" * (len(header) - 2) + "l"
    header, rows, align, num_hidden = _fitted(header, rows, align, width or shutil.get_terminal_size().columns)
    lines = draw_table(header, rows, fitting_widths(header, rows), align=align)
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
        notes.append("in all trials: " + ", ".join(f"{name}={format_value(value)}" for name, value in same.items()))
    for trial in ranked:
        if trial.error is not None:
            notes.append(f"trial {trial.id} failed: {trial.error.strip().splitlines()[-1]}")
    if directory:
        notes.append(f"tensorboard --logdir {directory}")
    return notes


class SweepResult:
    """The trials of a sweep, and the best of them by `metric`: the best report of any trial, whenever it was made."""

    def __init__(
        self,
        trials: Sequence[TrialRecord],
        *,
        metric: str,
        mode: Mode,
        directory: str,
        module_of: Callable[[dict[str, Any]], LightningModule],
    ) -> None:
        self.trials = list(trials)
        self.metric = metric
        self.mode = mode
        self.directory = directory
        """Of the sweep's files; TensorBoard shows it."""
        self._module_of = module_of

    @property
    def best_trial(self) -> TrialRecord:
        """ConfigError: no trial has reported a number."""
        best = best_of(self.trials, self.metric, self.mode)
        if best is None:
            failed = "".join(f"\n\ntrial {name}:\n{error}" for name, error in list(self.errors.items())[:1])
            raise ConfigError(
                f"no trial has reported a number as {self.metric!r}: {len(self.errors)} of {len(self.trials)} trials "
                f"have failed{failed}"
            )
        return best

    @property
    def best_config(self) -> dict[str, Any]:
        """What the best checkpoint was trained with, where there is one: population based training changes configs."""
        trial = self.best_trial
        return dict(trial.config) if trial.checkpoint is None else config_of(trial.checkpoint)

    @property
    def best_value(self) -> float:
        """Of the metric."""
        value = self.best_trial.best(self.metric, self.mode)
        assert value is not None
        return value

    @property
    def best_checkpoint(self) -> str | None:
        """The best trial's best checkpoint, for `ckpt_path` and `load_from_checkpoint`; None: none was kept."""
        return self.best_trial.checkpoint

    @property
    def best_model(self) -> LightningModule:
        """What `build` makes of the best config, with the best checkpoint's weights. Made anew by each access."""
        trial = self.best_trial
        if trial.checkpoint is None:
            raise ConfigError("the sweep kept no checkpoints: leave enable_checkpointing=False out")
        module = self._module_of(self.best_config)
        load_weights(module, files.read(trial.checkpoint)["state_dict"], source=trial.checkpoint)
        return module

    @property
    def errors(self) -> dict[str, str]:
        """The traceback of each failed trial, by its id."""
        return {trial.id: trial.error for trial in self.trials if trial.error is not None}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial: id, status, the config's values as `config/NAME`, the metric's best and the metrics of
        the last report."""
        return [
            {
                "trial": trial.id,
                "status": trial.status,
                **{f"config/{name}": value for name, value in trial.config.items()},
                f"best {self.metric}": trial.best(self.metric, self.mode),
                **trial.metrics,
            }
            for trial in self.trials
        ]

    def dataframe(self) -> Any:
        """`rows` as a pandas DataFrame."""
        import pandas  # Ray Tune depends on it

        return pandas.DataFrame(self.rows())

    def summary(self) -> str:
        """A table of the trials, the best first, with what differs between their configs."""
        return summary(self.trials, metric=self.metric, mode=self.mode, directory=self.directory)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The metric along each training, and the trials with the best so far: a matplotlib Figure, saved under
        `path`."""
        return objective_figure(self.trials, metric=self.metric, mode=self.mode, path=path)

    def plot_parallel(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Parallel coordinates: a line for each trial through its hyper-parameters to the best that it reached."""
        return parallel_figure(self.trials, metric=self.metric, mode=self.mode, path=path)

    def show(self) -> None:
        """Print the table and, where matplotlib is there, save both pictures beside the sweep's files."""
        print(printable(self.summary()))
        if not is_pictured():
            return
        for draw, name in ((self.plot, "objective.png"), (self.plot_parallel, "parallel.png")):
            draw(join(self.directory, name))

    def __len__(self) -> int:
        return len(self.trials)

    def __repr__(self) -> str:
        best = best_of(self.trials, self.metric, self.mode)
        found = "" if best is None else f", best {self.metric}={best.best(self.metric, self.mode):g} with {best.config}"
        return f"SweepResult({len(self.trials)} trials, {len(self.errors)} failed{found})"

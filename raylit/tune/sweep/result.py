"""Result of a sweep: the best trial, all others, tables and figures. Driver."""

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
from raylit.tune.figures import can_draw_figures, objective_figure, parallel_figure
from raylit.tune.records import Mode, TrialRecord, find_best_trial, read_config
from raylit.tune.sweep.parameters import find_common_values, format_value, list_varying_parameters

_MAX_ROWS = 20


class SweepResult:
    """Result of a sweep: its trials, and the best of them by `metric`.

    The best trial is the one with the best report, whenever that was made.
    """

    def __init__(
        self,
        trials: Sequence[TrialRecord],
        *,
        metric: str,
        mode: Mode,
        directory: str,
        build_module: Callable[[dict[str, Any]], LightningModule],
    ) -> None:
        self.trials = list(trials)
        self.metric = metric
        self.mode = mode
        self.directory = directory
        """Directory of the sweep's files, which TensorBoard shows."""
        self._build_module = build_module

    @property
    def best_trial(self) -> TrialRecord:
        """Return the trial with the best report.

        Raises:
            ConfigError: no trial has reported a number.
        """
        best = find_best_trial(self.trials, self.metric, self.mode)
        if best is None:
            failed = "".join(f"\n\ntrial {name}:\n{error}" for name, error in list(self.errors.items())[:1])
            raise ConfigError(
                f"no trial has reported a number as {self.metric!r}: {len(self.errors)} of {len(self.trials)} trials "
                f"have failed{failed}"
            )
        return best

    @property
    def best_config(self) -> dict[str, Any]:
        """Return the config with which the best checkpoint was trained, else that of the best trial.

        They differ after population based training, which changes configs.
        """
        trial = self.best_trial
        return dict(trial.config) if trial.checkpoint is None else read_config(trial.checkpoint)

    @property
    def best_value(self) -> float:
        """Return the best value of the metric."""
        value = self.best_trial.best(self.metric, self.mode)
        assert value is not None
        return value

    @property
    def best_checkpoint(self) -> str | None:
        """Return the best trial's best checkpoint, for `ckpt_path` or `load_from_checkpoint`; None if none was kept."""
        return self.best_trial.checkpoint

    @property
    def best_model(self) -> LightningModule:
        """Build the module of the best config with the best checkpoint's weights, anew at each access.

        Raises:
            ConfigError: the sweep kept no checkpoints.
        """
        trial = self.best_trial
        if trial.checkpoint is None:
            raise ConfigError("the sweep kept no checkpoints: leave enable_checkpointing=False out")
        module = self._build_module(self.best_config)
        load_weights(module, files.read(trial.checkpoint)["state_dict"], source=trial.checkpoint)
        return module

    @property
    def errors(self) -> dict[str, str]:
        """Return the traceback of each failed trial, by its id."""
        return {trial.id: trial.error for trial in self.trials if trial.error is not None}

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each trial.

        Returns:
            Dicts with id, status, the config's values as `config/NAME`, the metric's best and the metrics of
                the last report.
        """
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
        """Return `rows` as a pandas DataFrame."""
        import pandas  # Ray Tune depends on it

        return pandas.DataFrame(self.rows())

    def summary(self) -> str:
        """Return a table of the trials, the best first, with the parameters that differ between their configs."""
        return summary(self.trials, metric=self.metric, mode=self.mode, directory=self.directory)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plot the metric along each training, and the trials with the best so far.

        Args:
            path: where to save the figure.

        Returns:
            The matplotlib figure.
        """
        return objective_figure(self.trials, metric=self.metric, mode=self.mode, path=path)

    def plot_parallel(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plot parallel coordinates: a line for each trial through its parameters to its best value.

        Args:
            path: where to save the figure.

        Returns:
            The matplotlib figure.
        """
        return parallel_figure(self.trials, metric=self.metric, mode=self.mode, path=path)

    def show(self) -> None:
        """Print the table and, if matplotlib is installed, save both figures in the sweep's directory."""
        print(printable(self.summary()))
        if not can_draw_figures():
            return
        for draw, name in ((self.plot, "objective.png"), (self.plot_parallel, "parallel.png")):
            draw(join(self.directory, name))

    def __len__(self) -> int:
        return len(self.trials)

    def __repr__(self) -> str:
        best = find_best_trial(self.trials, self.metric, self.mode)
        best_text = (
            "" if best is None else f", best {self.metric}={best.best(self.metric, self.mode):g} with {best.config}"
        )
        return f"SweepResult({len(self.trials)} trials, {len(self.errors)} failed{best_text})"


def summary(trials: Sequence[TrialRecord], *, metric: str, mode: Mode, directory: str = "", width: int = 0) -> str:
    """Return a table with a row for each trial, the best first, and notes below it.

    The columns are the parameters that differ between trials; the notes name those that do not. `width` is in
    characters; 0 stands for the terminal's.
    """
    ranked = sorted(trials, key=lambda trial: _rank(trial, metric, mode))
    parameters = list_varying_parameters(ranked)
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
                _format_duration(trial.history[-1].get("time_s") if trial.history else None),
                trial.status,
            ]
        )
    align = "l" + "r" * (len(header) - 2) + "l"
    header, rows, align, num_hidden = _drop_columns(header, rows, align, width or shutil.get_terminal_size().columns)
    lines = draw_table(header, rows, fitting_widths(header, rows), align=align)
    return "\n".join([*lines, *_list_notes(ranked, num_hidden=num_hidden, directory=directory)])


def _rank(trial: TrialRecord, metric: str, mode: Mode) -> float:
    best = trial.best(metric, mode)
    return math.inf if best is None else best if mode == "min" else -best


def _format_duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _drop_columns(
    header: list[str], rows: list[list[str]], align: str, width: int
) -> tuple[list[str], list[list[str]], str, int]:
    """Drop the last parameters as long as the table is too wide, and return how many were dropped."""
    num_hidden = 0
    num_after = len(header) - next(index for index, name in enumerate(header) if name.startswith("best "))
    while sum(fitting_widths(header, rows)) + len(header) + 1 > width and len(header) > num_after + 2:
        index = len(header) - num_after - 1
        header, rows = [*header[:index], *header[index + 1 :]], [[*row[:index], *row[index + 1 :]] for row in rows]
        align = align[:index] + align[index + 1 :]
        num_hidden += 1
    return header, rows, align, num_hidden


def _list_notes(ranked: Sequence[TrialRecord], *, num_hidden: int, directory: str) -> list[str]:
    notes = []
    if len(ranked) > _MAX_ROWS:
        notes.append(f"and {len(ranked) - _MAX_ROWS} more trials")
    if num_hidden:
        notes.append(f"and {num_hidden} more parameter{'s' if num_hidden > 1 else ''}")
    if same := find_common_values(ranked):
        notes.append("in all trials: " + ", ".join(f"{name}={format_value(value)}" for name, value in same.items()))
    for trial in ranked:
        if trial.error is not None:
            notes.append(f"trial {trial.id} failed: {trial.error.strip().splitlines()[-1]}")
    if directory:
        notes.append(f"tensorboard --logdir {directory}")
    return notes

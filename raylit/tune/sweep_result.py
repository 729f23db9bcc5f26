"""SweepResult: what a sweep has found. Driver."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from raylit.checkpoint import files
from raylit.errors import ConfigError
from raylit.module import LightningModule
from raylit.places import joined
from raylit.rebuild import load_weights
from raylit.tables import printable
from raylit.tune.records import Mode, TrialRecord, best_of
from raylit.tune.summary import summary
from raylit.tune.sweep_pictures import is_pictured, objective_figure, parallel_figure
from raylit.tune.trial_files import config_of


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
            draw(joined(self.directory, name))

    def __len__(self) -> int:
        return len(self.trials)

    def __repr__(self) -> str:
        best = best_of(self.trials, self.metric, self.mode)
        found = "" if best is None else f", best {self.metric}={best.best(self.metric, self.mode):g} with {best.config}"
        return f"SweepResult({len(self.trials)} trials, {len(self.errors)} failed{found})"

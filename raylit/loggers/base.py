"""Interface of loggers, the logger that writes nothing, and which checkpoints a logger uploads. Driver only."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raylit.storage import join, list_names


class Logger:
    """Base of all loggers: a destination of metrics in the driver. A worker never writes to it.

    Subclass it for a logger of your own: only `log_metrics` is required. With workers, the methods are called in a
    thread that writes while the workers continue, one call at a time and in order; with `num_workers=0` they are called
    directly. Hooks on a worker reach the logger's methods, also additional ones, and those of `experiment`, through
    `self.logger`.

    An OSError, or an exception of a library, means that the logger has failed: the run continues, with a warning for
    the first failure, and a fit raises LoggingError at its end.
    """

    @property
    def name(self) -> str | None:
        """Directory below the root directory; None if there is none."""
        return None

    @property
    def version(self) -> int | str | None:
        """The run's number or name among those of the same `name`; None if there is none."""
        return None

    @property
    def save_dir(self) -> str | None:
        """The root directory: the logger's own, else the Trainer's, set by `bind`."""
        return None

    @property
    def root_dir(self) -> str | None:
        """`save_dir/name`, the parent of the versions."""
        return None

    @property
    def log_dir(self) -> str | None:
        """`save_dir/name/version_N`; checkpoints are saved in it as well."""
        return None

    @property
    def experiment(self) -> Any:
        """The logging package's own object, for images, histograms and similar."""
        return None

    def bind(self, default_root_dir: str) -> None:
        """Use the Trainer's root directory if the logger has none. Called before anything else."""

    def run_dirs(self) -> list[str]:
        """Return the `log_dir` of every existing run below `root_dir`; only that of the version, if one was given."""
        return [] if self.root_dir is None else [join(self.root_dir, name) for name in list_names(self.root_dir)]

    def continue_run(self, name: str) -> None:
        """Log to the run of that name below `root_dir`, if it exists and no version was given."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars.

        Args:
            metrics: Values by name.
            step: Position on the x axis; None: the logger's own default.
        """
        raise NotImplementedError

    def log_hyperparams(self, params: Any) -> None:
        """Log hyper-parameters, a mapping or a Namespace."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """Log the model's graph, if the logger is configured to. Called when a fit starts."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """React to a save of a callback, such as ModelCheckpoint, whose attributes name the files."""

    def save(self) -> None:
        """Write everything logged so far, so that others can read it. Also called before a checkpoint is written."""

    def position(self) -> Any:
        """Return the end of the log after `save`, in plain values for a checkpoint; None if it is not known."""
        return None

    def resume(self, step: int, position: Any) -> None:
        """Remove what was logged after the checkpoint from which a run continues, because it will be logged again.

        Args:
            step: Number of optimizer steps at the checkpoint.
            position: The result of `position` at the checkpoint; None if it is not known.
        """

    def finalize(self, status: str) -> None:
        """React to the end of the run; `status` is "success", "failed" or "interrupted"."""


class DummyLogger(Logger):
    """Logger that replaces the others in a `fast_dev_run`; all methods, also those of `experiment`, do nothing."""

    @property
    def experiment(self) -> "_NullExperiment":
        return _NullExperiment()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    def __getattr__(self, name: str) -> "_NullExperiment":
        if name.startswith("__"):  # protocols such as copying and pickling
            raise AttributeError(name)
        return _NullExperiment()


class _NullExperiment:
    def __getattr__(self, name: str) -> "_NullExperiment":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFile:
    """A checkpoint file that a callback has saved."""

    path: str
    score: float | None
    is_best: bool
    is_last: bool


@dataclass(slots=True)
class SavedFiles:
    """Record of the checkpoint files that have been uploaded, with their modification times."""

    _times: dict[str, float] = field(default_factory=dict)

    def new(self, callback: Any) -> list[SavedFile]:
        """Return the callback's files that are new or changed since the last call, the oldest first."""
        scores = {str(path): float(score) for path, score in getattr(callback, "best_k_models", {}).items()}
        best, last = getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", "")
        times = {path: os.path.getmtime(path) for path in {*scores, best, last} if path and os.path.exists(path)}
        new = sorted((path for path in times if self._times.get(path) != times[path]), key=lambda path: times[path])
        self._times.update(times)
        return [
            SavedFile(path=path, score=scores.get(path), is_best=path == best, is_last=path == last) for path in new
        ]


def uploads_each_save(log_model: bool | str, callback: Any) -> bool:
    """Return whether files are uploaded when they are saved, instead of those that exist at the end."""
    return log_model == "all" or (log_model is True and getattr(callback, "save_top_k", 1) == -1)

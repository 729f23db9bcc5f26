"""The interface of loggers, and the logger that writes nothing."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from raylit.storage import entries, join


class Logger:
    """A destination of metrics. Lives in the driver; a worker never writes to it.

    Subclass it for one of your own: `log_metrics` is all that it must have. With workers, the methods are called in a
    thread that writes while the workers go on, one call at a time and in order; with `num_workers=0` at once. Hooks on
    a worker reach its methods, others of its own too, and those of `experiment` through `self.logger`.

    An OSError, or an exception of a library's own, says that the logger has failed: the run goes on, with a warning for
    the first one, and a fit raises LoggingError at its end.
    """

    @property
    def name(self) -> str | None:
        """Directory below the root directory, None where there is none."""
        return None

    @property
    def version(self) -> int | str | None:
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
        """`save_dir/name/version_N`; checkpoints go beside the log."""
        return None

    @property
    def experiment(self) -> Any:
        """What the logging package itself offers, for images, histograms and the like."""
        return None

    def bind(self, default_root_dir: str) -> None:
        """The Trainer's root directory, for a logger that was given none. Called before anything else."""

    def run_dirs(self) -> list[str]:
        """The `log_dir` of every run that there is below `root_dir`; of the given version alone, where one was."""
        return [] if self.root_dir is None else [join(self.root_dir, name) for name in entries(self.root_dir)]

    def continue_run(self, name: str) -> None:
        """Log to the run of that name below `root_dir`, if there is one and no version was given."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Scalars at a step of the x axis."""
        raise NotImplementedError

    def log_hyperparams(self, params: Any) -> None:
        """A mapping, or a Namespace."""

    def log_graph(self, model: Any, input_array: Any = None) -> None:
        """The model's graph, where the logger was asked for it. Called when a fit starts."""

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A callback, such as ModelCheckpoint, has saved; its attributes say what and where."""

    def save(self) -> None:
        """Bring everything logged so far to where others can read it. Also called before a checkpoint is written."""

    def position(self) -> Any:
        """Where the log ends after `save`, in plain values for a checkpoint; None: it cannot tell."""
        return None

    def resume(self, step: int, position: Any) -> None:
        """A run goes on from a checkpoint, after `step` optimizer steps: remove what was logged after it, which comes
        again. `position`: what that method returned when the checkpoint was taken, None where it is not known."""

    def finalize(self, status: str) -> None:
        """The run is over: "success", "failed" or "interrupted"."""


class DummyLogger(Logger):
    """Stands in for the loggers of a `fast_dev_run`; every method and every call on `experiment` returns None."""

    @property
    def experiment(self) -> "_Nothing":
        return _Nothing()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None: ...

    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):  # protocols that others ask for: copies, pickles, ...
            raise AttributeError(name)
        return _Nothing()


class _Nothing:
    def __getattr__(self, name: str) -> "_Nothing":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedFile:
    path: str
    score: float | None
    is_best: bool
    is_last: bool


@dataclass(slots=True)
class SavedFiles:
    """Remembers which files, as of when, have been taken."""

    _taken: dict[str, float] = field(default_factory=dict)

    def new(self, callback: Any) -> list[SavedFile]:
        """Those of a callback, the oldest first, that were not there, or were others, at the last call."""
        scores = {str(path): float(score) for path, score in getattr(callback, "best_k_models", {}).items()}
        best, last = getattr(callback, "best_model_path", ""), getattr(callback, "last_model_path", "")
        times = {path: os.path.getmtime(path) for path in {*scores, best, last} if path and os.path.exists(path)}
        new = sorted((path for path in times if self._taken.get(path) != times[path]), key=lambda path: times[path])
        self._taken.update(times)
        return [
            SavedFile(path=path, score=scores.get(path), is_best=path == best, is_last=path == last) for path in new
        ]


def is_after_each(log_model: bool | str, callback: Any) -> bool:
    """Whether files are taken when they are saved, rather than those that are left at the end."""
    return log_model == "all" or (log_model is True and getattr(callback, "save_top_k", 1) == -1)

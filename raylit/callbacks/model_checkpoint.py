"""ModelCheckpoint: decides when the run is saved, under which names, and which files are kept. Driver."""

import itertools
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from raylit.callbacks.base import DriverCallback, Run
from raylit.callbacks.timing import Clock, is_saved_at_epoch_end, is_validation_next
from raylit.checkpoint import files
from raylit.checkpoint.index import Publication, list_newest_first, recorded_paths
from raylit.errors import CheckpointError, ConfigError
from raylit.protocol.state import RunState
from raylit.storage import absolute, check_stays_below, is_inside, join, list_names

_log = logging.getLogger(__name__)

_AUTOMATIC_MONITORS = ("checkpoint_on", "val_loss")


class ModelCheckpoint(DriverCallback):
    """Driver callback that saves the run after epochs, validations, steps or a time, and keeps the best files.

    - Where: `dirpath`, else `checkpoints` in the run's log directory. `filename` fills in metrics, `epoch` and `step`
      (`{epoch}-{val_loss:.2f}`), with their names unless `auto_insert_metric_name=False`. An existing file is not
      overwritten but a version (`-v1`) added, unless `enable_version_counter=False`. A name that leads out of the
      directory is an error. Only files are removed that this run, or by the index one before it, has written.
    - When: every so many epochs (the default, 1), optimizer steps, or a `train_time_interval`; one of them. Epochs are
      saved at their end if validation runs once in every epoch, or never; otherwise after validation;
      `save_on_train_epoch_end` overrides this. A save by steps waits for a validation that is due at the same step, and
      for the first validation if the monitored metric does not exist yet.
    - What is kept: the `save_top_k` best by `monitor` (-1: all, 0: none); without one the latest. `save_last` keeps
      `last.ckpt` as well, as a file of its own or ("link") a link to the file saved last.
    - On Ctrl-C, SIGTERM and SIGHUP the run's current state is saved, as `last.ckpt` or else under the usual name. With
      `save_on_exception` also at an error; workers write the state in which a failed hook or step left them, on their
      own hosts.
    - A further fit of the same Trainer is a new run with its own best, last and newest files; those of the previous run
      stay on the disk. If the run ends inside an epoch, a metric of earlier weights does not rank the file.

    Args:
        dirpath: Directory or fsspec URL; None: `checkpoints` in the run's log directory.
        filename: Pattern of the file names; None: `{epoch}-{step}`.
        monitor: Metric by which files are ranked; None keeps the latest.
        verbose: Log each save at INFO instead of DEBUG level.
        save_last: Also keep `last.ckpt`: True as a file, "link" as a symbolic link.
        save_top_k: Number of files to keep; -1: all, 0: none. More than 1 needs `monitor`.
        save_on_exception: Also save when a hook or step raises.
        save_weights_only: Save weights and hyper-parameters only, without the state that resuming needs.
        mode: Whether the best metric is the "min" or the "max".
        auto_insert_metric_name: Put names before the values in file names.
        every_n_train_steps: Optimizer steps between two saves; None or 0: not by steps.
        train_time_interval: Time between two saves.
        every_n_epochs: Epochs between two saves; 0: not by epochs; None: 1 if no other schedule is given.
        save_on_train_epoch_end: Save at the end of epochs (True) or after validation (False).
        enable_version_counter: Add a version to a file name that exists, instead of overwriting the file.

    Raises:
        ConfigError: if a value, or a combination of values, cannot work; during a run, if the metric is still missing
            after validation.
    """

    CHECKPOINT_JOIN_CHAR = "-"
    CHECKPOINT_EQUALS_CHAR = "="
    CHECKPOINT_NAME_LAST = "last"
    FILE_EXTENSION = ".ckpt"
    STARTING_VERSION = 1

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        verbose: bool = False,
        save_last: bool | Literal["link"] | None = None,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        mode: Literal["min", "max"] = "min",
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
        enable_version_counter: bool = True,
    ) -> None:
        self.dirpath = None if dirpath is None else absolute(dirpath)
        self.filename = filename
        self.monitor = monitor
        self.verbose = verbose
        self.save_last = save_last
        self.save_top_k = save_top_k
        self.save_on_exception = save_on_exception
        self.save_weights_only = save_weights_only
        self.mode = mode
        self.auto_insert_metric_name = auto_insert_metric_name
        self._every_n_train_steps = every_n_train_steps or 0
        is_default = every_n_train_steps is None and train_time_interval is None and every_n_epochs is None
        self._every_n_epochs = 1 if is_default else every_n_epochs or 0
        self._train_time_interval = train_time_interval
        self._save_on_train_epoch_end = save_on_train_epoch_end
        self.first_version = self.STARTING_VERSION if enable_version_counter else None  # None: overwrite
        check_options(self, self._every_n_train_steps, self._every_n_epochs, train_time_interval)
        self.is_automatic = False
        self._derived_dirpath: str | None = None
        """The last run's directory, if the user has given none."""
        self._clock = Clock(train_time_interval)
        self._has_saved = False
        """True once an earlier run of the same Trainer has saved."""
        self.newest_model_path = ""
        self.reset_state()

    def reset_state(self) -> None:
        """Forget the files of earlier runs, which stay on the disk."""
        if self.dirpath == self._derived_dirpath:
            self.dirpath = None
        self._has_saved = self._has_saved or self.newest_model_path != ""
        self.best_model_path = self.last_model_path = self.newest_model_path = ""
        """`newest` is the file written last, for any reason, under the name that is kept."""
        self._best = TopK(count=self.save_top_k, mode=self.mode)
        self._current_score: float | None = None
        self._resumed_path = ""
        self._written: set[str] = set()
        """Paths that this run, or by the directory's index one before it, has written: no other file is removed."""
        self._linkable_path = ""
        self._unapplied_state: dict[str, Any] | None = None
        self._is_deferred = False
        self._has_warned = False
        self._step_saved = 0
        self._step_validated: int | None = None
        self._before = self._names_and_scores

    @classmethod
    def automatic(cls) -> Self:
        """Return the callback that the Trainer uses by default, which always keeps the latest checkpoint.

        Once `checkpoint_on`, else `val_loss`, is logged, the file with its lowest value is kept as well, as
        `best_model_path`.
        """
        callback = cls()
        callback.is_automatic = True
        return callback

    # Results for the user

    @property
    def best_model_score(self) -> Tensor | None:
        """The best file's score, 0-dim; None if there is none."""
        return _to_tensor(self._best.scores.get(self.best_model_path))

    @property
    def current_score(self) -> Tensor | None:
        """The score of the newest among the best files, 0-dim; None if there is none."""
        return _to_tensor(self._current_score)

    @property
    def best_k_models(self) -> dict[str, Tensor]:
        """The score of each file that is kept for it, 0-dim."""
        return {path: torch.tensor(score) for path, score in self._best.scores.items()}

    @property
    def kth_best_model_path(self) -> str:
        """The file that is removed next; empty while fewer than `save_top_k` are kept."""
        return self._best.next_removed

    @property
    def kth_value(self) -> Tensor:
        """The score of the file that is removed next, 0-dim; the worst possible one if there is none."""
        return torch.tensor(self._best.scores.get(self._best.next_removed, self._best.worst_score))

    def format_checkpoint_name(
        self, metrics: Mapping[str, Any], filename: str | None = None, ver: int | None = None, prefix: str | None = None
    ) -> str:
        """Return the path of a file for these metrics; a missing metric counts as 0."""
        return FilenamePattern.from_options(self, filename).path(metrics, prefix=prefix, version=ver)

    # When it saves

    def on_start(self, run: Run) -> None:
        if run.state.stage != "fit":
            return
        if self.dirpath is None:
            self.dirpath = self._derived_dirpath = join(absolute(run.log_dir), "checkpoints")
        if self._unapplied_state is not None:
            self.load_state_dict(self._unapplied_state)
            self._unapplied_state = None
        files.remove_abandoned(self.dirpath)
        is_own = self.is_automatic or self.newest_model_path or self._has_saved or run.plan.is_dev_run
        if not is_own and self.save_top_k != 0 and list_names(self.dirpath):
            warnings.warn(f"the checkpoint directory {self.dirpath} is not empty", stacklevel=2)

    def on_train_start(self, run: Run) -> None:
        self._step_saved = 0
        self._step_validated = None
        self._is_deferred = False
        self._clock.start(run.state.progress.global_step)

    def next_pause_step(self, run: Run) -> int | None:
        if run.plan.is_dev_run:
            return None
        step, interval = run.state.progress.global_step, self._every_n_train_steps
        return (step // interval + 1) * interval if interval else self._clock.next_step(step)

    def on_train_pause(self, run: Run) -> None:
        step, interval = run.state.progress.global_step, self._every_n_train_steps
        is_due = self._clock.is_due() or (interval > 0 and step % interval == 0)
        if not is_due or self._is_saved_or_unwanted(run):
            return
        is_awaited = self.monitor is not None and is_validation_next(run)
        self._save_or_defer(run, is_deferred=is_awaited or self._is_missing(run))

    def on_validation_end(self, run: Run) -> None:
        if run.state.is_sanity_checking:
            return
        self._step_validated = run.state.progress.global_step
        if self._is_saved_or_unwanted(run):
            return
        if self._is_deferred or self._clock.is_due():
            # The metric may be one that training logs at the end of the epoch.
            self._save_or_defer(run, is_deferred=self._is_missing(run))
        elif not is_saved_at_epoch_end(run, self._save_on_train_epoch_end):
            self._save(run, is_ranked=self._is_epoch_due(run))

    def on_train_epoch_end(self, run: Run) -> None:
        if self._is_saved_or_unwanted(run):
            return
        if self._is_deferred or self._clock.is_due():
            is_early = self._step_validated is None and run.state.has_validation
            self._save_or_defer(run, is_deferred=is_early and self._is_missing(run))
        elif self.is_automatic or is_saved_at_epoch_end(run, self._save_on_train_epoch_end):
            self._save(run, is_ranked=self._is_epoch_due(run) and not self._is_score_stale(run))

    def on_train_end(self, run: Run) -> None:
        if self.save_last and self._step_saved == 0 and not self._is_saved_or_unwanted(run):
            self._save(run, is_ranked=False)

    def on_interrupt(self, run: Run) -> None:
        if self._is_saved_or_unwanted(run) or (self.save_top_k == 0 and not self.save_last):
            return
        if self.monitor is None or self.save_last:
            self._save(run, is_ranked=self.monitor is None)
        else:  # not ranked among the best, because the metric belongs to earlier weights
            run.finish_saves()
            self._before = self._names_and_scores
            self._write(run, self._free_path(run, collect_fields(run.state)), [])

    def on_exception(self, run: Run, error: BaseException) -> None:
        if self.save_on_exception and isinstance(error, Exception) and run.state.stage == "fit":
            if run.is_idle:
                self.on_interrupt(run)
                run.finish_saves()
            elif self.dirpath:  # a worker may have written a file
                self.newest_model_path = next(list_newest_first(self.dirpath), self.newest_model_path)

    def on_save_end(self, run: Run, path: str, error: CheckpointError | None) -> None:
        if error is None:
            self._log_message(f"step {self._step_saved}: saved {path}")
            return
        *paths, self._best.scores, self._current_score, self._step_saved = self._before
        self.best_model_path, self.last_model_path, self.newest_model_path, self._linkable_path = paths

    # State

    @property
    def state_key(self) -> str:
        arguments = {
            "monitor": self.monitor,
            "mode": self.mode,
            "every_n_train_steps": self._every_n_train_steps,
            "every_n_epochs": self._every_n_epochs,
            "train_time_interval": self._train_time_interval,
        }
        return f"{type(self).__qualname__}{arguments!r}"

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": self.monitor,
            "best_model_score": self._best.scores.get(self.best_model_path),
            "best_model_path": self.best_model_path,
            "current_score": self._current_score,
            "dirpath": self.dirpath,
            "best_k_models": dict(self._best.scores),
            "kth_best_model_path": self.kth_best_model_path,
            "kth_value": self.kth_value.item(),
            "last_model_path": self.last_model_path,
            "newest_model_path": self.newest_model_path,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything if the directory is still the same, else the best file's path alone.

        Before `on_start` has determined the directory the state is stored until then.
        """
        if self.dirpath is None:
            self._unapplied_state = state_dict
            return
        directory = state_dict.get("dirpath", self.dirpath)
        state_dict = drop_foreign_paths(state_dict, directory)
        if directory == self.dirpath:
            self._written |= recorded_paths(self.dirpath)
            self._best.scores = {path: float(score) for path, score in state_dict.get("best_k_models", {}).items()}
            self.last_model_path = state_dict.get("last_model_path", "")
            self.newest_model_path = self._resumed_path = state_dict.get("newest_model_path", "")
        else:
            warnings.warn(describe_moved_directory(directory, self.dirpath), stacklevel=2)
        self.best_model_path = state_dict["best_model_path"] or self._best.best

    # Helpers, in the order in which they are called

    def _is_saved_or_unwanted(self, run: Run) -> bool:
        state = run.state
        is_unwanted = run.plan.is_dev_run or state.stage != "fit" or state.is_sanity_checking
        return is_unwanted or self._step_saved == state.progress.global_step

    def _is_missing(self, run: Run) -> bool:
        return self.monitor is not None and self.monitor not in collect_fields(run.state)

    def _is_score_stale(self, run: Run) -> bool:
        """Return whether the run ends inside an epoch with a metric that belongs to earlier weights."""
        return self.monitor is not None and run.state.is_epoch_cut_short and run.state.is_stale(self.monitor)

    def _save_or_defer(self, run: Run, *, is_deferred: bool) -> None:
        self._is_deferred = is_deferred
        if not is_deferred:
            self._save(run)

    def _is_epoch_due(self, run: Run) -> bool:
        return self._every_n_epochs > 0 and (run.state.progress.epoch + 1) % self._every_n_epochs == 0

    def _save(self, run: Run, *, is_ranked: bool = True) -> None:
        """Save what is due; files that lost their place are removed once the new file is written."""
        run.finish_saves(is_earlier_only=True)  # what is due depends on whether the previous save succeeded
        self._before = self._names_and_scores
        metrics = collect_fields(run.state)
        path, losers, more = "", [self.last_model_path], list[str]()
        if self.save_last:  # named before writing, because the name is part of the callback's saved state
            last = self.last_model_path
            self.last_model_path = self._free_path(run, metrics, self.CHECKPOINT_NAME_LAST, reusable=last)
        if self.is_automatic:
            path, more = self._place_automatically(run, metrics)
        elif is_ranked and self.save_top_k != 0:
            path, more = (self._place_latest if self.monitor is None else self._place_if_good)(run, metrics)
        if path:
            self._write(run, path, losers + more)
        elif self.save_last and not self._is_linked():
            self._write(run, self.last_model_path, losers)

    def _place_latest(self, run: Run, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
        """Return the path to write to, and the paths of the files to remove afterwards."""
        previous = self.best_model_path
        self.best_model_path = self._free_path(run, metrics, reusable=previous)
        return self.best_model_path, [previous] if self.save_top_k == 1 else []

    def _place_if_good(self, run: Run, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
        """Return the same two as `_place_latest`; an empty path if the score is not good enough."""
        assert self.monitor is not None
        if self.monitor not in metrics:
            self._handle_missing_metric(sorted(metrics))
            return "", []
        score = metrics[self.monitor]
        if not self._best.admits(score):
            self._log_message(f"{self.monitor}={score:g} is not among the best {self.save_top_k}")
            return "", []
        path = self._free_path(run, metrics, reusable=self._best.next_removed)
        losers = self._best.make_room()
        self._rank(path, score)
        return path, losers

    def _place_automatically(self, run: Run, metrics: Mapping[str, float]) -> tuple[str, list[str]]:
        """Return the same two as `_place_latest` for the default callback, and rank the file if its score is new."""
        losers = [self.newest_model_path]
        path = self._free_path(run, metrics)
        monitor = next((name for name in _AUTOMATIC_MONITORS if name in metrics), "")
        is_stale = run.state.is_epoch_cut_short and run.state.is_stale(monitor)
        score = None if is_stale else metrics.get(monitor)
        # A score of earlier weights has been ranked before, and is not better than itself.
        if score is not None and self._best.admits(score):
            losers += self._best.make_room()
            self._rank(path, score)
        elif not self._best.scores:
            self.best_model_path = path
        return path, losers

    def _handle_missing_metric(self, names: list[str]) -> None:
        message = describe_missing_metric(self.monitor, names)
        if self._step_validated is not None:
            raise ConfigError(message)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{message}. Nothing is saved until then", stacklevel=2)

    def _rank(self, path: str, score: float) -> None:
        self._best.add(path, score)
        self._current_score = self._best.scores[path]
        self.best_model_path = self._best.best

    def _write(self, run: Run, path: str, losers: list[str]) -> None:
        # Set before writing, because it is part of the callback's saved state.
        self.newest_model_path = self.last_model_path if self.save_last is True else path
        if path != self.last_model_path:
            self._linkable_path = path
        self._step_saved = run.state.progress.global_step
        self._written |= {path, self.last_model_path}
        then = Publication(
            path=path,
            directory=self.dirpath or "",
            progress=run.state.progress,
            score=self._best.scores.get(path),
            is_weights_only=self.save_weights_only,
            last=self.last_model_path if self.save_last else "",
            is_last_linked=self.save_last == "link",
            best=self.best_model_path,
            outdated=[other for other in dict.fromkeys(losers) if other != path and self._is_removable(other)],
        )
        run.save_checkpoint(path, is_weights_only=self.save_weights_only, then=then)

    @property
    def _names_and_scores(self) -> tuple[Any, ...]:
        """The attributes that are restored if a save fails."""
        paths = (self.best_model_path, self.last_model_path, self.newest_model_path, self._linkable_path)
        return (*paths, dict(self._best.scores), self._current_score, self._step_saved)

    def _is_linked(self) -> bool:
        path = self._linkable_path
        return self.save_last == "link" and path != "" and files.link(path, self.last_model_path)

    def _free_path(self, run: Run, metrics: Mapping[str, float], filename: str = "", *, reusable: str = "") -> str:
        """Return the file's path, with the first version that no file has yet; `reusable` may be overwritten."""
        names = partial(self.format_checkpoint_name, metrics, filename)
        return find_free_path(names, self.first_version, reusable=reusable, is_taken=run.is_saving_to)

    def _is_removable(self, path: str) -> bool:
        """Return whether the file may be removed.

        This run or its predecessor wrote it, in this directory, it has no other use, and the run was not resumed from
        it.
        """
        is_kept = path in (self.best_model_path, self.last_model_path, self._resumed_path, *self._best.scores)
        return path != "" and path in self._written and not is_kept and is_inside(path, self.dirpath or "")

    def _log_message(self, message: str) -> None:
        _log.log(logging.INFO if self.verbose else logging.DEBUG, message)


def check_options(callback: Any, every_n_train_steps: int, every_n_epochs: int, interval: timedelta | None) -> None:
    """Check the callback's public attributes and its schedule.

    Raises:
        ConfigError: if a value, or a combination of values, cannot work.
    """
    monitor, mode, save_top_k, save_last = callback.monitor, callback.mode, callback.save_top_k, callback.save_last
    num_schedules = (every_n_train_steps > 0) + (every_n_epochs > 0) + (interval is not None)
    for is_wrong, message in (
        (mode not in ("min", "max"), f"mode={mode!r}: must be 'min' or 'max'"),
        (save_top_k < -1, f"save_top_k={save_top_k}: must be -1 (all), 0 (none) or a count"),
        (
            not isinstance(callback.save_on_exception, bool),
            f"save_on_exception={callback.save_on_exception!r}: True or False",
        ),
        (save_last not in (None, True, False, "link"), f"save_last={save_last!r}: allowed: True, 'link'"),
        (every_n_train_steps < 0, f"every_n_train_steps={every_n_train_steps}: must be at least 0"),
        (every_n_epochs < 0, f"every_n_epochs={every_n_epochs}: must be at least 0"),
        (num_schedules > 1, "give one of every_n_train_steps, every_n_epochs and train_time_interval"),
        (monitor is None and save_top_k > 1, f"save_top_k={save_top_k}: best by what? Give monitor"),
    ):
        if is_wrong:
            raise ConfigError(f"ModelCheckpoint: {message}")
    for filename in (None, callback.CHECKPOINT_NAME_LAST):
        FilenamePattern.from_options(callback, filename).path({})  # raises here rather than at the first save


def describe_missing_metric(monitor: str | None, names: list[str]) -> str:
    """Return the error message for a monitored metric that has not been logged."""
    return (
        f"ModelCheckpoint(monitor={monitor!r}): no such metric has been logged; there are: {', '.join(names)}. Log it "
        "with self.log, or monitor one of these"
    )


def describe_moved_directory(before: str, now: str) -> str:
    """Return the warning for a resumed run whose checkpoint directory has changed."""
    return (
        f"checkpoints go to {now}, those of the resumed run went to {before}: its best_model_path is taken over, its "
        "other files and scores are not"
    )


def drop_foreign_paths(state: Mapping[str, Any], directory: Any) -> dict[str, Any]:
    """Return a ModelCheckpoint's saved state without the paths that are outside its own directory.

    The checkpoint may come from an untrusted source, and the files that the state calls best or last are read,
    overwritten and removed.
    """

    def is_own(path: object) -> bool:
        return isinstance(path, str) and isinstance(directory, str) and is_inside(path, directory)

    saved_paths = {key: state.get(key, "") for key in ("best_model_path", "last_model_path", "newest_model_path")}
    ranked = state.get("best_k_models", {})
    ranked = ranked if isinstance(ranked, dict) else {}
    paths = [*saved_paths.values(), *ranked]
    if foreign := list(dict.fromkeys(str(path) for path in paths if path not in ("", None) and not is_own(path))):
        warnings.warn(
            f"the checkpoint's ModelCheckpoint names files outside of its directory {directory}, which are left alone: "
            f"{', '.join(foreign[:3])}",
            stacklevel=3,
        )
    own_paths = {key: path if is_own(path) else "" for key, path in saved_paths.items()}
    return {**state, **own_paths, "best_k_models": {path: score for path, score in ranked.items() if is_own(path)}}


def _to_tensor(score: float | None) -> Tensor | None:
    return None if score is None else torch.tensor(score)


_FIELD = re.compile(r"\{([^{}:]*)(?::([^{}]*))?\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class FilenamePattern:
    """Pattern for the names of a directory's checkpoint files."""

    directory: str
    pattern: str
    equals: str | None
    """Passed to `fill_pattern`."""
    join_char: str
    extension: str

    @classmethod
    def from_options(cls, callback: Any, filename: str | None = None, *, directory: str = "") -> Self:
        """Return a ModelCheckpoint's pattern; `directory` is used if the callback has no `dirpath` yet."""
        return cls(
            directory=callback.dirpath or directory,
            pattern=filename or callback.filename or f"{{epoch}}{callback.CHECKPOINT_JOIN_CHAR}{{step}}",
            equals=callback.CHECKPOINT_EQUALS_CHAR if callback.auto_insert_metric_name else None,
            join_char=callback.CHECKPOINT_JOIN_CHAR,
            extension=callback.FILE_EXTENSION,
        )

    @property
    def contains_step(self) -> bool:
        """Return whether each optimizer step gets a file name of its own."""
        return "{step" in self.pattern

    def path(self, metrics: Mapping[str, Any], version: int | None = None, prefix: str | None = None) -> str:
        """Return the path for these metrics; a missing metric counts as 0.

        Raises:
            ConfigError: if a format spec does not fit, or the name leads out of the directory.
        """
        parts = [
            prefix,
            fill_pattern(self.pattern, metrics, equals=self.equals),
            None if version is None else f"v{version}",
        ]
        name = self.join_char.join(part for part in parts if part is not None) + self.extension
        check_stays_below(name, f"the checkpoint's file name {name!r}, of the pattern {self.pattern!r},")
        return join(self.directory, name)


def find_free_path(
    path_of: Callable[[int | None], str],
    first_version: int | None,
    *,
    reusable: str = "",
    is_taken: Callable[[str], bool] = lambda path: False,
) -> str:
    """Return the first path, without or with a version, that no file has and that is not taken otherwise.

    `reusable` may be overwritten. Without a `first_version` existing files are overwritten.
    """
    path = path_of(None)
    for version in () if first_version is None else itertools.count(first_version):
        if path == reusable or not (is_taken(path) or files.exists(path)):
            break
        path = path_of(version)
    return path


def fill_pattern(pattern: str, metrics: Mapping[str, Any], *, equals: str | None) -> str:
    """Return the pattern with each `{name}` or `{name:spec}` filled in; a missing metric counts as 0.

    With `equals` ("=") the metric's name is put in front: `{epoch:02}` becomes `epoch=07`.

    Raises:
        ConfigError: if a format spec does not fit.
    """

    def format_field(match: re.Match[str]) -> str:
        name, spec = match[1], match[2] or ""
        try:
            value = format(metrics.get(name, 0), spec)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the checkpoint's file name {pattern!r}: {match[0]} does not fit: {error}") from error
        return value if equals is None else f"{name}{equals}{value}"

    return _FIELD.sub(format_field, pattern)


def collect_fields(state: RunState) -> dict[str, float]:
    """Return the values that a file name or `monitor` may refer to; a logged `epoch` or `step` wins over the run's."""
    metrics = dict(state.callback_metrics)
    metrics["epoch"] = int(metrics.get("epoch", state.progress.epoch))
    metrics["step"] = int(metrics.get("step", state.progress.global_step))
    return metrics


class TopK:
    """Ranking of at most `count` paths (-1: any number) by score; the earlier one wins a tie. Touches no file."""

    def __init__(self, *, count: int, mode: Literal["min", "max"]) -> None:
        self.scores: dict[str, float] = {}
        self.worst_score = math.inf if mode == "min" else -math.inf
        self._capacity = math.inf if count == -1 else count
        self._sign = 1 if mode == "min" else -1

    @property
    def best(self) -> str:
        """The path with the best score; empty if there is none."""
        return min(self.scores, key=self._rank, default="")

    @property
    def next_removed(self) -> str:
        """The path with the worst score, which the next one replaces; empty while fewer than `count` are kept."""
        return "" if len(self.scores) < self._capacity else max(self.scores, key=self._rank, default="")

    def admits(self, score: float) -> bool:
        """Return whether a path with this score would be kept.

        A path with an equal score counts as better, because it came first.
        """
        rank = self._sign * self._number(score)
        return sum(self._rank(path) <= rank for path in self.scores) < self._capacity

    def make_room(self) -> list[str]:
        """Remove and return the paths that must go before another is added."""
        removed = []
        while path := self.next_removed:
            del self.scores[path]
            removed.append(path)
        return removed

    def add(self, path: str, score: float) -> None:
        """Add a path with its score."""
        self.scores[path] = self._number(score)

    def _number(self, score: float) -> float:
        """Return the score, with NaN replaced by the worst score, so that any number is better."""
        return self.worst_score if math.isnan(score) else score

    def _rank(self, path: str) -> float:
        return self._sign * self.scores[path]

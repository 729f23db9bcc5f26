"""Interface of loggers, the base of those that write files, and the logger that writes nothing. Driver only."""

import os
from argparse import Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from raylit.errors import ConfigError
from raylit.storage import check_stays_below, is_url, join, list_names, make_directory, write_text


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


class FileLogger(Logger):
    """Base of loggers with a directory of their own, which contains an `hparams.yaml`.

    The directory is created when it is first needed; without a given version the next free number is chosen then.

    Args:
        save_dir: Root directory or fsspec URL; None: the Trainer's.
        name: Directory below `save_dir`.
        version: Number or name of the version; None: the next free number.
        prefix: Put before every metric's name, with a hyphen.
        sub_dir: Directory below the version.

    Raises:
        ConfigError: if a name leads out of `save_dir`.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None,
        name: str | None,
        version: int | str | None,
        prefix: str,
        sub_dir: str | None = None,
    ) -> None:
        for option, part in (("name", name), ("version", version), ("sub_dir", sub_dir)):
            if isinstance(part, str):
                check_stays_below(part, f"{type(self).__name__}({option}={part!r})")
        self._save_dir = None if save_dir is None else _expand_path(save_dir)
        self._name = name or ""
        self._version = version
        self._prefix = prefix
        self._sub_dir = sub_dir or ""
        self._log_dir: str | None = None
        self._hparams: dict[str, Any] = {}

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str:
        if self._version is None:
            self._version = _claim_next_version(self.root_dir)
        return self._version

    @property
    def save_dir(self) -> str | None:
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """`save_dir/name`, the parent of the versions."""
        if self._save_dir is None:
            raise ConfigError(
                f"{type(self).__name__}(save_dir=None) takes the Trainer's root directory, but belongs to no Trainer:"
                " give it a save_dir, or use it once the Trainer has it"
            )
        return join(self._save_dir, self._name).rstrip("/")

    @property
    def log_dir(self) -> str:
        if self._log_dir is None:
            log_dir = self._build_path(_name_directory(self.version))
            make_directory(log_dir)
            self._log_dir = log_dir
        return self._log_dir

    def run_dirs(self) -> list[str]:
        names = list_names(self.root_dir) if self._version is None else [_name_directory(self._version)]
        return [self._build_path(name) for name in names]

    def continue_run(self, name: str) -> None:
        if self._version is None and name in list_names(self.root_dir):
            number = name.removeprefix("version_")
            self._version = int(number) if name != number and number.isdecimal() else name

    def bind(self, default_root_dir: str) -> None:
        if self._save_dir is None:
            self._save_dir = _expand_path(default_root_dir)

    @property
    def has_log_dir(self) -> bool:
        """True if the version is chosen."""
        return self._version is not None

    def _is_own(self, position: Any) -> bool:
        """Return whether the position belongs to this logger's directory."""
        return isinstance(position, Mapping) and position.get("log_dir") == self.log_dir

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        # Imported here so that importing raylit does not import yaml.
        import yaml

        self._hparams.update(vars(params) if isinstance(params, Namespace) else params)
        text = yaml.safe_dump(plain(self._hparams), sort_keys=False, allow_unicode=True)
        write_text(text, join(self.log_dir, "hparams.yaml"))

    def _build_path(self, version: str) -> str:
        return join(self.root_dir, version, self._sub_dir).rstrip("/")

    def _convert_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: float(value) for name, value in self._add_prefix(metrics).items()}

    def _add_prefix(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        start = f"{self._prefix}-" if self._prefix else ""
        return {start + name: value for name, value in metrics.items()}


def is_repeated(step: int | None, names: Collection[str], *, limit: int, others: Collection[str]) -> bool:
    """Return whether an entry after a checkpoint will be logged again when the run continues.

    False for the results of a test after the run's end: these are at step `limit`, at which the continued run logs
    next, under names that are not among `others`, the names of other steps.
    """
    return step != limit or any(name in others for name in names)


def _expand_path(path: str | os.PathLike[str]) -> str:
    return os.fspath(path) if is_url(path) else os.path.expanduser(os.path.expandvars(os.fspath(path)))


def plain(value: Any) -> Any:
    """Convert a value to YAML's own types: foreign numbers to Python's, anything else to its repr."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return repr(value)


def _name_directory(version: int | str) -> str:
    return version if isinstance(version, str) else f"version_{version}"


def _claim_next_version(root_dir: str) -> int:
    """Create `version_N` for the lowest N above all that exist.

    mkdir decides between processes that start at the same time: it fails for all but one of them. Object stores have no
    such operation.
    """
    make_directory(root_dir)
    numbers = [name.removeprefix("version_") for name in list_names(root_dir) if name.startswith("version_")]
    version = max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1
    if is_url(root_dir):
        return version
    while True:
        try:
            os.mkdir(os.path.join(root_dir, f"version_{version}"))
        except FileExistsError:
            version += 1
        else:
            return version

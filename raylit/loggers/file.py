"""FileLogger: what loggers that write into `save_dir/name/version_N` have in common. Driver only."""

import os
from argparse import Namespace
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

from raylit.errors import ConfigError
from raylit.loggers.base import Logger
from raylit.storage import check_stays_below, entries, is_url, join, make_directory, write_text


class FileLogger(Logger):
    """A logger with a directory of its own, and an `hparams.yaml` in it.

    The directory is made when it is first needed; a version that was not given becomes the next free number then.
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
        self._save_dir = None if save_dir is None else _expanded(save_dir)
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
            log_dir = self._dir_of(_directory_name(self.version))
            make_directory(log_dir)
            self._log_dir = log_dir
        return self._log_dir

    def run_dirs(self) -> list[str]:
        names = entries(self.root_dir) if self._version is None else [_directory_name(self._version)]
        return [self._dir_of(name) for name in names]

    def continue_run(self, name: str) -> None:
        if self._version is None and name in entries(self.root_dir):
            number = name.removeprefix("version_")
            self._version = int(number) if name != number and number.isdecimal() else name

    def bind(self, default_root_dir: str) -> None:
        if self._save_dir is None:
            self._save_dir = _expanded(default_root_dir)

    @property
    def has_log_dir(self) -> bool:
        """Its version is chosen."""
        return self._version is not None

    def _is_own(self, position: Any) -> bool:
        """The position is one in this logger's directory."""
        return isinstance(position, Mapping) and position.get("log_dir") == self.log_dir

    def log_hyperparams(self, params: Mapping[str, Any] | Namespace) -> None:
        # Only when there is something to write: importing raylit should not cost the import of yaml.
        import yaml

        self._hparams.update(vars(params) if isinstance(params, Namespace) else params)
        text = yaml.safe_dump(plain(self._hparams), sort_keys=False, allow_unicode=True)
        write_text(text, join(self.log_dir, "hparams.yaml"))

    def _dir_of(self, version: str) -> str:
        return join(self.root_dir, version, self._sub_dir).rstrip("/")

    def _prefixed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        return {name: float(value) for name, value in self._named(metrics).items()}

    def _named(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        start = f"{self._prefix}-" if self._prefix else ""
        return {start + name: value for name, value in metrics.items()}


def is_past(step: int | None, names: Collection[str], *, limit: int, others: Collection[str]) -> bool:
    """An entry after a checkpoint comes again when the run goes on; `limit`: the step of its next entries. Not the
    results of a test after the run's end: they stand at that step, under names that are among no `others`, which are
    those of other steps."""
    return step != limit or any(name in others for name in names)


def _expanded(path: str | os.PathLike[str]) -> str:
    return os.fspath(path) if is_url(path) else os.path.expanduser(os.path.expandvars(os.fspath(path)))


def plain(value: Any) -> Any:
    """The value in YAML's own types: numbers of other libraries become Python's, anything else its repr."""
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


def _directory_name(version: int | str) -> str:
    return version if isinstance(version, str) else f"version_{version}"


def _claim_next_version(root_dir: str) -> int:
    """Makes `version_N` for the lowest N above all that exist.

    mkdir decides between processes that start at once: it fails for all but one of them. A store of objects has no such
    thing.
    """
    make_directory(root_dir)
    numbers = [name.removeprefix("version_") for name in entries(root_dir) if name.startswith("version_")]
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

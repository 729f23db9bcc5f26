"""Hyper-parameters: read from constructors, saved in checkpoints, used to rebuild modules. Driver and workers."""

import csv
import dataclasses
import inspect
import os
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, get_type_hints

from torch import Tensor, nn

from raylit.checkpoint import files, format
from raylit.errors import CheckpointError


class AttributeDict(dict[str, Any]):
    """Dict whose string keys can be read and written as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyper-parameter {name!r}; there are: {', '.join(self) or 'none'}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        return "\n".join(f"{name!r}: {value!r}" for name, value in self.items())


class HyperparametersMixin:
    """Hyper-parameters of a module or a data module: `save_hyperparameters`, and access to what it has kept."""

    # Annotated as Any, because torch.jit.script would try to compile a narrower type.
    _hparams: Any = None
    _hparams_initial: Any = None
    _hparams_name: str = "kwargs"
    _is_logging_hparams: bool = True

    def save_hyperparameters(
        self,
        *names: Any,
        ignore: str | Iterable[str] | None = None,
        frame: FrameType | None = None,
        logger: bool = True,
    ) -> None:
        """Keep the constructor's arguments in `hparams`, in checkpoints and in the loggers.

        Args:
            *names: Names of the arguments to keep, or one dict, Namespace or dataclass; none: all arguments.
            ignore: Names of arguments to leave out.
            frame: The constructor's frame, if this is called elsewhere.
            logger: Send them to the loggers.
        """
        current = inspect.currentframe()
        frame = frame or (current.f_back if current is not None else None)
        assert frame is not None
        ignored = [ignore] if isinstance(ignore, str) else ignore or ()
        values, self._hparams_name = select_hyperparameters(names, read_init_arguments(self, frame), ignored)
        self.hparams.update(values)
        self._hparams_initial = copy_hyperparameters(self.hparams)
        self._is_logging_hparams = logger

    @property
    def hparams(self) -> AttributeDict:
        """The hyper-parameters, which may be changed; checkpoints store them as they are at the time of the save."""
        if self._hparams is None:
            self._hparams = AttributeDict()
        hparams: AttributeDict = self._hparams
        return hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of `hparams` as they were at `save_hyperparameters`."""
        return copy_hyperparameters(self._hparams_initial or {})

    def find_hparams(self) -> AttributeDict | None:
        """Return `hparams`, or None if there are none."""
        hparams: AttributeDict | None = self._hparams
        return hparams or None

    def find_hparams_argument(self) -> str:
        """Return the constructor's argument that holds all `hparams`; "kwargs": each is an argument of its own."""
        return self._hparams_name

    def find_logged_hparams(self) -> dict[str, Any]:
        """Return the hyper-parameters for the loggers: none after `save_hyperparameters(logger=False)`."""
        return dict(self._hparams or {}) if self._is_logging_hparams else {}


def flatten(values: Mapping[Any, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield names and values of nested mappings, with the names joined by "/"."""
    for key, value in values.items():
        name = f"{parent}/{key}" if parent else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        else:
            yield name, value


def read_init_arguments(owner: object, frame: FrameType) -> dict[str, Any]:
    """Return the arguments of `owner`'s constructor call, read from the `__init__` frames; a subclass's win."""
    if dataclasses.is_dataclass(owner):
        return {field.name: getattr(owner, field.name) for field in dataclasses.fields(owner) if field.init}
    arguments: dict[str, Any] = {}
    current: FrameType | None = frame
    while current is not None and current.f_code.co_name == "__init__":
        info = inspect.getargvalues(current)
        if not info.args or info.locals.get(info.args[0]) is not owner:
            break
        arguments.update({name: info.locals[name] for name in info.args[1:]})
        if info.keywords is not None:
            arguments.update(info.locals[info.keywords])
        current = current.f_back
    return arguments


def select_hyperparameters(
    selection: tuple[Any, ...], arguments: Mapping[str, Any], ignore: Iterable[str]
) -> tuple[dict[str, Any], str]:
    """Return the values that `save_hyperparameters(*given, ignore=)` keeps, and the name of their argument.

    The name is "kwargs" if each entry is an argument of its own, else that of the argument that contains them all.

    Raises:
        TypeError: if several values other than names are given.
    """
    ignored = set(ignore)
    if not selection:
        return {name: value for name, value in arguments.items() if name not in ignored}, "kwargs"
    if all(isinstance(name, str) for name in selection):
        return {name: arguments[name] for name in selection if name not in ignored}, "kwargs"
    if len(selection) > 1:
        raise TypeError("save_hyperparameters takes names of arguments, or one dict, Namespace or dataclass")
    holder = selection[0]
    name = next((name for name, value in arguments.items() if value is holder), "kwargs")
    values = _read_entries(holder)
    return {key: value for key, value in values.items() if key not in ignored}, name


def copy_hyperparameters(hparams: Mapping[str, Any]) -> AttributeDict:
    """Copy the hyper-parameters, so that later changes, also of lists and dicts in them, do not affect the copy."""
    return AttributeDict({name: _copy_value(value) for name, value in hparams.items()})


_Owner = TypeVar("_Owner")


def constructor_arguments(
    cls: type, hparams: Mapping[str, Any], name: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the keyword arguments that rebuild an instance of `cls` from saved hyper-parameters; `overrides` win.

    The file may come from an untrusted source. Names that begin with an underscore are passed to parameters of that
    name only, because constructors with `**kwargs` may pass them to code that acts on them.
    """
    parameters = inspect.signature(cls).parameters
    if _accepts(name, parameters) and name != "kwargs" and name not in overrides:
        # `overrides` may also name single entries of the argument that contains the hyper-parameters.
        entries = {**hparams, **{key: value for key, value in overrides.items() if key not in parameters}}
        return {name: _build_holder(cls, name, entries), **{k: v for k, v in overrides.items() if k in parameters}}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {**{key: value for key, value in hparams.items() if _accepts(key, parameters)}, **overrides}
    return {**{key: value for key, value in hparams.items() if key in parameters}, **overrides}


def read_for_rebuild(
    path: str | Path, *, hparams_file: str | Path | None, overrides: Mapping[str, Any], allow_pickle: bool
) -> dict[str, Any]:
    """Read a checkpoint and unpack its hyper-parameters; those of `hparams_file` replace the module's.

    Raises:
        CheckpointError: if a file cannot be read, or hyper-parameters are pickled without `allow_pickle`.
    """
    checkpoint = files.read(path, allow_pickle=allow_pickle)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        saved = checkpoint.get(key, {})
        if not isinstance(saved, dict):
            raise CheckpointError(f"{path} holds {key} of type {type(saved).__name__}: must be a dict")
        # Overridden values need not be readable.
        packed = {name: value for name, value in saved.items() if name not in overrides}
        checkpoint[key] = format.unpack_hyper_parameters(packed, allow_pickle=allow_pickle)
    if hparams_file is not None:
        checkpoint["hyper_parameters"] = read_hyperparameters(Path(hparams_file))
    return checkpoint


def rebuild(
    cls: type[_Owner], hparams: Mapping[str, Any], name: str, *, overrides: Mapping[str, Any], source: str
) -> _Owner:
    """Build an instance from saved hyper-parameters; `overrides` win.

    Raises:
        CheckpointError: if an argument is missing.
    """
    try:
        return cls(**constructor_arguments(cls, hparams, name, overrides))
    except TypeError as error:
        raise CheckpointError(
            f"{cls.__name__} cannot be rebuilt from {source}: {error}. It holds the hyper-parameters "
            f"{sorted(map(str, hparams))}; call self.save_hyperparameters() in __init__, or pass what is missing here"
        ) from error


def read_hyperparameters(file: Path) -> dict[str, Any]:
    """Read hyper-parameters from a YAML file, or a CSV file with the columns key and value.

    Raises:
        CheckpointError: if the file is missing or cannot be read.
    """
    if not file.is_file():
        raise CheckpointError(f"hparams_file={os.fspath(file)!r}: there is no such file")
    # Imported here so that importing raylit does not import yaml.
    import yaml

    with open(file, encoding="utf-8", newline="") as stream:
        try:
            if file.suffix in (".yaml", ".yml"):
                values = yaml.safe_load(stream) or {}
            elif file.suffix == ".csv":
                values = {row["key"]: yaml.safe_load(row["value"]) for row in csv.DictReader(stream)}
            else:
                raise CheckpointError(f"hparams_file={os.fspath(file)!r}: must be a .yaml or a .csv file")
        except (yaml.YAMLError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"hparams_file={os.fspath(file)!r} cannot be read: {error}. It must hold plain values, of which no "
                "Python objects are made; a CSV file has the columns key and value"
            ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"hparams_file={os.fspath(file)!r} holds no hyper-parameters by name")
    return values


def load_weights(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: str, strict: bool = True) -> None:
    """Load a state dict into the module's own tensors.

    Raises:
        CheckpointError: with the first keys that do not fit.
    """
    check_weights(module, state_dict, source=source, strict=strict)
    module.load_state_dict(state_dict, strict=strict)


def check_weights(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: str, strict: bool = True) -> None:
    """Check that a state dict fits the module; with `strict` also that no keys are missing or unexpected.

    Raises:
        CheckpointError: with the first keys that do not fit.
    """
    own_state = module.state_dict()
    missing = [key for key in own_state if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own_state]
    other_shape = [
        f"{key} ({tuple(value.shape)} instead of {tuple(own_state[key].shape)})"
        for key, value in state_dict.items()
        if key in own_state
        and not nn.parameter.is_lazy(own_state[key])
        and _read_shape(value) != _read_shape(own_state[key])
    ]
    if other_shape or (strict and (missing or unexpected)):
        wrong = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
        raise CheckpointError(
            f"{source} is not a checkpoint of this {type(module).__name__}: "
            + ", ".join(f"{what} {_format_first(keys)}" for what, keys in wrong.items() if keys)
        )


def _accepts(name: object, parameters: Mapping[str, inspect.Parameter]) -> bool:
    return isinstance(name, str) and (name in parameters or not name.startswith("_"))


def _read_entries(holder: Any) -> dict[str, Any]:
    if isinstance(holder, Namespace):
        return vars(holder)
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        return {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    return dict(holder)


def _copy_value(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copy_value(item) for key, item in value.items()}
    return type(value)(map(_copy_value, value)) if type(value) in (list, tuple, set) else value


def _build_holder(cls: type, name: str, entries: dict[str, Any]) -> Any:
    """Return the entries in the constructor's annotated type, if that is a Namespace or dataclass; else a dict."""
    try:
        kind = get_type_hints(vars(cls).get("__init__", cls)).get(name)
    except NameError:  # the annotation's type is imported for type checkers only
        kind = None
    if kind is Namespace:
        return Namespace(**{key: value for key, value in entries.items() if not str(key).startswith("__")})
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**entries)
    return AttributeDict(entries)


def _read_shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _format_first(keys: list[str], *, count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")

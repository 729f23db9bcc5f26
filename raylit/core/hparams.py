"""Hyper-parameters: collected from constructors, saved in checkpoints, and modules built from them again."""

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
    """A dict whose string keys read and write as attributes too."""

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
    """What a module and a data module have in common: `save_hyperparameters` and what comes of it."""

    # Of no narrower type, which torch.jit.script would try to compile.
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
        """Keep the constructor's arguments (all, the named ones, or a dict, Namespace or dataclass) in `hparams`, in
        checkpoints and, with `logger`, in the loggers. `frame`: the constructor's, where this is called elsewhere."""
        current = inspect.currentframe()
        frame = frame or (current.f_back if current is not None else None)
        assert frame is not None
        ignored = [ignore] if isinstance(ignore, str) else ignore or ()
        values, self._hparams_name = select_hyperparameters(names, init_arguments(self, frame), ignored)
        self.hparams.update(values)
        self._hparams_initial = copy_hyperparameters(self.hparams)
        self._is_logging_hparams = logger

    @property
    def hparams(self) -> AttributeDict:
        """Theirs to change: checkpoints keep them as they are then."""
        if self._hparams is None:
            self._hparams = AttributeDict()
        hparams: AttributeDict = self._hparams
        return hparams

    @property
    def hparams_initial(self) -> AttributeDict:
        """A copy of `hparams` as they were saved."""
        return copy_hyperparameters(self._hparams_initial or {})

    def find_hparams(self) -> AttributeDict | None:
        """Return `hparams` if there are any; unlike the property, make none."""
        hparams: AttributeDict | None = self._hparams
        return hparams or None

    def find_hparams_argument(self) -> str:
        """Return the constructor's argument that holds all `hparams`; "kwargs": each is an argument of its own."""
        return self._hparams_name

    def find_logged_hparams(self) -> dict[str, Any]:
        """Return those that go to the loggers: none after `save_hyperparameters(logger=False)`."""
        return dict(self._hparams or {}) if self._is_logging_hparams else {}


def flatten(values: Mapping[Any, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names joined by "/", with what is no mapping."""
    for key, value in values.items():
        name = f"{parent}/{key}" if parent else str(key)
        if isinstance(value, Mapping):
            yield from flatten(value, name)
        else:
            yield name, value


def init_arguments(owner: object, frame: FrameType) -> dict[str, Any]:
    """The arguments of `owner`'s constructor call, read in any `__init__` frame of it: a subclass's win."""
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
    given: tuple[Any, ...], arguments: Mapping[str, Any], ignore: Iterable[str]
) -> tuple[dict[str, Any], str]:
    """What `save_hyperparameters(*given, ignore=)` keeps, and the constructor's argument it belongs to.

    The name is "kwargs" where each entry is an argument of its own, else that of the argument which holds them all.
    """
    ignored = set(ignore)
    if not given:
        return {name: value for name, value in arguments.items() if name not in ignored}, "kwargs"
    if all(isinstance(name, str) for name in given):
        return {name: arguments[name] for name in given if name not in ignored}, "kwargs"
    if len(given) > 1:
        raise TypeError("save_hyperparameters takes names of arguments, or one dict, Namespace or dataclass")
    holder = given[0]
    name = next((name for name, value in arguments.items() if value is holder), "kwargs")
    values = _entries(holder)
    return {key: value for key, value in values.items() if key not in ignored}, name


def copy_hyperparameters(hparams: Mapping[str, Any]) -> AttributeDict:
    """A copy that later changes to the original, or to lists and dicts in it, leave alone."""
    return AttributeDict({name: _copied(value) for name, value in hparams.items()})


def constructor_arguments(
    cls: type, hparams: Mapping[str, Any], name: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The keyword arguments that rebuild an instance of `cls` from saved hyper-parameters; `overrides` win.

    The file may be a stranger's: names that begin with an underscore, which constructors with `**kwargs` may hand to
    what acts on them, are passed to parameters of that name only.
    """
    parameters = inspect.signature(cls).parameters
    if _is_passed(name, parameters) and name != "kwargs" and name not in overrides:
        # Beside the arguments, `overrides` may name single entries of the one that holds the hyper-parameters.
        entries = {**hparams, **{key: value for key, value in overrides.items() if key not in parameters}}
        return {name: _held(cls, name, entries), **{k: v for k, v in overrides.items() if k in parameters}}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return {**{key: value for key, value in hparams.items() if _is_passed(key, parameters)}, **overrides}
    return {**{key: value for key, value in hparams.items() if key in parameters}, **overrides}


def _is_passed(name: object, parameters: Mapping[str, inspect.Parameter]) -> bool:
    return isinstance(name, str) and (name in parameters or not name.startswith("_"))


def _entries(holder: Any) -> dict[str, Any]:
    if isinstance(holder, Namespace):
        return vars(holder)
    if dataclasses.is_dataclass(holder) and not isinstance(holder, type):
        return {field.name: getattr(holder, field.name) for field in dataclasses.fields(holder)}
    return dict(holder)


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple, set) else value


def _held(cls: type, name: str, entries: dict[str, Any]) -> Any:
    """Of the type that the constructor says, where that is one to be made of entries."""
    try:
        kind = get_type_hints(vars(cls).get("__init__", cls)).get(name)
    except NameError:  # an annotation that is there for type checkers only
        kind = None
    if kind is Namespace:
        return Namespace(**{key: value for key, value in entries.items() if not str(key).startswith("__")})
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return kind(**entries)
    return AttributeDict(entries)


_Owner = TypeVar("_Owner")


def read_for_rebuild(
    path: str | Path, *, hparams_file: str | Path | None, overrides: Mapping[str, Any], allow_pickle: bool
) -> dict[str, Any]:
    """The checkpoint; its hyper-parameters unpacked, those of the file instead where one is given."""
    checkpoint = files.read(path, allow_pickle=allow_pickle)
    for key in ("hyper_parameters", "datamodule_hyper_parameters"):
        saved = checkpoint.get(key, {})
        if not isinstance(saved, dict):
            raise CheckpointError(f"{path} holds {key} of type {type(saved).__name__}: must be a dict")
        # What is given anew need not be readable.
        packed = {name: value for name, value in saved.items() if name not in overrides}
        checkpoint[key] = format.unpack_hyper_parameters(packed, allow_pickle=allow_pickle)
    if hparams_file is not None:
        checkpoint["hyper_parameters"] = read_hyperparameters(Path(hparams_file))
    return checkpoint


def rebuild(
    cls: type[_Owner], hparams: Mapping[str, Any], name: str, *, overrides: Mapping[str, Any], source: str
) -> _Owner:
    """An instance from saved hyper-parameters, which `overrides` win over. CheckpointError: an argument is missing."""
    try:
        return cls(**constructor_arguments(cls, hparams, name, overrides))
    except TypeError as error:
        raise CheckpointError(
            f"{cls.__name__} cannot be rebuilt from {source}: {error}. It holds the hyper-parameters "
            f"{sorted(map(str, hparams))}; call self.save_hyperparameters() in __init__, or pass what is missing here"
        ) from error


def read_hyperparameters(file: Path) -> dict[str, Any]:
    """Of a YAML file, or a CSV file with the columns key and value."""
    if not file.is_file():
        raise CheckpointError(f"hparams_file={os.fspath(file)!r}: there is no such file")
    # Only when there is something to read: importing raylit should not cost the import of yaml.
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
    """Load into the module's own tensors. CheckpointError names the first keys that do not fit."""
    check_weights(module, state_dict, source=source, strict=strict)
    module.load_state_dict(state_dict, strict=strict)


def check_weights(module: nn.Module, state_dict: Mapping[str, Tensor], *, source: str, strict: bool = True) -> None:
    """CheckpointError names the first keys that do not fit."""
    own = module.state_dict()
    missing = [key for key in own if key not in state_dict]
    unexpected = [key for key in state_dict if key not in own]
    other_shape = [
        f"{key} ({tuple(value.shape)} instead of {tuple(own[key].shape)})"
        for key, value in state_dict.items()
        if key in own and not nn.parameter.is_lazy(own[key]) and _shape(value) != _shape(own[key])
    ]
    if other_shape or (strict and (missing or unexpected)):
        wrong = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
        raise CheckpointError(
            f"{source} is not a checkpoint of this {type(module).__name__}: "
            + ", ".join(f"{what} {_first(keys)}" for what, keys in wrong.items() if keys)
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _first(keys: list[str], *, count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")

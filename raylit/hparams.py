"""Hyper-parameters: what `save_hyperparameters` finds in the constructor's frame. Both sides."""

import dataclasses
import inspect
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, get_type_hints


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
        self._hparams_initial = copied(self.hparams)
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
        return copied(self._hparams_initial or {})

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


def flattened(values: Mapping[Any, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names joined by "/", with what is no mapping."""
    for key, value in values.items():
        name = f"{parent}/{key}" if parent else str(key)
        if isinstance(value, Mapping):
            yield from flattened(value, name)
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


def copied(hparams: Mapping[str, Any]) -> AttributeDict:
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

"""Hyper-parameters: what `save_hyperparameters` finds in the constructor's frame. Both sides."""

import inspect
from argparse import Namespace
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any


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


def init_arguments(owner: object, frame: FrameType) -> dict[str, Any]:
    """The arguments of `owner`'s constructor call, read in any `__init__` frame of it: a subclass's win."""
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
        raise TypeError("save_hyperparameters takes names of arguments, or one dict or Namespace")
    holder = given[0]
    name = next((name for name, value in arguments.items() if value is holder), "kwargs")
    values = vars(holder) if isinstance(holder, Namespace) else dict(holder)
    return {key: value for key, value in values.items() if key not in ignored}, name


def constructor_arguments(cls: type, hparams: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The keyword arguments that rebuild an instance of `cls` from saved hyper-parameters."""
    if name != "kwargs":
        return {name: AttributeDict(hparams)}
    parameters = inspect.signature(cls).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(hparams)
    known = {parameter.name for parameter in parameters}
    return {key: value for key, value in hparams.items() if key in known}

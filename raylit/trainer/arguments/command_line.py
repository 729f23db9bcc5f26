"""The Trainer's arguments on a command line, through argparse. Driver."""

import ast
import inspect
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from raylit.trainer.arguments.names import EarlierNames

_EARLIER = tuple(EarlierNames.__annotations__)
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}


def add_arguments(parser: ArgumentParser, constructor: Callable[..., Any]) -> ArgumentParser:
    """An option `--name` for each keyword of the constructor, and for Lightning 0.9's names, in a group of its own.

    What is not given stays out of the Namespace's way as None. A bare `--name` of a switch turns it on.
    """
    group = parser.add_argument_group(constructor.__qualname__)
    for parameter in _keywords(constructor):
        as_switch: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(parameter.default, bool) else {}
        group.add_argument(
            f"--{parameter.name}",
            type=_value,
            default=None,
            metavar="VALUE",
            help=f"default: {parameter.default!r}",
            **as_switch,
        )
    for name in _EARLIER:
        group.add_argument(f"--{name}", type=_value, nargs="?", const=True, default=None, help=SUPPRESS)
    return parser


def from_arguments(
    given: Namespace | ArgumentParser, constructor: Callable[..., Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """The keywords for the constructor out of a Namespace that may hold other things as well; a parser parses first."""
    if isinstance(given, ArgumentParser):
        given = given.parse_args()
    names = [*(parameter.name for parameter in _keywords(constructor)), *_EARLIER]
    return {**{name: value for name in names if (value := getattr(given, name, None)) is not None}, **overrides}


def _keywords(constructor: Callable[..., Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(constructor).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _value(text: str) -> Any:
    """A number, a word for one of Python's constants, a list or dict; else the text itself."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

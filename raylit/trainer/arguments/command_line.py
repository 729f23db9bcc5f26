"""Options for the Trainer's arguments by argparse; their help is the constructor's docstring. Driver.

The `raylit` command and `RaylitCLI` parse with jsonargparse instead, in `raylit/cli.py`.
"""

import ast
import inspect
import re
from argparse import SUPPRESS, ArgumentParser, Namespace
from typing import Any

from raylit.trainer.arguments.names import EarlierNames

_OLDER_NAMES = tuple(EarlierNames.__annotations__)
_CONSTANTS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None}


def add_arguments(parser: ArgumentParser, constructor: type[Any]) -> ArgumentParser:
    """Add an option `--name` for each keyword of the constructor and each name of Lightning 0.9, in their own group.

    An option that is not given is None in the Namespace. A bare `--name` of a bool argument means True.
    """
    group = parser.add_argument_group(constructor.__qualname__)
    texts = read_argument_texts(constructor)
    for parameter in _list_keywords(constructor):
        as_switch: dict[str, Any] = {"nargs": "?", "const": True} if isinstance(parameter.default, bool) else {}
        help_text = f"{texts.get(parameter.name, '')} (default: {parameter.default!r})".lstrip()
        group.add_argument(
            f"--{parameter.name}",
            type=_parse_value,
            default=None,
            metavar="VALUE",
            help=help_text.replace("%", "%%"),
            **as_switch,
        )
    for name in _OLDER_NAMES:
        group.add_argument(f"--{name}", type=_parse_value, nargs="?", const=True, default=None, help=SUPPRESS)
    return parser


def from_arguments(
    given: Namespace | ArgumentParser, constructor: type[Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """Return the constructor's keywords from a Namespace, which may hold other options; a parser parses `sys.argv`."""
    if isinstance(given, ArgumentParser):
        given = given.parse_args()
    names = [*(parameter.name for parameter in _list_keywords(constructor)), *_OLDER_NAMES]
    return {**{name: value for name in names if (value := getattr(given, name, None)) is not None}, **overrides}


def read_argument_texts(constructor: type[Any]) -> dict[str, str]:
    """Return the text of each argument in the `Args:` section of the constructor's docstring, on one line each."""
    _, _, section = (inspect.getdoc(constructor.__init__) or "").partition("\nArgs:\n")
    section, _, _ = section.partition("\n\n")
    entries = re.split(r"^    \**(\w+): ", section, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _list_keywords(constructor: type[Any]) -> list[inspect.Parameter]:
    return [p for p in inspect.signature(constructor).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _parse_value(text: str) -> Any:
    """Parse a number, a word for one of Python's constants, a list or a dict; any other text stays as it is."""
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text

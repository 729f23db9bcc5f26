"""From the Trainer's arguments to a Plan: names settled, values parsed, checked and explained. Driver."""

from raylit.trainer.arguments.command_line import add_arguments, from_arguments
from raylit.trainer.arguments.given import Given
from raylit.trainer.arguments.names import EarlierNames, accepts_earlier_names, resolve_aliases
from raylit.trainer.arguments.searches import parse_searches

__all__ = [
    "EarlierNames",
    "Given",
    "accepts_earlier_names",
    "add_arguments",
    "from_arguments",
    "parse_searches",
    "resolve_aliases",
]

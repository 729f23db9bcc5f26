"""The Trainer's arguments: older names resolved, values parsed and checked, one function for each group of the Plan.

Runs in the driver. `Trainer.__init__` documents each argument and passes it to the function that checks it: those for
workers, devices and resources are in `workers.py`, all others in `training.py`. `names.py` maps Lightning's older names
and `command_line.py` reads options.
"""

from raylit.trainer.arguments.command_line import add_arguments, from_arguments
from raylit.trainer.arguments.names import EarlierNames, accepts_earlier_names, resolve_aliases
from raylit.trainer.arguments.training import (
    build_plan,
    parse_limits,
    parse_optimization,
    parse_searches,
    parse_strategy,
    parse_validation,
)
from raylit.trainer.arguments.workers import parse_workers

__all__ = [
    "EarlierNames",
    "accepts_earlier_names",
    "add_arguments",
    "build_plan",
    "from_arguments",
    "parse_limits",
    "parse_optimization",
    "parse_searches",
    "parse_strategy",
    "parse_validation",
    "parse_workers",
    "resolve_aliases",
]

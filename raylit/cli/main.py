"""Entry point of the `raylit` command. Driver."""

import os
import sys
from importlib import metadata

from raylit.cli import checkpoints
from raylit.cli.command_line import RaylitCLI
from raylit.errors import RaylitError


def main(args: list[str] | None = None) -> int:
    """Run a subcommand and return the exit status; raylit's errors are one line, those of user code a traceback."""
    args = sys.argv[1:] if args is None else args
    # A console script has its own directory on the path, not the current one with the user's modules. Workers get this
    # path, too.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        if args[:1] == ["checkpoint"]:
            checkpoints.main(args[1:])
            return 0
        RaylitCLI(args=args, parser_kwargs={"prog": "raylit", "version": metadata.version("raylit")})
    except RaylitError as error:
        print(f"raylit: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0

"""The command `raylit checkpoint`, which converts checkpoints. Driver."""

import argparse
from collections.abc import Sequence

from raylit.checkpoint import files

_CONSOLIDATE = (
    "Make one file of a checkpoint that is a directory. Its tensors are in this process's memory for that time, all of "
    "them; without the optimizers' with --weights-only."
)


def main(args: Sequence[str]) -> None:
    """Run the command on its arguments.

    Raises:
        CheckpointError: If there is no checkpoint, it is damaged, or the file cannot be written.
    """
    parser = argparse.ArgumentParser(prog="raylit checkpoint", description="Work with checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="command")
    consolidate = commands.add_parser("consolidate", help="a directory into one file", description=_CONSOLIDATE)
    consolidate.add_argument("directory", help="a sharded checkpoint")
    consolidate.add_argument("file", help="the file to write, or a URL")
    consolidate.add_argument("--weights-only", action="store_true", help="leave out optimizers and the run's position")
    parsed = parser.parse_args(args)
    files.consolidate(parsed.directory, parsed.file, is_weights_only=parsed.weights_only)
    print(f"wrote {parsed.file}")

"""The `raylit` command and the class to build one's own with, on jsonargparse. Driver."""

from raylit.cli.command_line import LightningCLI, RaylitCLI
from raylit.cli.main import main

__all__ = ["LightningCLI", "RaylitCLI", "main"]

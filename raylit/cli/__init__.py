"""The `raylit` command, and RaylitCLI to build such a command for your own script, by jsonargparse.

Runs in the driver. Open `command_line.py` first.
"""

from raylit.cli.command_line import LightningCLI, RaylitCLI
from raylit.cli.main import main

__all__ = ["LightningCLI", "RaylitCLI", "main"]

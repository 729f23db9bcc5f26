"""Keep Python's exit by SIGINT if Ray is imported. Driver.

Written for Ray 2.60 and Python 3.11. After an uncaught KeyboardInterrupt, Python ends by SIGINT (130 in a shell, which
then ends a loop of commands as well), unless code is compiled between the exception and the end: then its exit code is
1. Ray causes that at its shutdown, by importing a package.
"""

import contextlib
import importlib
import sys


def load_exit_imports() -> None:
    """Import what Ray imports while a process ends, which takes 0.1 s either way; do nothing without Ray.

    With a version that has no such package, or others, a program that Ctrl-C ends may have the exit code 1.
    """
    if "ray" in sys.modules:
        with contextlib.suppress(ImportError):
            importlib.import_module("ray.dag")

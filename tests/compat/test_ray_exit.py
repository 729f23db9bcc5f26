"""Exit code of a program that Ctrl-C ends while Ray is imported, with the real Ray."""

import signal
import subprocess
import sys

SOURCE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from raylit.compat.ray_exit import load_exit_imports
load_exit_imports()
assert "ray" not in sys.modules
import ray
load_exit_imports()
os.kill(os.getpid(), signal.SIGINT)
"""


def test_python_ends_by_the_signal():
    done = subprocess.run([sys.executable, "-c", SOURCE], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT, done.stderr
    assert "KeyboardInterrupt" in done.stderr

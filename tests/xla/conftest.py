"""XLA's CPU device with four devices, in this process and its Ray actors.

The tests run with the Python of a venv that has torch_xla (shared/xla/install.sh); elsewhere they are skipped. XLA is
started here, before any test: torch cannot run a backward pass on XLA in a process that has run one before.
"""

import os

import raylit as pl
from raylit.accelerators import get_accelerator

_before = dict(os.environ)
os.environ.setdefault("PJRT_DEVICE", "CPU")
os.environ.setdefault("CPU_NUM_DEVICES", "4")
try:
    get_accelerator("xla").device()
except pl.ConfigError:  # there is no torch_xla: other tests in this process see nothing of the attempt
    os.environ.clear()
    os.environ.update(_before)

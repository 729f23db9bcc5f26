"""XLA's CPU device with four devices, in this process and its Ray actors.

The tests run with the Python of a venv that has torch_xla (shared/xla/install.sh); elsewhere they are skipped. XLA is
started here, before any test: torch cannot run a backward pass on XLA in a process that has run one before.
"""

import os

try:
    import torch_xla

    os.environ.setdefault("PJRT_DEVICE", "CPU")
    os.environ.setdefault("CPU_NUM_DEVICES", "4")
    from raylit.accelerators.xla import XLAAccelerator
except ImportError:
    pass
else:
    assert torch_xla
    XLAAccelerator().device()

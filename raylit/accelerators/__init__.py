"""Devices that workers train on: one file for each kind, behind the interface in base.py (open it first).

The driver creates an accelerator for each Trainer (registry.py); it is pickled with the Plan to the workers.
"""

from raylit.accelerators.base import Accelerator
from raylit.accelerators.cpu import CPUAccelerator
from raylit.accelerators.cuda import CUDAAccelerator
from raylit.accelerators.registry import choose_accelerator, get_accelerator, is_registered, register_accelerator

__all__ = [
    "Accelerator",
    "CPUAccelerator",
    "CUDAAccelerator",
    "choose_accelerator",
    "get_accelerator",
    "is_registered",
    "register_accelerator",
]

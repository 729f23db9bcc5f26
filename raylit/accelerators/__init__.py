"""The devices a worker can drive. Worker, and the driver to check what was asked for."""

from raylit.accelerators.base import Accelerator
from raylit.accelerators.cpu import CPUAccelerator
from raylit.accelerators.cuda import CUDAAccelerator
from raylit.config.plan import AcceleratorName


def build_accelerator(name: AcceleratorName) -> Accelerator:
    return CUDAAccelerator() if name == "cuda" else CPUAccelerator()


__all__ = ["Accelerator", "CPUAccelerator", "CUDAAccelerator", "build_accelerator"]

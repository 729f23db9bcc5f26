"""CPUAccelerator: training on the host's processor and memory. Driver and worker."""

import contextlib
import os
import resource
from collections.abc import Callable

import torch

from raylit.accelerators.base import Accelerator
from raylit.errors import ConfigError


class CPUAccelerator(Accelerator):
    """Accelerator that is the host itself."""

    name = "cpu"
    collective_backend = "gloo"
    is_host = True

    def is_available(self) -> bool:
        return True

    def num_devices(self) -> int:
        return os.cpu_count() or 1

    def device(self) -> torch.device:
        return torch.device("cpu")

    def check_memory_limit(self) -> None:
        if not _read_data_bytes():
            raise ConfigError("memory_limit_bytes on a CPU needs Linux, whose /proc tells what a process has")

    def limit_memory(self, num_bytes: int) -> Callable[[], None]:
        before = resource.getrlimit(resource.RLIMIT_DATA)
        limit, hard = _read_data_bytes() + num_bytes, before[1]
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
        return lambda: resource.setrlimit(resource.RLIMIT_DATA, before)


def _read_data_bytes() -> int:
    """Return the memory that RLIMIT_DATA counts, heap and private mappings, in bytes; 0 if /proc does not say."""
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), 0)
    return 0

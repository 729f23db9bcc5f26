"""Peak memory of this process, in main memory and on its device, since a stage began. Worker."""

import contextlib
import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """On CUDA, what torch's allocator has handed out. Processes of data loaders are not in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # Where the kernel refuses, the peak is that of the process's whole life.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> tuple[tuple[str, int], ...]:
        """What memory, and bytes of it."""
        peaks = [("resident", _peak_resident_bytes())]
        if self._device.type == "cuda":
            peaks.append((f"on {self._device}", torch.cuda.max_memory_allocated(self._device)))
        return tuple(peaks)


def _peak_resident_bytes() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

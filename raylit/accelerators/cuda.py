"""CUDAAccelerator: one NVIDIA (or, by torch's ROCm build, AMD) GPU for each worker. Driver and worker."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from raylit.accelerators.base import Accelerator

_OUT_OF_MEMORY = re.compile(
    # Some of CUDA's libraries only say that they could not start, or found no way to compute, for want of memory.
    r"(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_(ALLOC_FAILED|INSUFFICIENT_RESOURCES)|CUFFT_ALLOC_FAILED"
    r"|CUDNN_STATUS_INTERNAL_ERROR_(HOST|DEVICE)_ALLOCATION_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|CUDNN_STATUS_NOT_SUPPORTED|unable to find an engine",
    re.IGNORECASE,
)
_DEVICE_FAILURE = re.compile(r"(CUDA|HIP|NCCL|CUDA driver) error|(CUBLAS|CUDNN)_STATUS_|device-side assert")


class CUDAAccelerator(Accelerator):
    """A GPU that torch reaches by `torch.cuda`; what needs CUDA started leaves a process that has not used it alone."""

    name = "cuda"
    collective_backend = "cpu:gloo,cuda:nccl"
    resources: Mapping[str, float] = {"GPU": 1.0}
    is_automatic = True
    has_copy_streams = True

    def is_available(self) -> bool:
        return torch.cuda.is_available()

    def explain_unavailable(self) -> str:
        return (
            "GPUs are asked for, but torch sees none on this machine: use accelerator='cpu' with num_workers, install "
            "a CUDA build of torch, or connect to a cluster with GPUs (ray.init(address=...) or RAY_ADDRESS)"
        )

    def num_devices(self) -> int:
        return torch.cuda.device_count()

    def device(self) -> torch.device:
        # Ray shows each actor its own GPU only, so its index is 0; in the driver's process it is the current one.
        return torch.device("cuda", torch.cuda.current_device())

    def set_up(self, *, num_threads: int | None) -> None:
        super().set_up(num_threads=num_threads)
        torch.cuda.set_device(self.device())

    def random_state(self) -> Any | None:
        return torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def set_random_state(self, state: Any) -> None:
        torch.cuda.set_rng_state(state)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def memory_stats(self) -> Mapping[str, float]:
        return dict(torch.cuda.memory_stats())

    def reset_peak_memory(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_memory_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated()

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0

    def empty_cache(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def is_out_of_memory(self, error: BaseException) -> bool:
        is_library_error = isinstance(error, (RuntimeError, OSError)) and bool(_OUT_OF_MEMORY.search(str(error)))
        return is_library_error or super().is_out_of_memory(error)

    def is_device_failure(self, error: BaseException) -> bool:
        return isinstance(error, RuntimeError) and bool(_DEVICE_FAILURE.search(str(error)))

    def check_memory_limit(self) -> None:
        """There can be a limit on any GPU."""

    def limit_memory(self, num_bytes: int) -> Callable[[], None]:
        device = self.device()
        total = torch.cuda.get_device_properties(device).total_memory
        share = (torch.cuda.memory_allocated(device) + num_bytes) / total
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
        return lambda: torch.cuda.set_per_process_memory_fraction(1.0, device)

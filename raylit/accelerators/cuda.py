"""One NVIDIA GPU. Worker."""

import torch


class CUDAAccelerator:
    collective_backend = "cpu:gloo,cuda:nccl"
    is_host_memory = False

    def device(self) -> torch.device:
        # Ray shows each actor its own GPU only, so its index is 0; in the driver's process it is the current one.
        return torch.device("cuda", torch.cuda.current_device())

    def set_up(self, *, num_threads: int | None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        torch.cuda.set_device(self.device())

    def is_available(self) -> bool:
        return torch.cuda.is_available()

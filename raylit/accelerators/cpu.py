"""A CPU process. Worker."""

import torch


class CPUAccelerator:
    collective_backend = "gloo"
    is_host_memory = True

    def device(self) -> torch.device:
        return torch.device("cpu")

    def set_up(self, *, num_threads: int | None) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)

    def is_available(self) -> bool:
        return True

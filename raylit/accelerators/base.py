"""Accelerator: the small interface between a worker and its device."""

from typing import Protocol

import torch


class Accelerator(Protocol):
    collective_backend: str
    """What torch.distributed.init_process_group takes."""
    is_host_memory: bool
    """Batches need no transfer."""

    def device(self) -> torch.device:
        """The device of this process."""
        ...

    def set_up(self, *, num_threads: int | None) -> None:
        """Once in each process, before tensors move. `num_threads`: CPU threads for torch; None: leave them."""
        ...

    def is_available(self) -> bool: ...

"""A process group of this process alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def process_group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        # DTensor's cache of this thread keeps the group alive. A fork in another thread frees the cache in the new
        # process, where gloo then waits for its own threads, which are not there: a segmentation fault.
        if hasattr(torch._C, "_clear_DTensor_sharding_propagator_cache"):  # not in torch 2.9
            torch._C._clear_DTensor_sharding_propagator_cache()

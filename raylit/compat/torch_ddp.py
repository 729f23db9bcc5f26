"""Steer the reducer inside torch's DistributedDataParallel. Worker.

Written against torch 2.13, tested with torch 2.9.1 too. DDP's `reducer` is a C++ object.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from raylit.compat.private_names import describe_missing, read_private

_FEATURE = "strategy='ddp'"
_STATIC_GRAPH = "DDPStrategy(static_graph=True)"


class ReversedDDP(DistributedDataParallel):
    """DDP that assumes the opposite of torch's initial order of gradients.

    Its first buckets are then filled backwards from the module's last definition, in the order of a backward pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self, "synced_parameters"):
            raise describe_missing(DistributedDataParallel, "_build_params_for_reducer", feature=_FEATURE)

    def _build_params_for_reducer(self) -> tuple[list[nn.Parameter], list[bool]]:
        # A tied weight stays where it was defined first: its gradient is complete when the backward pass reaches that
        # place.
        parameters, is_sparse = super()._build_params_for_reducer()
        self.synced_parameters: list[nn.Parameter] = parameters[::-1]
        return self.synced_parameters, is_sparse[::-1]


def ignore_parameters(module: nn.Module, names: Collection[str]) -> None:
    """Have DDP, which is built around the module later, leave out parameters by their names in it."""
    ignore = read_private(
        DistributedDataParallel,
        "_set_params_and_buffers_to_ignore_for_model",
        feature=f"{_FEATURE} with frozen weights",
    )
    ignore(module, names)


def push_all_parameters(ddp: DistributedDataParallel) -> None:
    """Tell the reducer that all gradients have arrived, in the order in which it knows the parameters."""
    read_private(ddp.reducer, "_push_all_rebuilt_params", feature=_FEATURE)()


def rebuild_buckets(ddp: DistributedDataParallel) -> None:
    """Sort parameters into buckets in the order in which their gradients have arrived, once. Collective.

    Raises:
        RuntimeError: the last backward pass has left out parameters; the text has their indices.
    """
    read_private(ddp.reducer, "_rebuild_buckets", feature=_FEATURE)()


def has_static_graph_reduced(ddp: DistributedDataParallel) -> bool:
    """Return whether DDP with a static graph has queued the reduction of its first backward pass."""
    has_reduced: bool = read_private(ddp, "_static_graph_delay_allreduce_enqueued", feature=_STATIC_GRAPH)
    return has_reduced


def queue_static_graph_reduction(ddp: DistributedDataParallel) -> None:
    """Queue the reduction of a static graph's first backward pass for the end of the pass that runs now."""
    engine: Any = read_private(torch.autograd.Variable, "_execution_engine", feature=_STATIC_GRAPH)
    engine.queue_callback(read_private(ddp.reducer, "_delay_all_reduce", feature=_STATIC_GRAPH))
    ddp._static_graph_delay_allreduce_enqueued = True

"""Watch for collectives, and control of the reducer inside torch's DistributedDataParallel. Worker.

Written against torch 2.13, tested with torch 2.9.1 too. Every function of torch.distributed ends in an operator of
torch, whose name and arguments are private to torch. A renamed operator is reported under its new name; a new pairwise
operator, which would be taken for a collective, is found by `tests/compat/test_torch_distributed.py`. DDP's `reducer`
is a C++ object.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from raylit.compat.private_names import describe_missing, read_private

_DDP = "strategy='ddp'"
_STATIC_GRAPH = "DDPStrategy(static_graph=True)"

_PAIRWISE = ("send", "recv_", "recv_any_source_", "_send", "_recv")
_NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")
_OF_ONE_SHAPE = ("allreduce_", "allgather_", "_allgather_base_", "all_reduce", "all_gather_into_tensor")
"""Collectives whose tensors have the same shape on every rank."""

_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce_coalesced",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather_into_tensor",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter_tensor",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all_single",
    "monitored_barrier_": "monitored_barrier",
}
"""Names in torch.distributed by the names of torch's operators."""


# Collectives


class CollectiveWatch(TorchDispatchMode):
    """Dispatch mode that calls a function before each collective of all ranks, in the thread that starts it.

    Operators cost a little more inside.
    """

    def __init__(self, on_collective: Callable[[str], None]) -> None:
        """Call `on_collective` with each collective's name in torch.distributed.

        The name is followed by the shapes of the tensors if these are alike on all ranks.
        """
        super().__init__()
        self._on_collective = on_collective

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True: compiled code stays compiled inside the mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional") and _is_of_all_ranks(func, args):
            self._on_collective(_describe(func, args))
        return func(*args, **(kwargs or {}))


def _is_of_all_ranks(func: Any, args: tuple[Any, ...]) -> bool:
    name = _get_name(func)
    if name in _PAIRWISE or name in _NO_COLLECTIVES:
        return False
    if func.namespace == "_c10d_functional":
        world = dist.group.WORLD
        return world is not None and world.group_name in args
    groups = [dist.ProcessGroup.unbox(one) for one in args if _is_group(one)]
    return all(group.size() == dist.get_world_size() for group in groups)


def _is_group(arg: Any) -> bool:
    return isinstance(arg, torch.ScriptObject) and str(arg._type()).endswith("c10d.ProcessGroup")


def _describe(func: Any, args: tuple[Any, ...]) -> str:
    name = _get_name(func)
    tensors = ""
    if name in _OF_ONE_SHAPE:
        sent = args[1] if name in ("allgather_", "_allgather_base_") else args[0]
        tensors = " of " + ", ".join(_format_shape(one) for one in (sent if isinstance(sent, list) else [sent]))
    return f"{_NAMES.get(name, name)}{tensors}"


def _format_shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _get_name(func: Any) -> str:
    return str(func.overloadpacket.__name__)


# DistributedDataParallel


class ReversedDDP(DistributedDataParallel):
    """DDP that assumes the opposite of torch's initial order of gradients.

    Its first buckets are then filled backwards from the module's last definition, in the order of a backward pass.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self, "synced_parameters"):
            raise describe_missing(DistributedDataParallel, "_build_params_for_reducer", feature=_DDP)

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
        feature=f"{_DDP} with frozen weights",
    )
    ignore(module, names)


def push_all_parameters(ddp: DistributedDataParallel) -> None:
    """Tell the reducer that all gradients have arrived, in the order in which it knows the parameters."""
    read_private(ddp.reducer, "_push_all_rebuilt_params", feature=_DDP)()


def rebuild_buckets(ddp: DistributedDataParallel) -> None:
    """Sort parameters into buckets in the order in which their gradients have arrived, once. Collective.

    Raises:
        RuntimeError: the last backward pass has left out parameters; the text has their indices.
    """
    read_private(ddp.reducer, "_rebuild_buckets", feature=_DDP)()


def has_static_graph_reduced(ddp: DistributedDataParallel) -> bool:
    """Return whether DDP with a static graph has queued the reduction of its first backward pass."""
    has_reduced: bool = read_private(ddp, "_static_graph_delay_allreduce_enqueued", feature=_STATIC_GRAPH)
    return has_reduced


def queue_static_graph_reduction(ddp: DistributedDataParallel) -> None:
    """Queue the reduction of a static graph's first backward pass for the end of the pass that runs now."""
    engine: Any = read_private(torch.autograd.Variable, "_execution_engine", feature=_STATIC_GRAPH)
    engine.queue_callback(read_private(ddp.reducer, "_delay_all_reduce", feature=_STATIC_GRAPH))
    ddp._static_graph_delay_allreduce_enqueued = True

"""Freed memory goes back to the system at once: what is gathered and let go of must not pile up. Worker, CPU only."""

import ctypes
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from raylit.compat.torch_fsdp import copy_out_at_once, get_reduce_scatter, get_state, list_param_groups

_M_MMAP_THRESHOLD = -3
"""Of glibc's mallopt: what is at least that large has pages of its own, which go with it."""
_EAGER_BYTES = 2**20
_USUAL_BYTES = 32 * 2**20
"""Up to which glibc raises its threshold by itself as large memory comes and goes."""


def free_eagerly(*, is_eager: bool) -> None:
    """Freed memory otherwise stays in holes between what is in use. Pages that come anew each time cost the system's
    clearing them. Nothing where malloc is not glibc's."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _EAGER_BYTES if is_eager else _USUAL_BYTES)


def hold_little(units: Iterable[Any]) -> None:
    """Of fully_shard's units on the CPU: no copies that wait for a stream, nothing gathered ahead of its use. There
    are no streams and nothing overlaps, so that it would only take memory: three units' worth."""
    for unit in units:
        # By itself: torch takes an empty list for its own choice, which is the unit before.
        unit.set_modules_to_backward_prefetch([unit])
        copy_out_at_once(unit)
        for group in list_param_groups(get_state(unit)):
            unit.set_custom_reduce_scatter(_LettingGo(get_reduce_scatter(group)))


class _LettingGo:
    """A reduce-scatter whose input torch would keep until the next unit's turn."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.allocate = inner.allocate

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        work = self._inner(output_tensor=output_tensor, input_tensor=input_tensor, group=group, op=op)
        input_tensor.untyped_storage().resize_(0)
        return work

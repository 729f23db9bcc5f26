"""SizeSearch: the largest batch size that fits into memory. Driver."""

import gc
from collections.abc import Callable

import torch

from raylit.errors import WorkerDied

_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "CUDNN_STATUS_NOT_SUPPORTED")
"""How torch's errors call it where they have no type of their own."""


class SizeSearch:
    """Doubles the size until it is too large, then may halve the gap."""

    def __init__(
        self, try_size: Callable[[int], float], *, is_too_large: Callable[[BaseException], bool], num_trials: int
    ) -> None:
        """`try_size` trains with a size and returns the batches that an epoch has of it."""
        self._try_size = try_size
        self._is_too_large = is_too_large
        self._num_left = num_trials

    def run(self, first: int, *, is_exact: bool) -> int:
        """The largest size that was found good. Where already the first one is too large, its error is raised."""
        num_batches = self._try(first)
        good, too_large = first, 0
        while self._num_left > 0 and num_batches > 1 and not too_large:
            if (found := self._batches_of(2 * good)) is None:
                too_large = 2 * good
            else:
                good, num_batches = 2 * good, found
        while is_exact and self._num_left > 0 and too_large - good > 1:
            middle = (good + too_large) // 2
            if self._batches_of(middle) is None:
                too_large = middle
            else:
                good = middle
        return good

    def _batches_of(self, size: int) -> float | None:
        """None: it is too large."""
        try:
            return self._try(size)
        except Exception as error:
            if not self._is_too_large(error):
                raise
        # Outside of the except clause, where the error would keep the failed step's tensors alive.
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def _try(self, size: int) -> float:
        self._num_left -= 1
        return self._try_size(size)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, WorkerDied):
        return "memory" in error.reason
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OF_MEMORY)

"""Batches on their way from a loader to the step: weighed, and where the loader has no length looked ahead at."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, Protocol

import torch

from raylit.errors import ModuleError
from raylit.worker.data.agreement import Description


def batch_size_of(batch: Any) -> int:
    """Return the first dimension of the batch's first tensor; 1 where it has none or there is no tensor."""
    size = _first_dimension(batch)
    return 1 if size is None else size


def _first_dimension(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.ndim > 0 else 1
    parts: Iterable[Any] = ()
    if isinstance(value, Mapping):
        parts = value.values()
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, range)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
    return next((size for part in parts if (size := _first_dimension(part)) is not None), None)


_END = object()
_NOTHING = object()


class Feed:
    """Iterator over an epoch's batches on this rank.

    A batch of None means that this rank has no share of an incomplete last global batch; it takes part in its step with
    weight 0.
    """

    __slots__ = ("_batches", "_is_checked", "_next_weight", "_weights", "can_prefetch", "weight")

    def __init__(
        self,
        batches: Iterator[Any],
        *,
        weights: deque[float] | None = None,
        is_checked: bool = False,
        can_prefetch: bool = False,
    ) -> None:
        self.weight = 1.0
        """Weight of the batch just returned: the loss times this, averaged over ranks, is the mean over the samples.

        1.0 means that the weight is 1.0 on every rank.
        """
        self.can_prefetch = can_prefetch
        """A batch may be fetched before the step on the batch before it: fetching only affects the loader."""
        self._batches = batches
        self._weights: deque[float] = deque() if weights is None else weights
        self._next_weight = repeat(1.0).__next__ if weights is None else weights.popleft
        self._is_checked = is_checked

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        batch = next(self._batches, _END)
        if batch is _END:
            return self._end()
        try:
            self.weight = self._next_weight()
        except IndexError:
            self.weight = 1.0
            self._raise_mismatch()
        return batch

    def _end(self) -> None:
        if not self._weights:
            raise StopIteration
        self.weight = self._weights.popleft()
        if self.weight > 0.0:
            self._weights.clear()
            self._raise_mismatch()
            raise StopIteration

    def _raise_mismatch(self) -> None:
        if self._is_checked:
            raise ModuleError(
                "the training DataLoader does not yield one batch for each item of its batch sampler, so it cannot be "
                "shared out or continued in mid-epoch: split the data in the loader itself and pass "
                "use_distributed_sampler=False"
            )


def wrap_uneven(weight: float) -> float:
    """Return a weight other than 1.0 for a batch whose weights differ between ranks.

    A weight of 1.0 would say that it is 1.0 on every rank.
    """
    return math.nextafter(1.0, 2.0) if weight == 1.0 else weight


class AnyFeed(Protocol):
    """A Feed, or a wrapper that measures it or moves its batches to a device."""

    @property
    def weight(self) -> float: ...
    def __next__(self) -> Any: ...


class PeekableFeed:
    """Feed of unknown length that can tell whether the batch just returned is the last one."""

    __slots__ = ("_ahead", "_feed", "_state_of_source", "_weight_ahead", "state_before", "weight")

    def __init__(self, feed: AnyFeed, *, state_of_source: Callable[..., dict[str, Any]] | None) -> None:
        """Wrap a feed.

        Args:
            feed: The feed to read.
            state_of_source: `TrainSource.state_dict` of a source whose state is one batch ahead of the training after a
                look ahead; None if the state is a position that does not depend on what has been fetched.
        """
        self.weight = 1.0
        """Weight of the batch just returned, as `Feed.weight`."""
        self.state_before: dict[str, Any] | None = None
        """The source's state from before it fetched a batch that has not been returned yet."""
        self._feed = feed
        self._state_of_source = state_of_source
        self._ahead: Any = _NOTHING
        self._weight_ahead = 1.0

    def __iter__(self) -> "PeekableFeed":
        return self

    def __next__(self) -> Any:
        if self._ahead is _NOTHING:
            batch = next(self._feed)
            self.weight = self._feed.weight
            return batch
        if self._ahead is _END:
            raise StopIteration
        batch, self._ahead, self.state_before = self._ahead, _NOTHING, None
        self.weight = self._weight_ahead
        return batch

    def has_next(self, *, num_done: int) -> bool:
        """Fetch the next batch, unless that has been done, and return whether there is one.

        Collective where fetching is. `num_done` counts the epoch's batches including the one just returned.
        """
        if self._ahead is _NOTHING:
            if self._state_of_source is not None:
                self.state_before = self._state_of_source(num_done=num_done)
            self._ahead = next(self._feed, _END)
            self._weight_ahead = self._feed.weight
        return self._ahead is not _END


class TrainSource(Protocol):
    """Source of the training loop's batches."""

    num_batches: float
    """Batches per worker and epoch; infinite if unknown."""
    has_exact_length: bool
    """True if an epoch has exactly `num_batches` batches; else its end is not known in advance."""
    has_own_state: bool
    """True if part of the state is the loader's own, which knows only how far it has been read."""

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """Begin an epoch at batch `skip` and return its feed; an earlier feed ends."""
        ...

    def num_left(self, epoch: int, num_done: int) -> float:
        """Return the number of batches of an epoch after its first `num_done`, which other workers may have taken."""
        ...

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        """Return the state after the first `num_done` batches of the epoch; the loader may be further ahead."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    @property
    def is_last_batch_short(self) -> bool:
        """True if some rank will have no batch in the last step of an epoch; False where that is not known."""
        ...

    def descriptions(self) -> list[Description]:
        """Return, for each loader, the properties that must be equal on all ranks."""
        ...

    def order_fingerprint(self) -> int:
        """Return the fingerprint of the order of samples in the epoch begun last.

        Equal on ranks that draw the same order; 0 where there is nothing to compare.
        """
        ...

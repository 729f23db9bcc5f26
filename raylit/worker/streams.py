"""Streams of batches that every rank runs through, keeping its own. Worker."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from raylit.worker.sampling import IsolatedRandom

_END = object()


def every_nth(stream: Iterable[Any], *, first: int, world_size: int, own_random: IsolatedRandom) -> Iterator[Any]:
    """Batches `first`, `first + world_size`, ... Worker processes start here and now, as with `iter` of the stream."""
    with own_random:
        batches = iter(stream)
    own_batches = islice(batches, first, None, world_size)
    # Worker processes have random numbers of their own, seeded by `iter`.
    return own_batches if getattr(stream, "num_workers", 0) > 0 else _under(own_random, own_batches)


def _under(own_random: IsolatedRandom, batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with own_random:
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


def advance(batches: Iterator[Any], num_batches: int) -> Any:
    """The last of the batches passed over; None if there is none."""
    passed = deque(islice(batches, num_batches), maxlen=1)
    return passed[0] if passed else None

"""Streams of batches that every rank runs through, keeping its own. Worker."""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from raylit.worker.sampling import IsolatedRandom

_END = object()


def every_nth(stream: Iterable[Any], *, rank: int, world_size: int, own_random: IsolatedRandom) -> Iterator[Any]:
    """Batches `rank`, `rank + world_size`, ... Worker processes start here and now, as with `iter` of the stream.

    The others' part of a global batch is fetched too before one's own is handed out, so that a stream with a state of
    its own stands at the same place on all ranks.
    """
    with own_random:
        batches = iter(stream)
    own_batches = _own(batches, rank=rank, world_size=world_size)
    # Worker processes have random numbers of their own, seeded by `iter`.
    return own_batches if getattr(stream, "num_workers", 0) > 0 else _under(own_random, own_batches)


def _own(batches: Iterator[Any], *, rank: int, world_size: int) -> Iterator[Any]:
    while True:
        own: Any = _END
        for index, batch in enumerate(islice(batches, world_size)):
            if index == rank:
                own = batch
        if own is _END:
            return
        yield own


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

"""Streams of batches that every rank runs through, keeping its own, from their start to where a run was. Worker."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from raylit.checkpoint import format
from raylit.worker.loaders import begin_iteration
from raylit.worker.sampling import IsolatedRandom, RandomState

_END = object()


class Opening:
    """The random numbers with which an epoch's data was begun, where those are not a function of seed and epoch."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self.num_passed = 0
        """Items that a run has had before it goes on; 0: the data is begun for the first time."""

    def begin(self) -> None:
        """Note the process's random state, or set it to what it was."""
        if self.num_passed > 0 and self.state is not None:
            format.set_random_state(self.state)
        else:
            self.state = {name: value for name, value in format.random_state().items() if name != "cuda"}


def opened(stream: Iterable[Any], *, opening: Opening) -> tuple[Iterator[Any], Any]:
    """What comes after those items of a stream that a run has had, and the last of them. The process's random numbers
    go on undisturbed by what is passed over."""
    if opening.num_passed == 0:
        opening.begin()
        return begin_iteration(stream), None
    outside = RandomState.take()
    opening.begin()
    items = begin_iteration(stream)
    last = advance(items, opening.num_passed)
    outside.restore()
    return items, last


def every_nth(
    stream: Iterable[Any],
    *,
    rank: int,
    world_size: int,
    own_random: IsolatedRandom,
    opening: Opening,
    compare: Callable[[list[Any]], None] | None = None,
) -> tuple[Iterator[Any], Any]:
    """Batches `rank`, `rank + world_size`, ... after those of a stream that a run has had, and the last of these that
    was this rank's. Worker processes start here and now, as with `iter` of the stream.

    The others' part of a global batch is fetched too before one's own is handed out, so that a stream with a state of
    its own stands at the same place on all ranks. `compare` gets the first global batch: collective, it raises where
    that is not alike on all ranks.
    """
    with own_random:
        opening.begin()
        batches = iter(stream)
        passed = deque(islice(batches, opening.num_passed), maxlen=world_size)
    last = passed[rank] if len(passed) == world_size else None
    own_batches = _own(batches, rank=rank, world_size=world_size, compare=compare)
    # Worker processes have random numbers of their own, seeded by `iter`.
    return own_batches if getattr(stream, "num_workers", 0) > 0 else _under(own_random, own_batches), last


def advance(batches: Iterator[Any], num_batches: int) -> Any:
    """The last of the batches passed over; None if there is none."""
    passed = deque(islice(batches, num_batches), maxlen=1)
    return passed[0] if passed else None


def _own(
    batches: Iterator[Any], *, rank: int, world_size: int, compare: Callable[[list[Any]], None] | None
) -> Iterator[Any]:
    if compare is not None:
        first = list(islice(batches, world_size))
        compare(first)
        batches = chain(first, batches)
        del first
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

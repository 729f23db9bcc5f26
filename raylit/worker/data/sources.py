"""The user's loaders, and the streams of batches that are read from them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from raylit.checkpoint import format
from raylit.core.combined_loader import CombinedLoader, holds_loaders
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.worker.data.sampling import IsolatedRandom, RandomState, begin_iteration
from raylit.worker.data.script_objects import send_script_objects
from raylit.worker.job import Job
from raylit.worker.loops.hooks import is_overridden

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


def open_stream(stream: Iterable[Any], *, opening: Opening) -> tuple[Iterator[Any], Any]:
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


HOOKS = {
    "train": "train_dataloader",
    "validate": "val_dataloader",
    "test": "test_dataloader",
    "predict": "predict_dataloader",
}


def has_loader(job: Job, name: str) -> bool:
    """Whether anything offers a loader for "train", "validate", "test" or "predict"; calls no hook."""
    hook = HOOKS[name]
    if job.loaders.get(name) is not None:
        return True
    return _offers(job.datamodule, hook, DataModule) or _offers(job.module, hook, LightningModule)


def is_from_hook(job: Job, name: str) -> bool:
    """Whether a hook makes the loader, which can do so again."""
    return job.loaders.get(name) is None


def loader_of(job: Job, name: str) -> Any:
    """The loader, or what the hook returns; None where nothing offers one."""
    loader = _given_or_made(job, name)
    if job.shared_memory is not None:
        for leaf in CombinedLoader(loader).flattened:
            send_script_objects(leaf)
    return loader


def _given_or_made(job: Job, name: str) -> Any:
    given = job.loaders.get(name)
    if given is not None:
        return given
    hook = HOOKS[name]
    if _offers(job.datamodule, hook, DataModule):
        return getattr(job.datamodule, hook)()
    return getattr(job.module, hook)() if _offers(job.module, hook, LightningModule) else None


def loaders_of(job: Job, name: str) -> list[Any]:
    """For an evaluation: one loader or several, as a list. A CombinedLoader is one, unless it is "sequential"."""
    loaders = loader_of(job, name)
    if loaders is None:
        return []
    if isinstance(loaders, CombinedLoader):
        return loaders.flattened if loaders.mode == "sequential" else [loaders]
    if isinstance(loaders, dict) or holds_loaders(loaders):
        return CombinedLoader(loaders, "sequential").flattened
    # A list without any loader in it is one: its items are batches.
    return [] if isinstance(loaders, (list, tuple)) and not loaders else [loaders]


def _offers(owner: Any, hook: str, base: type) -> bool:
    # A data module need not be a DataModule by class: what has the hook is taken at its word.
    return owner is not None and is_overridden(hook, owner, base)

"""The user's loaders, and the streams of batches that are read from them."""

import copy
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

from torch.utils.data import DataLoader

from raylit.checkpoint import format
from raylit.compat.torch_core import drop_iterator
from raylit.core.combined_loader import CombinedLoader, holds_loaders
from raylit.core.datamodule import DataModule
from raylit.core.module import LightningModule
from raylit.worker.data.loader_processes import begin_iteration
from raylit.worker.data.sampling import IsolatedRandom, RandomState, get_length, is_map_style, is_plain_batching
from raylit.worker.data.script_objects import send_script_objects
from raylit.worker.job import Job
from raylit.worker.loops.hooks import is_overridden

_END = object()


class EpochRandomState:
    """Random state in which an epoch's data was begun, where it is not a function of seed and epoch."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None
        self.num_passed = 0
        """Items that earlier runs have taken of the epoch; 0 if its data is begun for the first time."""

    def begin(self) -> None:
        """Record the process's random state, or restore the recorded one if the epoch is continued."""
        if self.num_passed > 0 and self.state is not None:
            format.set_random_state(self.state)
        else:
            self.state = format.random_state()


def open_stream(stream: Iterable[Any], *, start_state: EpochRandomState) -> tuple[Iterator[Any], Any]:
    """Open a stream after the items that earlier runs have taken; return its iterator and the last skipped item.

    Skipping items does not change the process's random numbers.
    """
    if start_state.num_passed == 0:
        start_state.begin()
        return begin_iteration(stream), None
    random_state = RandomState.capture()
    start_state.begin()
    items = begin_iteration(stream)
    last = skip_batches(items, start_state.num_passed)
    random_state.restore()
    return items, last


def shard_stream(
    stream: Iterable[Any],
    *,
    rank: int,
    world_size: int,
    isolated_random: IsolatedRandom,
    start_state: EpochRandomState,
    compare: Callable[[list[Any]], None] | None = None,
) -> tuple[Iterator[Any], Any]:
    """Open a stream that all ranks read and of which each keeps every `world_size`-th batch.

    The stream is advanced past the items that earlier runs have taken. Worker processes start during the call, as with
    `iter(stream)`. A rank fetches the whole global batch before it yields its own part, so that a stream with a state
    of its own has the same position on all ranks.

    Args:
        stream: The user's loader.
        rank: Rank of this worker; it keeps batches `rank`, `rank + world_size`, ...
        world_size: Number of ranks.
        isolated_random: Random numbers for iterating the stream, equal on all ranks.
        start_state: Random state of the epoch's start and the number of items to skip.
        compare: Gets the first global batch; collective, raises where it differs between ranks.

    Returns:
        The iterator of this rank's batches, and this rank's last skipped batch, or None.
    """
    with isolated_random:
        start_state.begin()
        batches = iter(stream)
        skipped = deque(islice(batches, start_state.num_passed), maxlen=world_size)
    last = skipped[rank] if len(skipped) == world_size else None
    rank_batches = _iterate_rank_batches(batches, rank=rank, world_size=world_size, compare=compare)
    # Worker processes have their own random numbers, seeded by `iter`.
    if getattr(stream, "num_workers", 0) == 0:
        rank_batches = _isolate_random(isolated_random, rank_batches)
    return rank_batches, last


def skip_batches(batches: Iterator[Any], num_batches: int) -> Any:
    """Skip batches and return the last one skipped; None if there is none."""
    skipped = deque(islice(batches, num_batches), maxlen=1)
    return skipped[0] if skipped else None


def _iterate_rank_batches(
    batches: Iterator[Any], *, rank: int, world_size: int, compare: Callable[[list[Any]], None] | None
) -> Iterator[Any]:
    if compare is not None:
        first_batches = list(islice(batches, world_size))
        compare(first_batches)
        batches = chain(first_batches, batches)
        del first_batches
    while True:
        rank_batch: Any = _END
        for index, batch in enumerate(islice(batches, world_size)):
            if index == rank:
                rank_batch = batch
        if rank_batch is _END:
            return
        yield rank_batch


def _isolate_random(isolated_random: IsolatedRandom, batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with isolated_random:
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
    """Return whether a loader for "train", "validate", "test" or "predict" is defined; calls no hook."""
    hook = HOOKS[name]
    if job.loaders.get(name) is not None:
        return True
    return _defines_hook(job.datamodule, hook, DataModule) or _defines_hook(job.module, hook, LightningModule)


def is_from_hook(job: Job, name: str) -> bool:
    """Return whether a hook builds the loader, so that it can be built again."""
    return job.loaders.get(name) is None


def build_loader(job: Job, name: str) -> Any:
    """Return the loader that was passed or that the hook returns; None where there is neither."""
    loader = _read_loader(job, name)
    if job.shared_memory is not None:
        for leaf in CombinedLoader(loader).flattened:
            send_script_objects(leaf)
    return loader


def _read_loader(job: Job, name: str) -> Any:
    loader = job.loaders.get(name)
    if loader is not None:
        return loader
    hook = HOOKS[name]
    if _defines_hook(job.datamodule, hook, DataModule):
        return getattr(job.datamodule, hook)()
    return getattr(job.module, hook)() if _defines_hook(job.module, hook, LightningModule) else None


def build_eval_loaders(job: Job, name: str) -> list[Any]:
    """Return the loaders of an evaluation as a list; a CombinedLoader is one loader unless it is "sequential"."""
    loaders = build_loader(job, name)
    if loaders is None:
        return []
    if isinstance(loaders, CombinedLoader):
        return loaders.flattened if loaders.mode == "sequential" else [loaders]
    if isinstance(loaders, dict) or holds_loaders(loaders):
        return CombinedLoader(loaders, "sequential").flattened
    # A list that holds no loader is itself the loader: its items are batches.
    return [] if isinstance(loaders, (list, tuple)) and not loaders else [loaders]


def _defines_hook(owner: Any, hook: str, base: type) -> bool:
    # A data module need not subclass DataModule: an object that has the hook counts as one.
    return owner is not None and is_overridden(hook, owner, base)


def drop_smaller_batches(loader: Any, *, is_warning: bool) -> Any:
    """Return the loader, or a collection of loaders, without the smaller batch at the end of an epoch.

    A loader with less than one whole batch keeps it: it is the only shape then. Batches of other iterables are what
    they are. With `is_warning` a warning says how many samples of an epoch are left out.
    """
    if isinstance(loader, CombinedLoader):
        members = [drop_smaller_batches(member, is_warning=is_warning) for member in loader.flattened]
        return CombinedLoader(loader.restore_shape(members), loader.mode)
    if isinstance(loader, dict) or holds_loaders(loader):
        return drop_smaller_batches(CombinedLoader(loader), is_warning=is_warning).iterables
    if not isinstance(loader, DataLoader) or loader.batch_size is None or loader.drop_last:
        return loader
    clone = copy.copy(loader)
    drop_iterator(clone)
    # A DataLoader refuses to have these replaced.
    clone.__dict__["drop_last"] = True
    if not is_map_style(loader):
        return clone
    batch_sampler: Any = loader.batch_sampler
    num_samples = get_length(batch_sampler.sampler)
    num_left = num_samples % loader.batch_size
    if not is_plain_batching(batch_sampler) or num_samples < loader.batch_size or num_left == 0:
        return loader
    batching = copy.copy(batch_sampler)
    batching.drop_last = True
    clone.__dict__["batch_sampler"] = batching
    if is_warning:
        warnings.warn(
            f"each training epoch leaves out the {num_left:g} samples of its last, smaller batch, whose shape would be "
            "compiled for them alone: shuffle=True leaves out others each time; drop_last=True says that it is meant",
            stacklevel=2,
        )
    return clone

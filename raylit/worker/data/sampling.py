"""Samplers that share each epoch's samples out over the workers."""

import contextlib
import copy
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from raylit.compat.torch_data import drop_iterator
from raylit.errors import CheckpointError
from raylit.worker.data.agreement import Description, fingerprint_of_indices, fingerprint_of_samples

_MAX_COMPARED = 65536
"""Items of an epoch's order that its fingerprint is made of."""


def length_of(sized: Any) -> float:
    """`len`, infinite where there is none."""
    # Batch samplers that do not know their length find out by a pass of their own, which may draw random numbers.
    with IsolatedRandom(0):
        try:
            return len(sized)
        except (TypeError, NotImplementedError):
            return math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSource:
    """Where the indices of a map-style loader come from."""

    sampler: Iterable[Any]
    batch_size: int | None = None
    """None: every item of `sampler` is a whole batch."""
    drop_last: bool = False

    @classmethod
    def of(cls, loader: "DataLoader[Any]") -> "IndexSource":
        batch_sampler: Any = loader.batch_sampler
        if batch_sampler is None:
            return cls(sampler=_as_torch_has_it(loader.sampler, loader))
        if not is_plain_batching(batch_sampler):
            return cls(sampler=batch_sampler)
        return cls(
            sampler=_as_torch_has_it(batch_sampler.sampler, loader),
            batch_size=batch_sampler.batch_size,
            drop_last=batch_sampler.drop_last,
        )

    def order(self, *, seed: int, num_at_once: int) -> Iterator[Any]:
        """All that the sampler yields in a pass, alike on every rank. A sampler without a length is asked for
        `num_at_once` items at a time."""
        sampler = self.sampler
        if type(sampler) is SequentialSampler:
            return iter(sampler)
        if _is_plain_shuffle(sampler):
            # What torch's DistributedSampler does, so that a loop written by hand with it sees the same order.
            generator = torch.Generator().manual_seed(seed)
            return iter(torch.randperm(int(length_of(sampler)), generator=generator).tolist())
        length = length_of(sampler)
        return _isolated(sampler, seed=seed, num_at_once=num_at_once if math.isinf(length) else max(1, int(length)))

    def batches(self, *, seed: int, num_at_once: int) -> Iterator[Any]:
        """The index batches of the loader in a single process."""
        order = self.order(seed=seed, num_at_once=num_at_once)
        return order if self.batch_size is None else iter(BatchSampler(order, self.batch_size, self.drop_last))


class Share:
    """One rank's part of the index batches; takes the place of a loader's batch sampler.

    `world_size` batches, one of each rank, are a global batch. Items are dealt out in turn: item i of a global batch
    goes to rank i modulo the number of ranks, which is what torch's DistributedSampler does. The items of an incomplete
    last global batch are dealt out too, to as many ranks as get a batch that is no smaller than the last one of the
    loader in a single process: batch norms and some losses fail on a batch that is too small, above all on one of a
    single sample. Nobody gets a made-up item, some ranks may get none. Where that would leave all the work to one rank,
    because the epoch is a single batch, and with `is_padded`, two items are enough. With `is_padded` the first items of
    the epoch fill the last global batch up, so that all ranks get as many.

    `order` gives the items of an epoch: samples, or whole batches where `batch_size` is None.
    """

    def __init__(
        self,
        order: Callable[[int], Iterator[Any]],
        *,
        num_items: float,
        batch_size: int | None = None,
        drop_last: bool = False,
        is_padded: bool = False,
        smallest_share: int | None = None,
        rank: int,
        world_size: int,
    ) -> None:
        """`smallest_share`: items that a rank needs of an incomplete last global batch, where that is not the size of
        the last batch in a single process."""
        self._order = order
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._is_padded = is_padded
        self._given_smallest_share = smallest_share
        self._rank = rank
        self._world_size = world_size
        self.batch_size, self.drop_last = batch_size, drop_last
        self.group_size = world_size * (batch_size or 1)
        """Items of a global batch."""
        self.num_items = num_items
        self.num_drawn = 0
        """Batches that have been asked for since the last `start`; a loader may have fetched more than it has given."""
        self._num_dealt = self._num_replayed = 0
        self._weights: deque[float] = deque(maxlen=0)
        self._drawing = _Drawing(lambda: order(0), num_compared=0)
        self.num_batches: float = self.num_batches_after(0)

    def num_batches_after(self, num_dealt: int) -> float:
        """What is left of an epoch once `num_dealt` items of it have gone to ranks, these or others."""
        num_groups = max(0.0, self.num_items - num_dealt) / self.group_size
        if math.isinf(num_groups):
            return num_groups
        return math.floor(num_groups) if self._drop_last else math.ceil(num_groups)

    @property
    def is_last_batch_short(self) -> bool:
        """The last batch of an epoch has fewer items than there are ranks."""
        if self._is_padded or self._drop_last or math.isinf(self.num_items):
            return False
        return 0 < self.num_items % self.group_size < self._world_size

    def start(self, epoch: int, *, num_dealt: int, weights: deque[float], num_replayed: int = 0) -> None:
        """What the iterations from now on yield: what the epoch has after its first `num_dealt` items. `weights`
        receives the weight of each batch before it is yielded, and a last 0.0 if this rank has none of the last global
        batch. The first `num_replayed` have no weight: a loader that goes on from a state of its own passes over them
        by itself."""
        self._num_dealt, self._weights, self._num_replayed = num_dealt, weights, num_replayed
        self._drawing = _Drawing(partial(self._order, epoch), num_compared=self._num_compared)
        self.num_drawn = 0

    def order_fingerprint(self) -> int:
        """Of the order since the last `start`, which is drawn now unless the loader has begun: call it once the loader
        is being iterated over. Alike on all ranks that draw the same order."""
        return self._drawing.fingerprint()

    @property
    def _num_compared(self) -> int:
        """Items of an order that make its fingerprint; a sampler without a length is not asked for many."""
        if self._world_size == 1:
            return 0
        return self.group_size if math.isinf(self.num_items) else int(min(self.num_items, _MAX_COMPARED))

    def __len__(self) -> int:
        if math.isinf(self.num_batches):
            raise TypeError("the sampler has no length")
        return int(self.num_batches)

    def __iter__(self) -> Iterator[Any]:
        # Bound now: the generator runs later, perhaps ahead of the batches. DataLoaders with worker processes call
        # `iter` twice and use the second, so nothing may happen before the first item is asked for.
        return self._batches(self._drawing, self._num_dealt, self._weights, self._num_replayed)

    def _batches(self, drawing: "_Drawing", num_dealt: int, weights: deque[float], num_replayed: int) -> Iterator[Any]:
        group_size, world_size, rank = self.group_size, self._world_size, self._rank
        items, first = drawing.items(), []
        if self._is_padded:
            first = list(islice(items, group_size))
            items = chain(first, items)
        items = islice(items, num_dealt, None)
        while group := list(islice(items, group_size)):
            if self._drop_last and len(group) < group_size:
                return
            smallest = self._smallest_share(len(group))
            if self._is_padded:
                num_missing = max(-len(group) % world_size, smallest * world_size - len(group))
                group += islice(cycle(first), num_missing)
            num_sharing = min(world_size, len(group) // smallest) if not self._is_padded else world_size
            share = group[rank::num_sharing] if rank < num_sharing else []
            if num_replayed > 0:
                num_replayed -= 1
            else:
                # Gradients are averaged over ranks; this makes that the mean over the samples.
                weights.append(len(share) * world_size / len(group))
            if share:
                self.num_drawn += 1
                yield share[0] if self._batch_size is None else share

    def _smallest_share(self, num_items: int) -> int:
        """That may be made of a global batch of so many items."""
        if self._batch_size is None:
            return 1
        if self._given_smallest_share is not None:
            return self._given_smallest_share
        # A single process cuts what comes before into full batches, so this is the size of its last one.
        smallest = num_items % self._batch_size or self._batch_size
        return min(smallest, 2) if self._is_padded or self.num_items <= self._batch_size else smallest


class _Drawing:
    """An order of items that is drawn when it is first asked for."""

    def __init__(self, draw: Callable[[], Iterator[Any]], *, num_compared: int) -> None:
        self._draw = draw
        self._num_compared = num_compared
        self._fingerprint: int | None = None
        self._items: Iterator[Any] | None = None

    def fingerprint(self) -> int:
        if self._fingerprint is None:
            self._items = self._drawn()
        assert self._fingerprint is not None
        return self._fingerprint

    def items(self) -> Iterator[Any]:
        """Once what `fingerprint` has drawn, then anew."""
        items, self._items = self._items, None
        return self._drawn() if items is None else items

    def _drawn(self) -> Iterator[Any]:
        items = self._draw()
        head = list(islice(items, self._num_compared))
        self._fingerprint = fingerprint_of_indices(head)
        return chain(head, items)


class SamplerGenerators:
    """The random generators that samplers bring with them: their states go on from epoch to epoch, and an epoch that
    is asked for again starts from the state that it started from."""

    def __init__(self, samplers: Iterable[Any], *, has_persistent_workers: bool = False) -> None:
        found = [getattr(sampler, "generator", None) for sampler in samplers]
        self._generators = list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
        self._has_persistent_workers = has_persistent_workers
        self._epoch = -1
        self._epoch_start: list[Tensor] = []
        self._resumed: list[Tensor] = []

    def begin(self, epoch: int) -> None:
        """Call when the order of an epoch is about to be drawn, and not before: where the loader shares its generator
        with the sampler it has drawn the seed of its worker processes by then."""
        if epoch == self._epoch:
            self._restore_epoch_start()
        else:
            if self._resumed:
                self._restore(self._resumed)
            self._epoch, self._epoch_start = epoch, self._states()
        self._resumed = []

    def expect_seeding(self) -> None:
        """Persistent workers are about to be seeded, which the uninterrupted run does not do."""
        self._resumed = self._states()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "epoch_start": self._epoch_start, "now": self._states()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """States of other samplers than these matter only to an epoch under way; see `begin`."""
        self._epoch, self._epoch_start = state["epoch"], state["epoch_start"]
        if len(state["now"]) == len(self._generators):
            self._restore(state["now"])
            # Persistent workers are seeded once. The resumed run does so again, which the one before it did not.
            self._resumed = state["now"] if self._has_persistent_workers else []

    def _restore_epoch_start(self) -> None:
        if len(self._epoch_start) != len(self._generators):
            raise CheckpointError(
                f"epoch {self._epoch} was begun with {len(self._epoch_start)} sampler generators, the loader has "
                f"{len(self._generators)} now: resume with the same samplers, or at the start of an epoch"
            )
        self._restore(self._epoch_start)

    def _states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]

    def _restore(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators, states, strict=True):
            generator.set_state(state)


class IsolatedRandom:
    """Random numbers of its own for what runs inside `with`: Python's, NumPy's and torch's on the CPU. Those outside
    go on undisturbed, and its own go on at the next `with`. About 0.2 ms each time."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inside: RandomState | None = None
        self._outside: RandomState | None = None

    def __enter__(self) -> None:
        self._outside = RandomState.take()
        if self._inside is not None:
            self._inside.restore()
            return
        # torch.manual_seed would also reseed the GPUs.
        torch.default_generator.manual_seed(self._seed)
        random.seed(self._seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(self._seed % 2**32)

    def __exit__(self, *exc_info: object) -> None:
        assert self._outside is not None
        self._inside = RandomState.take()
        self._outside.restore()


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomState:
    torch_cpu: Tensor
    python: Any
    numpy: Any
    """None where NumPy has not been imported."""

    @classmethod
    def take(cls) -> "RandomState":
        numpy = sys.modules.get("numpy")
        return cls(
            torch_cpu=torch.get_rng_state(),
            python=random.getstate(),
            numpy=None if numpy is None else numpy.random.get_state(),
        )

    def restore(self) -> None:
        torch.set_rng_state(self.torch_cpu)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


def is_plain_batching(batch_sampler: Any) -> bool:
    """It cuts what its sampler yields into batches of one size, and nothing else."""
    return type(batch_sampler) is BatchSampler or is_of_torchdata(batch_sampler, "BatchSampler")


def _as_torch_has_it(sampler: Any, loader: "DataLoader[Any]") -> Any:
    """torchdata's shuffle as torch's: its iterator keeps a position, and it makes up a generator where none was given,
    which nobody has seeded."""
    if not is_of_torchdata(sampler, "RandomSampler"):
        return sampler
    source = sampler.data_source
    num_samples = None if sampler.num_samples == len(source) else sampler.num_samples
    return RandomSampler(source, sampler.replacement, num_samples, generator=getattr(loader, "generator", None))


def is_of_torchdata(sampler: Any, name: str) -> bool:
    """Told without importing it."""
    kind = type(sampler)
    return kind.__module__ == "torchdata.stateful_dataloader.sampler" and kind.__name__ == name


def _is_plain_shuffle(sampler: Any) -> bool:
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(sampler.data_source)
    )


def _isolated(sampler: Iterable[Any], *, seed: int, num_at_once: int) -> Iterator[Any]:
    return chain.from_iterable(_chunks(sampler, IsolatedRandom(seed), num_at_once))


def _chunks(sampler: Iterable[Any], own_random: IsolatedRandom, num_at_once: int) -> Iterator[list[Any]]:
    with own_random:
        items = iter(sampler)
    while True:
        with own_random:
            chunk = list(islice(items, num_at_once))
        if not chunk:
            return
        yield chunk


def is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def samplers_of(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def parts_of(loader: Any) -> list[Any]:
    return [loader, *samplers_of(loader), getattr(loader, "dataset", None)]


def is_users_own_split(loader: Any) -> bool:
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers_of(loader))


def is_stateful(loader: Any) -> bool:
    """It can say and be told where it stands."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def stateful_part(loader: Any) -> Any:
    """What is to be asked for its place: the loader, or a data set that a plain DataLoader reads in this process. None:
    neither knows."""
    if is_stateful(loader):
        return loader
    is_read_here = isinstance(loader, DataLoader) and loader.num_workers == 0
    return loader.dataset if is_read_here and is_stateful(loader.dataset) else None


def may_run_ahead(loader: Any) -> bool:
    """Fetching a batch has no effect in this process: another one has made it."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and not is_stateful(loader)


def share_of_sequence(sequence: Sequence[Any], *, rank: int, world_size: int, is_padded: bool = False) -> Share:
    num_batches = len(sequence)
    return Share(
        lambda epoch: iter(range(num_batches)),
        num_items=num_batches,
        is_padded=is_padded,
        rank=rank,
        world_size=world_size,
    )


def copy_loader(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    """One with processes of its own."""
    clone = copy.copy(loader)
    drop_iterator(clone)
    return clone


def with_indices(loader: "DataLoader[Any]", share: Iterable[Any], *, in_order: bool | None) -> "DataLoader[Any]":
    """The same loader with other index batches. Through its `__dict__`, because a DataLoader refuses to have its
    samplers replaced, and making a new one would lose what a subclass added."""
    clone = copy_loader(loader)
    clone.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = share
    if in_order is not None:
        clone.__dict__["in_order"] = in_order
    return clone


def describe(loader: Any, *, share: Share | None) -> Description:
    """What all ranks must have alike of a loader, whose own sampler splits it (`share` is None) or raylit."""
    is_read_by_index = is_map_style(loader) or isinstance(loader, Sequence)
    description: Description = {"way to read it": "by index" if is_read_by_index else "from start to end"}
    if share is not None:
        name = "number of samples" if share.batch_size is not None else "number of batches"
        description[name] = share.num_items
        description["batch size"] = share.batch_size
        description["drop_last"] = share.drop_last
    if is_read_by_index:
        dataset: Any = loader.dataset if isinstance(loader, DataLoader) else loader
        description["length of the data set"] = length_of(dataset)
        description["samples"] = fingerprint_of_samples(dataset)
    return description


def iterate_share(loader: Iterable[Any], share: Share | None) -> Iterator[Any]:
    """The loader's batches of this share; a DataLoader has it as its batch sampler."""
    if share is not None and isinstance(loader, Sequence):
        return map(loader.__getitem__, share)
    return begin_iteration(loader)


def begin_iteration(loader: Iterable[Any]) -> Iterator[Any]:
    """Iterate over a loader; remember its processes for `explain_dead_process`.

    Where this process finishes its step after a SIGTERM or Ctrl-C, a DataLoader's processes get process groups of their
    own: a signal to the whole group would end them during that step.
    """
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return iter(loader)
    attributes: dict[str, Any] = loader.__dict__
    before = attributes["worker_init_fn"]
    if _is_deferring_signals():
        attributes["worker_init_fn"] = _OwnGroup(before)
    try:
        return iter(loader)
    finally:
        attributes["worker_init_fn"] = before
        _children.update(multiprocessing.active_children())


def explain_dead_process(error: BaseException) -> None:
    """Say in torch's error about a DataLoader's process how that has ended, and remove what it has left on the disk."""
    if isinstance(error, (ConnectionError, EOFError)):  # it died while a batch of its was on the way
        pids = _wait_for_dead_children()
    else:
        found = _DEAD_PROCESS.search(str(error)) if isinstance(error, RuntimeError) else None
        pids = [] if found is None else [int(pid) for pid in found[1].split(",")]
    if not pids:
        return
    codes = {child.pid: child.exitcode for child in _children}
    ends = [f"process {pid} {_describe_exit(codes[pid])}" for pid in pids if codes.get(pid) is not None]
    advice = (
        "The kernel kills by SIGKILL where memory is short, and a full /dev/shm shows as SIGBUS: use fewer processes "
        "(num_workers of the DataLoader) or smaller batches, or give the container more shared memory; num_workers=0 "
        "shows what crashes in the data set"
    )
    how = ", ".join(ends) or "how it ended is not known"
    error.args = (f"{str(error).strip().rstrip('.')} ({how}). {advice}",)
    for pid in pids:
        _remove_sockets(pid)


_children: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()
"""The processes of this process's DataLoaders, which torch's errors name by their ids only."""
_DEAD_PROCESS = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")


def _wait_for_dead_children() -> list[int]:
    """The kernel may take a moment to tell how a process has ended."""
    deadline = time.monotonic() + _EXIT_S
    while True:
        dead = [child.pid for child in _children if child.pid is not None and child.exitcode]
        if dead or not _children or time.monotonic() > deadline:
            return dead
        time.sleep(0.02)


_EXIT_S = 0.5


def _describe_exit(code: int | None) -> str:
    assert code is not None
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _remove_sockets(pid: int) -> None:
    """A killed process leaves the directory of the sockets by which it has sent tensors; they have its id in their
    names."""
    for directory in Path(tempfile.gettempdir()).glob("pymp-*"):
        with contextlib.suppress(OSError):
            names = os.listdir(directory)
            if names and all(name.startswith(f"listener-{pid}-") for name in names):
                shutil.rmtree(directory, ignore_errors=True)


class _OwnGroup:
    """A DataLoader's `worker_init_fn`: a process group for the process alone, then the user's."""

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self._init = init

    def __call__(self, process: int) -> None:
        os.setpgid(0, 0)
        if self._init is not None:
            self._init(process)


def _is_deferring_signals() -> bool:
    """The driver's handlers are in place, which are raylit's: the run's only worker is in this process."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    return hasattr(os, "setpgid") and any(
        str(getattr(handler, "__module__", "")).startswith("raylit.") for handler in handlers
    )

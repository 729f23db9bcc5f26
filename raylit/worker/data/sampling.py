"""Samplers that share each epoch's samples out over the workers, the loaders that use them, and their batches."""

import copy
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice, repeat
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

from raylit.compat.torch_core import drop_iterator
from raylit.errors import CheckpointError, ModuleError
from raylit.worker.data.agreement import Description, fingerprint_indices, fingerprint_samples
from raylit.worker.data.loader_processes import begin_iteration

_END = object()
_MAX_COMPARED = 65536
"""Items of an epoch's order that its fingerprint is computed from."""


def get_length(sized: Any) -> float:
    """Return `len(sized)`, or infinity where there is none."""
    # A batch sampler may compute its length by a pass over its sampler, which may draw random numbers.
    with IsolatedRandom(0):
        try:
            return len(sized)
        except (TypeError, NotImplementedError):
            return math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexSource:
    """Source of the indices of a map-style loader."""

    sampler: Iterable[Any]
    batch_size: int | None = None
    """None if every item of `sampler` is a whole batch."""
    drop_last: bool = False

    @classmethod
    def from_loader(cls, loader: "DataLoader[Any]") -> "IndexSource":
        """Read a loader's sampler and batching; a batch sampler of another kind than torch's is kept whole."""
        batch_sampler: Any = loader.batch_sampler
        if batch_sampler is None:
            return cls(sampler=_replace_torchdata_shuffle(loader.sampler, loader))
        if not is_plain_batching(batch_sampler):
            return cls(sampler=batch_sampler)
        return cls(
            sampler=_replace_torchdata_shuffle(batch_sampler.sampler, loader),
            batch_size=batch_sampler.batch_size,
            drop_last=batch_sampler.drop_last,
        )

    def order(self, *, seed: int, num_at_once: int) -> Iterator[Any]:
        """Return the items of one pass of the sampler, equal on every rank.

        A sampler without a length is read `num_at_once` items at a time.
        """
        sampler = self.sampler
        if type(sampler) is SequentialSampler:
            return iter(sampler)
        if _is_plain_shuffle(sampler):
            # As torch's DistributedSampler, so that a hand-written loop that uses it sees the same order.
            generator = torch.Generator().manual_seed(seed)
            return iter(torch.randperm(int(get_length(sampler)), generator=generator).tolist())
        length = get_length(sampler)
        return _draw_isolated(
            sampler, seed=seed, num_at_once=num_at_once if math.isinf(length) else max(1, int(length))
        )

    def batches(self, *, seed: int, num_at_once: int) -> Iterator[Any]:
        """Return the index batches of the loader in a single process."""
        order = self.order(seed=seed, num_at_once=num_at_once)
        return order if self.batch_size is None else iter(BatchSampler(order, self.batch_size, self.drop_last))


class Share:
    """One rank's part of the index batches; replaces a loader's batch sampler.

    A global batch is `world_size` batches, one of each rank. Its items are dealt out in turn: item i goes to rank i
    modulo the world size, as in torch's DistributedSampler. The items of an incomplete last global batch are dealt out
    to as many ranks as get a batch no smaller than the loader's last batch in a single process, because batch norms and
    some losses fail on a batch that is too small, above all on a single sample. No item is duplicated for this; some
    ranks may get none. Two items per rank suffice where that rule would leave all the work to one rank, because the
    epoch is a single batch, and with `is_padded`. With `is_padded` the first items of the epoch fill the last global
    batch up, so that all ranks get equally many.

    `order` returns the items of an epoch: samples, or whole batches where `batch_size` is None.
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
        """Create the share of `rank`.

        Args:
            order: Returns the items of an epoch in order.
            num_items: Items of an epoch; infinite if unknown.
            batch_size: Items of a rank's batch; None if each item is a whole batch.
            drop_last: Drop an incomplete last global batch.
            is_padded: Fill an incomplete last global batch up with the first items of the epoch.
            smallest_share: Items that a rank needs of an incomplete last global batch; by default the size of the last
                batch in a single process.
            rank: Rank of this worker.
            world_size: Number of ranks.
        """
        self._order = order
        self._batch_size = batch_size
        self._drop_last = drop_last
        self._is_padded = is_padded
        self._required_share = smallest_share
        self._rank = rank
        self._world_size = world_size
        self.batch_size, self.drop_last = batch_size, drop_last
        self.group_size = world_size * (batch_size or 1)
        """Items of a global batch."""
        self.num_items = num_items
        self.num_drawn = 0
        """Batches drawn since the last `start`; a loader may have fetched more than it has yielded."""
        self._num_dealt = self._num_replayed = 0
        self._weights: deque[float] = deque(maxlen=0)
        self._lazy_order = _LazyOrder(lambda: order(0), num_compared=0)
        self.num_batches: float = self.num_batches_after(0)

    def num_batches_after(self, num_dealt: int) -> float:
        """Return the number of batches left of an epoch once `num_dealt` of its items have gone to any ranks."""
        num_groups = max(0.0, self.num_items - num_dealt) / self.group_size
        if math.isinf(num_groups):
            return num_groups
        return math.floor(num_groups) if self._drop_last else math.ceil(num_groups)

    @property
    def is_last_batch_short(self) -> bool:
        """True if the last batch of an epoch has fewer items than there are ranks."""
        if self._is_padded or self._drop_last or math.isinf(self.num_items):
            return False
        return 0 < self.num_items % self.group_size < self._world_size

    def start(self, epoch: int, *, num_dealt: int, weights: deque[float], num_replayed: int = 0) -> None:
        """Set what the iterations from now on yield: the items of `epoch` after its first `num_dealt`.

        Args:
            epoch: Epoch whose order is drawn.
            num_dealt: Items of the epoch to skip.
            weights: Receives the weight of each batch before it is yielded, and a last 0.0 if this rank has no batch of
                the last global batch.
            num_replayed: First batches that get no weight: a loader that continues from its own state skips them
                itself.
        """
        self._num_dealt, self._weights, self._num_replayed = num_dealt, weights, num_replayed
        self._lazy_order = _LazyOrder(partial(self._order, epoch), num_compared=self._num_compared)
        self.num_drawn = 0

    def order_fingerprint(self) -> int:
        """Return the fingerprint of the order since the last `start`; equal on all ranks that draw the same order.

        The order is drawn now unless the loader has begun, so call it only once the loader is being iterated over.
        """
        return self._lazy_order.fingerprint()

    @property
    def _num_compared(self) -> int:
        """Items of an order that make up its fingerprint; few for a sampler without a length."""
        if self._world_size == 1:
            return 0
        return self.group_size if math.isinf(self.num_items) else int(min(self.num_items, _MAX_COMPARED))

    def __len__(self) -> int:
        if math.isinf(self.num_batches):
            raise TypeError("the sampler has no length")
        return int(self.num_batches)

    def __iter__(self) -> Iterator[Any]:
        # The arguments are bound now: the generator runs later, perhaps ahead of the batches. DataLoaders with worker
        # processes call `iter` twice and use the second, so no item may be drawn before the first `next`.
        return self._batches(self._lazy_order, self._num_dealt, self._weights, self._num_replayed)

    def _batches(
        self, lazy_order: "_LazyOrder", num_dealt: int, weights: deque[float], num_replayed: int
    ) -> Iterator[Any]:
        group_size, world_size, rank = self.group_size, self._world_size, self._rank
        items, first = lazy_order.items(), []
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
                # Gradients are averaged over ranks; the weight turns that into the mean over the samples.
                weights.append(len(share) * world_size / len(group))
            if share:
                self.num_drawn += 1
                yield share[0] if self._batch_size is None else share

    def _smallest_share(self, num_items: int) -> int:
        """Return the number of items that a rank needs of a global batch of `num_items` items."""
        if self._batch_size is None:
            return 1
        if self._required_share is not None:
            return self._required_share
        # A single process cuts the items before into full batches, so this is the size of its last batch.
        smallest = num_items % self._batch_size or self._batch_size
        return min(smallest, 2) if self._is_padded or self.num_items <= self._batch_size else smallest


class Feed:
    """Iterator over an epoch's batches on this rank.

    A batch of None means that this rank has no share of an incomplete last global batch; it takes part in its step with
    weight 0.
    """

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


class _LazyOrder:
    """Order of items that is drawn at its first use."""

    def __init__(self, draw: Callable[[], Iterator[Any]], *, num_compared: int) -> None:
        self._draw = draw
        self._num_compared = num_compared
        self._fingerprint: int | None = None
        self._items: Iterator[Any] | None = None

    def fingerprint(self) -> int:
        if self._fingerprint is None:
            self._items = self._draw_items()
        assert self._fingerprint is not None
        return self._fingerprint

    def items(self) -> Iterator[Any]:
        """Return what `fingerprint` has drawn at the first call, and a new draw after that."""
        items, self._items = self._items, None
        return self._draw_items() if items is None else items

    def _draw_items(self) -> Iterator[Any]:
        items = self._draw()
        head = list(islice(items, self._num_compared))
        self._fingerprint = fingerprint_indices(head)
        return chain(head, items)


class SamplerGenerators:
    """Random generators that samplers bring with them; their states continue from epoch to epoch.

    An epoch that is begun again starts from the state that it started from before.
    """

    def __init__(self, samplers: Iterable[Any], *, has_persistent_workers: bool = False) -> None:
        generators = [getattr(sampler, "generator", None) for sampler in samplers]
        self._generators = list(
            {id(generator): generator for generator in generators if isinstance(generator, torch.Generator)}.values()
        )
        self._has_persistent_workers = has_persistent_workers
        self._epoch = -1
        self._epoch_start: list[Tensor] = []
        self._states_to_restore: list[Tensor] = []

    def begin(self, epoch: int) -> None:
        """Begin an epoch: record the generators' states, or restore those of the epoch's start.

        Call it directly before the order of the epoch is drawn: a loader that shares its generator with the sampler has
        drawn the seed of its worker processes by then.
        """
        if epoch == self._epoch:
            self._restore_epoch_start()
        else:
            if self._states_to_restore:
                self._restore(self._states_to_restore)
            self._epoch, self._epoch_start = epoch, self._states()
        self._states_to_restore = []

    def expect_seeding(self) -> None:
        """Record the states before persistent workers are seeded, which the uninterrupted run does not do."""
        self._states_to_restore = self._states()

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "epoch_start": self._epoch_start, "now": self._states()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load states; those of other samplers matter only to an epoch under way, see `begin`."""
        self._epoch, self._epoch_start = state["epoch"], state["epoch_start"]
        if len(state["now"]) == len(self._generators):
            self._restore(state["now"])
            # Persistent workers are seeded once per run: the resumed run draws a seed that the original run did not.
            self._states_to_restore = state["now"] if self._has_persistent_workers else []

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
    """Separate random numbers for the code inside `with`: Python's, NumPy's and torch's on the CPU.

    The random numbers outside are not affected; those inside continue at the next `with`. Costs about 0.2 ms each time.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner_state: RandomState | None = None
        self._outer_state: RandomState | None = None

    def __enter__(self) -> None:
        self._outer_state = RandomState.capture()
        if self._inner_state is not None:
            self._inner_state.restore()
            return
        # torch.manual_seed would also reseed the GPUs.
        torch.default_generator.manual_seed(self._seed)
        random.seed(self._seed)
        if (numpy := sys.modules.get("numpy")) is not None:
            numpy.random.seed(self._seed % 2**32)

    def __exit__(self, *exc_info: object) -> None:
        assert self._outer_state is not None
        self._inner_state = RandomState.capture()
        self._outer_state.restore()


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomState:
    """Random state of this process on the CPU."""

    torch_cpu: Tensor
    python: Any
    numpy: Any
    """None where NumPy has not been imported."""

    @classmethod
    def capture(cls) -> "RandomState":
        """Return the current random state of torch, Python and NumPy."""
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
    """Return whether a batch sampler only cuts what its sampler yields into batches of one size."""
    return type(batch_sampler) is BatchSampler or is_torchdata_sampler(batch_sampler, "BatchSampler")


def _replace_torchdata_shuffle(sampler: Any, loader: "DataLoader[Any]") -> Any:
    """Replace torchdata's RandomSampler by torch's.

    torchdata's iterator keeps a position and creates an unseeded generator where none was given.
    """
    if not is_torchdata_sampler(sampler, "RandomSampler"):
        return sampler
    source = sampler.data_source
    num_samples = None if sampler.num_samples == len(source) else sampler.num_samples
    return RandomSampler(source, sampler.replacement, num_samples, generator=getattr(loader, "generator", None))


def is_torchdata_sampler(sampler: Any, name: str) -> bool:
    """Return whether `sampler` is torchdata's class `name`, without importing torchdata."""
    kind = type(sampler)
    return kind.__module__ == "torchdata.stateful_dataloader.sampler" and kind.__name__ == name


def _is_plain_shuffle(sampler: Any) -> bool:
    return (
        type(sampler) is RandomSampler
        and not sampler.replacement
        and sampler.generator is None
        and sampler.num_samples == len(sampler.data_source)
    )


def _draw_isolated(sampler: Iterable[Any], *, seed: int, num_at_once: int) -> Iterator[Any]:
    return chain.from_iterable(_draw_chunks(sampler, IsolatedRandom(seed), num_at_once))


def _draw_chunks(sampler: Iterable[Any], isolated_random: IsolatedRandom, num_at_once: int) -> Iterator[list[Any]]:
    with isolated_random:
        items = iter(sampler)
    while True:
        with isolated_random:
            chunk = list(islice(items, num_at_once))
        if not chunk:
            return
        yield chunk


def is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def find_samplers(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(sampler): sampler for sampler in samplers if sampler is not None}.values())


def find_parts(loader: Any) -> list[Any]:
    return [loader, *find_samplers(loader), getattr(loader, "dataset", None)]


def is_split_by_user(loader: Any) -> bool:
    return any(isinstance(sampler, DistributedSampler) for sampler in find_samplers(loader))


def is_stateful(loader: Any) -> bool:
    """Return whether a loader has `state_dict` and `load_state_dict`."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def find_stateful_part(loader: Any) -> Any:
    """Return the part that keeps the loader's position: the loader, or a data set that it reads in this process.

    None if neither has a state.
    """
    if is_stateful(loader):
        return loader
    is_in_process = isinstance(loader, DataLoader) and loader.num_workers == 0
    return loader.dataset if is_in_process and is_stateful(loader.dataset) else None


def can_prefetch(loader: Any) -> bool:
    """Return whether fetching a batch early has no effect in this process, because another process makes it."""
    return isinstance(loader, DataLoader) and loader.num_workers > 0 and not is_stateful(loader)


def build_sequence_share(sequence: Sequence[Any], *, rank: int, world_size: int, is_padded: bool = False) -> Share:
    num_batches = len(sequence)
    return Share(
        lambda epoch: iter(range(num_batches)),
        num_items=num_batches,
        is_padded=is_padded,
        rank=rank,
        world_size=world_size,
    )


def copy_loader(loader: "DataLoader[Any]") -> "DataLoader[Any]":
    """Return a shallow copy of the loader that starts processes of its own."""
    clone = copy.copy(loader)
    drop_iterator(clone)
    return clone


def replace_sampler(loader: "DataLoader[Any]", share: Iterable[Any], *, in_order: bool | None) -> "DataLoader[Any]":
    """Return a copy of the loader with other index batches.

    The copy's `__dict__` is changed, because a DataLoader refuses to have its samplers replaced and constructing a new
    one would lose what a subclass added.
    """
    clone = copy_loader(loader)
    clone.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = share
    if in_order is not None:
        clone.__dict__["in_order"] = in_order
    return clone


def describe(loader: Any, *, share: Share | None) -> Description:
    """Return the properties of a loader that must be equal on all ranks.

    `share` is None if the user's sampler splits the loader.
    """
    is_read_by_index = is_map_style(loader) or isinstance(loader, Sequence)
    description: Description = {"way to read it": "by index" if is_read_by_index else "from start to end"}
    if share is not None:
        name = "number of samples" if share.batch_size is not None else "number of batches"
        description[name] = share.num_items
        description["batch size"] = share.batch_size
        description["drop_last"] = share.drop_last
    if is_read_by_index:
        dataset: Any = loader.dataset if isinstance(loader, DataLoader) else loader
        description["length of the data set"] = get_length(dataset)
        description["samples"] = fingerprint_samples(dataset)
    return description


def iterate_share(loader: Iterable[Any], share: Share | None) -> Iterator[Any]:
    """Iterate over the loader's batches of this share; a DataLoader has the share as its batch sampler."""
    if share is not None and isinstance(loader, Sequence):
        return map(loader.__getitem__, share)
    return begin_iteration(loader)

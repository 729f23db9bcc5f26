"""TrainData and EvalData: a user's loader, shared out over the ranks. Worker."""

import copy
import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice, repeat
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from raylit.errors import ModuleError
from raylit.worker.sampling import IndexSource, IsolatedRandom, SamplerGenerators, Share, length_of

_END = object()


class Feed:
    """An epoch's batches of this rank. A batch of None: this rank has no share of an incomplete last global batch, but
    takes part in its step with weight 0."""

    __slots__ = ("_batches", "_is_checked", "_next_weight", "_weights", "weight")

    def __init__(
        self, batches: Iterator[Any], *, weights: deque[float] | None = None, is_checked: bool = False
    ) -> None:
        self.weight = 1.0
        """Of the batch just returned: the loss times this, averaged over the ranks, is the mean over the samples."""
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
            self._mismatch()
        return batch

    def _end(self) -> None:
        if not self._weights:
            raise StopIteration
        self.weight = self._weights.popleft()
        if self.weight > 0.0:
            self._weights.clear()
            self._mismatch()
            raise StopIteration

    def _mismatch(self) -> None:
        if self._is_checked:
            raise ModuleError(
                "the training DataLoader does not yield one batch for each item of its batch sampler, so it cannot be "
                "shared out or continued in mid-epoch: split the data in the loader itself and pass "
                "use_distributed_sampler=False"
            )


class TrainData:
    """A training loader, shared out over the ranks: every sample of an epoch goes to exactly one of them.

    A map-style DataLoader is divided at its sampler, so only a rank's own samples are fetched. The order of an epoch
    is a function of `seed` and the epoch alone; a sampler with a `generator` of its own follows that one, whose state
    goes on from epoch to epoch. A DistributedSampler is taken as the user's own split.

    Any other iterable is run through by every rank, which keeps every `world_size`-th batch; with several ranks it is
    iterated under random numbers of its own, alike on all of them. That an IterableDataset splits itself by rank
    cannot be seen from here: pass use_distributed_sampler=False for it.

    Sized loaders need no communication. Of the others each batch is agreed upon through `agree`: an all-gather of
    every rank's next batch size, 0 where its data has ended. Building a TrainData is collective for these.

    `epoch` draws a number from torch's generator, as iterating a DataLoader does: restore the random state of a
    resumed run after it. A resumed epoch repeats the order, but not the random augmentations that run in a DataLoader's
    worker processes. With `in_order=False` the batches that were trained are not known exactly.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        rank: int,
        world_size: int,
        seed: int,
        shard: bool = True,
        agree: Callable[[int], list[int]] | None = None,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._agree = agree
        self._is_divided = shard and not _is_users_own_split(loader)
        self._epoch_setters = [owner for owner in _parts_of(loader) if callable(getattr(owner, "set_epoch", None))]
        self._generators = SamplerGenerators(
            _samplers_of(loader), has_persistent_workers=getattr(loader, "persistent_workers", False)
        )
        self._share = self._shared(loader)
        self._loader = loader
        if self._share is not None and isinstance(loader, DataLoader):
            # Weights are paired with batches by their order.
            is_order_needed = self._is_divided and world_size > 1
            self._loader = _with_indices(loader, self._share, in_order=True if is_order_needed else None)
        self._must_agree = world_size > 1 and not self._is_even(loader)
        self.num_batches: float = self._count(loader)
        """Per worker and epoch, a worker's None included; infinite if unknown, an estimate for iterables."""

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """The batches from `skip` on. Those of iterables are fetched and thrown away. Ends an earlier Feed."""
        for owner in self._epoch_setters:
            owner.set_epoch(epoch)
        weights: deque[float] = deque()
        is_weighted_by_share = self._share is not None and self._is_divided
        if self._share is not None:
            self._share.start(epoch, skip=skip, weights=weights if is_weighted_by_share else deque(maxlen=0))
            batches = _iterated(self._loader, self._share)
        elif self._is_divided and self._world_size > 1:
            batches = _every_nth(
                self._loader,
                rank=self._rank,
                world_size=self._world_size,
                skip=skip,
                own_random=IsolatedRandom(self._seed + epoch),
            )
        else:
            batches = iter(self._loader)
            _advance(batches, skip)
        if self._must_agree:
            assert self._agree is not None
            return Feed(_agreed(batches, agree=self._agree, rank=self._rank, weights=weights), weights=weights)
        if not is_weighted_by_share:
            return Feed(batches)
        return Feed(batches, weights=weights, is_checked=self._world_size > 1 or skip > 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and CPU tensors: the states of the samplers' own generators."""
        return self._generators.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The epoch under way when the state was taken is replayed if it is asked for again; the others go on from
        where the generators stood."""
        self._generators.load_state_dict(state)

    def _shared(self, loader: Any) -> Share | None:
        """The index batches of this rank; all of them where the loader is not divided; None for a stream."""
        rank, world_size = (self._rank, self._world_size) if self._is_divided else (0, 1)
        if isinstance(loader, Sequence):
            return _share_of_sequence(loader, rank=rank, world_size=world_size)
        if not _is_map_style(loader):
            return None
        source = IndexSource.of(loader)
        seed: int | None = self._seed
        if not self._is_divided:
            source = IndexSource(sampler=loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
            seed = None
        # Without a reference to self: a cycle would keep worker processes alive until the garbage collector comes.
        order = partial(_order, generators=self._generators, source=source, seed=seed, world_size=world_size)
        return Share(
            order,
            num_items=length_of(source.sampler),
            batch_size=source.batch_size,
            drop_last=source.drop_last,
            rank=rank,
            world_size=world_size,
        )

    def _is_even(self, loader: Any) -> bool:
        """Whether every rank knows, without asking, how many batches the others have and of what size."""
        if self._is_divided:
            return self._share is not None
        sampler = getattr(loader, "sampler", None)
        return (
            _is_map_style(loader)
            and type(loader.batch_sampler) in (BatchSampler, type(None))
            and type(sampler) is DistributedSampler
            and sampler.num_replicas == self._world_size
        )

    def _count(self, loader: Iterable[Any]) -> float:
        if self._share is not None and self._is_divided:
            return self._share.num_batches
        num_batches = length_of(loader)
        if self._is_divided and math.isfinite(num_batches):
            num_batches = math.ceil(num_batches / self._world_size)
        if not self._must_agree:
            return num_batches
        # Ranks that stopped at lengths of their own would leave the others waiting in `agree`.
        assert self._agree is not None, f"a loader of world_size={self._world_size} with uneven ranks needs `agree`"
        counts = self._agree(-1 if math.isinf(num_batches) else int(num_batches))
        return math.inf if min(counts) < 0 else max(counts)


class EvalData:
    """A validation, test or prediction loader, shared out over the ranks: batch i of the loader in a single process
    goes to rank i modulo the number of ranks, so each sample is evaluated exactly once; a rank may have one less than
    another. Random samplers follow `seed`, alike on all ranks and in every evaluation, unless they have a
    `generator` of their own.

    Each item is the batch's index in the single process and the batch. A loader that is not divided (`shard=False`, a
    DistributedSampler) counts as if its ranks took turns.
    """

    def __init__(self, loader: Iterable[Any], *, rank: int, world_size: int, seed: int, shard: bool = True) -> None:
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._loader = loader
        self._share: Share | None = None
        self._is_stream = False
        if not shard or _is_users_own_split(loader):
            self.num_batches: float = length_of(loader)
            """Of a worker: an upper bound, since the last global batch may be incomplete; infinite if unknown."""
            return
        num_batches = length_of(loader)
        self.num_batches = num_batches if math.isinf(num_batches) else math.ceil(num_batches / world_size)
        if isinstance(loader, DataLoader) and _is_map_style(loader):
            source = IndexSource.of(loader)
            num_at_once = world_size * (source.batch_size or 1)
            self._share = Share(
                lambda epoch: source.batches(seed=seed, num_at_once=num_at_once),
                num_items=num_batches,
                rank=rank,
                world_size=world_size,
            )
            # An index is paired with its batch by their order.
            self._loader = _with_indices(loader, self._share, in_order=True)
        elif isinstance(loader, Sequence):
            self._share = _share_of_sequence(loader, rank=rank, world_size=world_size)
        else:
            self._is_stream = world_size > 1

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return zip(count(self._rank, self._world_size), self._batches(), strict=False)

    def _batches(self) -> Iterator[Any]:
        if self._is_stream:
            own_random = IsolatedRandom(self._seed)
            return _every_nth(self._loader, rank=self._rank, world_size=self._world_size, skip=0, own_random=own_random)
        return _iterated(self._loader, self._share)


def batch_size_of(batch: Any) -> int:
    """First dimension of the first tensor in the batch; 1 where that has none, or where there is no tensor."""
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


def _is_map_style(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)


def _samplers_of(loader: Any) -> list[Any]:
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)]
    return list({id(sampler): sampler for sampler in found if sampler is not None}.values())


def _parts_of(loader: Any) -> list[Any]:
    return [loader, *_samplers_of(loader), getattr(loader, "dataset", None)]


def _is_users_own_split(loader: Any) -> bool:
    return any(isinstance(sampler, DistributedSampler) for sampler in _samplers_of(loader))


def _order(
    epoch: int, *, generators: SamplerGenerators, source: IndexSource, seed: int | None, world_size: int
) -> Iterator[Any]:
    """A seed of None: the user's own order, drawn from the random numbers of the process."""
    generators.begin(epoch)
    if seed is None:
        return iter(source.sampler)
    return source.order(seed=seed + epoch, num_at_once=world_size * (source.batch_size or 1))


def _share_of_sequence(sequence: Sequence[Any], *, rank: int, world_size: int) -> Share:
    num_batches = len(sequence)
    return Share(lambda epoch: iter(range(num_batches)), num_items=num_batches, rank=rank, world_size=world_size)


def _with_indices(loader: "DataLoader[Any]", share: Share, *, in_order: bool | None) -> "DataLoader[Any]":
    """The same loader with other index batches. Through its `__dict__`, because a DataLoader refuses to have its
    samplers replaced, and making a new one would lose what a subclass added."""
    clone = copy.copy(loader)
    clone.__dict__["sampler" if loader.batch_sampler is None else "batch_sampler"] = share
    clone.__dict__["_iterator"] = None
    if in_order is not None:
        clone.__dict__["in_order"] = in_order
    return clone


def _iterated(loader: Iterable[Any], share: Share | None) -> Iterator[Any]:
    """The loader's batches of this share; a DataLoader has it as its batch sampler."""
    return map(loader.__getitem__, share) if share is not None and isinstance(loader, Sequence) else iter(loader)


def _every_nth(
    stream: Iterable[Any], *, rank: int, world_size: int, skip: int, own_random: IsolatedRandom
) -> Iterator[Any]:
    """Batches `rank`, `rank + world_size`, ... Worker processes start here and now, as with `iter` of the stream."""
    with own_random:
        batches = iter(stream)
        _advance(batches, skip * world_size)
    own_batches = islice(batches, rank, None, world_size)
    # Worker processes have random numbers of their own, seeded by `iter`.
    return own_batches if getattr(stream, "num_workers", 0) > 0 else _under(own_random, own_batches)


def _under(own_random: IsolatedRandom, batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        with own_random:
            batch = next(batches, _END)
        if batch is _END:
            return
        yield batch


def _advance(batches: Iterator[Any], num_batches: int) -> None:
    deque(islice(batches, num_batches), maxlen=0)


def _agreed(
    batches: Iterator[Any], *, agree: Callable[[int], list[int]], rank: int, weights: deque[float]
) -> Iterator[Any]:
    """This rank's batches, then None until the last rank has come to its end. Collective, once a batch."""
    batch: Any = None
    while True:
        if batch is not _END:
            batch = next(batches, _END)
        # An empty batch is not the end of the data.
        sizes = agree(0 if batch is _END else max(1, batch_size_of(batch)))
        if not any(sizes):
            return
        weights.append(sizes[rank] * len(sizes) / sum(sizes))
        yield None if batch is _END else batch

"""TrainData: a user's training loader, shared out over the ranks. Worker."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, DistributedSampler

from raylit.errors import ModuleError
from raylit.worker.loaders import (
    is_map_style,
    is_stateful,
    is_users_own_split,
    iterated,
    may_run_ahead,
    parts_of,
    samplers_of,
    share_of_sequence,
    with_indices,
)
from raylit.worker.sampling import IndexSource, IsolatedRandom, SamplerGenerators, Share, is_plain_batching, length_of
from raylit.worker.streams import advance, every_nth

_END = object()


class Feed:
    """An epoch's batches of this rank. A batch of None: this rank has no share of an incomplete last global batch, but
    takes part in its step with weight 0."""

    __slots__ = ("_batches", "_is_checked", "_next_weight", "_weights", "may_run_ahead", "weight")

    def __init__(
        self,
        batches: Iterator[Any],
        *,
        weights: deque[float] | None = None,
        is_checked: bool = False,
        may_run_ahead: bool = False,
    ) -> None:
        self.weight = 1.0
        """Of the batch just returned: the loss times this, averaged over the ranks, is the mean over the samples."""
        self.may_run_ahead = may_run_ahead
        """A batch may be fetched before the step that comes before it: that has no effect but on the loader."""
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


class TrainSource(Protocol):
    """What the training loop takes its batches from."""

    num_batches: float
    """Per worker and epoch; infinite if unknown."""

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """The batches from `skip` on. Ends an earlier Feed."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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

    A loader with `state_dict` and `load_state_dict` of its own is continued from its state; a DataLoader's only inside
    an epoch.

    With `is_padded` no rank is ever without a batch, for a member of a combination: the first samples of the epoch
    fill up an incomplete last global batch, and where batches are dealt out whole a rank repeats its last one.
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
        is_padded: bool = False,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._agree = agree
        self._is_padded = is_padded
        self._is_divided = shard and not is_users_own_split(loader)
        self._epoch_setters = [owner for owner in parts_of(loader) if callable(getattr(owner, "set_epoch", None))]
        self._generators = SamplerGenerators(
            samplers_of(loader), has_persistent_workers=getattr(loader, "persistent_workers", False)
        )
        self._share = self._shared(loader)
        self._loader: Any = loader
        if self._share is not None and isinstance(loader, DataLoader):
            # Weights are paired with batches by their order.
            is_order_needed = self._is_divided and world_size > 1
            self._loader = with_indices(loader, self._share, in_order=True if is_order_needed else None)
        self._must_agree = world_size > 1 and not self._is_even(loader)
        self._is_stateful = is_stateful(loader)
        self._loader_state: dict[str, Any] | None = None
        """Of a resumed run, to go on from at the next epoch."""
        self._has_begun = False
        self.may_run_ahead = may_run_ahead(loader) and not self._must_agree and not self._is_stateful
        self.num_batches: float = self._count(loader)
        """Per worker and epoch, a worker's None included; infinite if unknown, an estimate for iterables."""
        self.has_exact_length = self._share is not None and math.isfinite(self.num_batches)

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """The batches from `skip` on. Those of iterables are fetched and thrown away. Ends an earlier Feed."""
        for owner in self._epoch_setters:
            owner.set_epoch(epoch)
        num_replayed = skip if self._continues_loader(skip) else 0
        weights: deque[float] = deque()
        is_weighted_by_share = self._share is not None and self._is_divided
        passed: Any = None
        if self._share is not None:
            self._share.start(
                epoch,
                skip=skip - num_replayed,
                num_replayed=num_replayed,
                weights=weights if is_weighted_by_share else deque(maxlen=0),
            )
            batches = iterated(self._loader, self._share)
        else:
            batches = self._streamed(epoch)
            passed = advance(batches, skip - num_replayed)
        if self._must_agree:
            assert self._agree is not None
            last = passed if self._is_padded else None
            agreed = _agreed(
                batches, agree=self._agree, rank=self._rank, weights=weights, is_padded=self._is_padded, last=last
            )
            return Feed(agreed, weights=weights)
        if not is_weighted_by_share:
            return Feed(batches, may_run_ahead=self.may_run_ahead)
        is_checked = self._world_size > 1 or skip > 0
        return Feed(batches, weights=weights, is_checked=is_checked, may_run_ahead=self.may_run_ahead)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and CPU tensors: the states of the samplers' own generators and of a stateful loader."""
        state = self._generators.state_dict()
        # A loader that has not begun may do so to have a state.
        loader_state = self._loader.state_dict() if self._is_stateful and self._has_begun else self._loader_state
        return state if loader_state is None else {**state, "loader": loader_state, "world_size": self._world_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The epoch under way when the state was taken is replayed if it is asked for again; the others go on from
        where the generators stood."""
        self._generators.load_state_dict(state)
        # What a loader has yielded on one of three workers is not what it is to go on with on one of two.
        if self._is_stateful and state.get("world_size") == self._world_size:
            self._loader_state = state["loader"]

    def _continues_loader(self, skip: int) -> bool:
        """Whether the loader goes on from a state of its own that was taken inside the epoch."""
        state, self._loader_state, self._has_begun = self._loader_state, None, True
        # A DataLoader whose epoch has ended begins twice, drawing twice from the generators that the run goes on with.
        if state is None or (skip == 0 and isinstance(self._loader, DataLoader)):
            return False
        self._loader.load_state_dict(state)
        return skip > 0

    def _streamed(self, epoch: int) -> Iterator[Any]:
        if not self._is_divided or self._world_size == 1:
            return iter(self._loader)
        return every_nth(
            self._loader,
            rank=self._rank,
            world_size=self._world_size,
            own_random=IsolatedRandom(self._seed + epoch),
        )

    def _shared(self, loader: Any) -> Share | None:
        """The index batches of this rank; all of them where the loader is not divided; None for a stream."""
        rank, world_size = (self._rank, self._world_size) if self._is_divided else (0, 1)
        if isinstance(loader, Sequence):
            return share_of_sequence(loader, rank=rank, world_size=world_size, is_padded=self._is_padded)
        if not is_map_style(loader):
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
            is_padded=self._is_padded,
            rank=rank,
            world_size=world_size,
        )

    def _is_even(self, loader: Any) -> bool:
        """Whether every rank knows, without asking, how many batches the others have and of what size."""
        if self._is_divided:
            return self._share is not None
        sampler = getattr(loader, "sampler", None)
        return (
            is_map_style(loader)
            and (loader.batch_sampler is None or is_plain_batching(loader.batch_sampler))
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


def _order(
    epoch: int, *, generators: SamplerGenerators, source: IndexSource, seed: int | None, world_size: int
) -> Iterator[Any]:
    """A seed of None: the user's own order, drawn from the random numbers of the process."""
    generators.begin(epoch)
    if seed is None:
        return iter(source.sampler)
    return source.order(seed=seed + epoch, num_at_once=world_size * (source.batch_size or 1))


def _agreed(
    batches: Iterator[Any],
    *,
    agree: Callable[[int], list[int]],
    rank: int,
    weights: deque[float],
    is_padded: bool,
    last: Any,
) -> Iterator[Any]:
    """This rank's batches, then None, or with `is_padded` the last one again, until the last rank has come to its end.
    Collective, once a batch."""
    batch: Any = None
    while True:
        if batch is not _END:
            batch = next(batches, _END)
        # An empty batch is not the end of the data.
        sizes = agree(0 if batch is _END else max(1, batch_size_of(batch)))
        if not any(sizes):
            return
        if not is_padded:
            weights.append(sizes[rank] * len(sizes) / sum(sizes))
            yield None if batch is _END else batch
            continue
        weights.append(1.0)
        last = last if batch is _END else batch
        if last is None:
            raise ModuleError(
                f"rank {rank} has no batch at all of a loader that is combined with others: it yields fewer batches "
                f"than there are workers ({len(sizes)}); make its batches smaller"
            )
        yield last

"""The training data of one worker, with its position, which checkpoints keep."""

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from raylit.errors import ModuleError
from raylit.worker.data.agreement import Description
from raylit.worker.data.batches import Feed, batch_size_of, wrap_uneven
from raylit.worker.data.loader_random import ProcessRandom, SeedingByRank
from raylit.worker.data.sampling import (
    IndexSource,
    IsolatedRandom,
    RandomState,
    SamplerGenerators,
    Share,
    copy_loader,
    describe,
    is_map_style,
    is_plain_batching,
    is_users_own_split,
    iterate_share,
    length_of,
    may_run_ahead,
    parts_of,
    samplers_of,
    share_of_sequence,
    stateful_part,
    with_indices,
)
from raylit.worker.data.sources import Opening, every_nth, open_stream


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """After so many batches of each worker so many items of the epoch's order had gone to the workers together.

    It holds for every number of workers and size of batches: the rest is cut into other batches, its items stay.
    """

    epoch: int = -1
    num_batches: int = 0
    num_items: int = 0
    """Samples; batches where a loader's batches are dealt out whole."""

    @classmethod
    def of(cls, stored: dict[str, Any] | None) -> "Position | None":
        """What `to_dict` gave."""
        return None if stored is None else cls(**stored)

    def to_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}

    def num_items_at(self, num_batches: int, *, group_size: int) -> int:
        """Where the workers are that go on from here with `group_size` items in each step."""
        return self.num_items + (num_batches - self.num_batches) * group_size


_END = object()


class TrainData:
    """A training loader, shared out over the ranks: every sample of an epoch goes to exactly one of them.

    A map-style DataLoader is divided at its sampler, so only a rank's own samples are fetched. The order of an epoch
    is a function of `seed` and the epoch alone; a sampler with a `generator` of its own follows that one, whose state
    goes on from epoch to epoch. A DistributedSampler is taken as the user's own split.

    Any other iterable is run through by every rank, which keeps every `world_size`-th batch; with several ranks it is
    iterated under random numbers of its own, alike on all of them. One that splits itself by rank would be divided
    twice: `compare` gets the first `world_size` batches of an epoch and raises where they are not those of the other
    ranks. Such a stream needs use_distributed_sampler=False.

    Sized loaders need no communication. Of the others each batch is agreed upon through `agree`: an all-gather of
    every rank's next batch size, 0 where its data has ended. Building a TrainData is collective for these.

    `epoch` draws a number from torch's generator, as iterating a DataLoader does: restore the random state of a
    resumed run after it. A resumed epoch repeats the order, and the random augmentations that run in a DataLoader's
    worker processes, where their number has stayed. With `in_order=False` the batches that were trained are not known
    exactly, which is said.

    An epoch that was begun by another number of ranks, or with batches of another size, goes on with every sample that
    nobody has had, in batches of today's size.

    A loader with `state_dict` and `load_state_dict` of its own, or a data set that has them and is read in this
    process, is continued from its state; a DataLoader's only inside an epoch. Without them a stream is run through from
    its start to where it was.

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
        compare: Callable[[list[Any]], None] | None = None,
        is_padded: bool = False,
        is_syncing_batchnorm: bool = False,
    ) -> None:
        """`is_syncing_batchnorm`: a part of a batch may be of a single sample, and each rank needs one."""
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._agree = agree
        self._compare = compare
        self._is_padded = is_padded
        self._smallest_share = 1 if is_syncing_batchnorm else None
        self._is_split_by_sampler = shard and is_users_own_split(loader)
        self._is_divided = shard and not self._is_split_by_sampler
        self._users_loader = loader
        self._epoch_setters = [owner for owner in parts_of(loader) if callable(getattr(owner, "set_epoch", None))]
        self._generators = SamplerGenerators(
            # A DataLoader's own seeds its processes; what another loader has is its own business.
            [*([loader] if isinstance(loader, DataLoader) else ()), *samplers_of(loader)],
            has_persistent_workers=getattr(loader, "persistent_workers", False),
        )
        self._opening = Opening()
        self._share = self._shared(loader)
        self._loader: Any = loader
        if self._share is not None and isinstance(loader, DataLoader):
            # Weights are paired with batches by their order.
            is_order_needed = self._is_divided and world_size > 1
            self._loader = with_indices(loader, self._share, in_order=True if is_order_needed else None)
        has_own_seeds = isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.generator is not None
        if rank > 0 and has_own_seeds and (self._share is not None or not self._is_divided):
            self._loader = copy_loader(self._loader)
            self._loader.worker_init_fn = SeedingByRank(self._loader.worker_init_fn, rank=rank)
        self._must_agree = world_size > 1 and not self._is_even(loader)
        stateful = stateful_part(loader)
        self._stateful = self._loader if stateful is loader else stateful
        self._state: Any = None
        """Of the stateful part in a resumed run, to go on from at the next epoch."""
        self._has_begun = False
        self._origin = Position()
        """Where the loader began what it is iterated over now."""
        self._has_processes = may_run_ahead(loader)
        self._processes: ProcessRandom | None = None
        if isinstance(loader, DataLoader) and self._has_processes and self._share is not None:
            self._processes = ProcessRandom(self._loader)
        self._is_seeding_again = False
        """The next iteration starts persistent processes that the uninterrupted run has had before."""
        self._difference: str | None = None
        """What keeps an epoch that goes on from being exact."""
        self.may_run_ahead = may_run_ahead(loader) and not self._must_agree
        self.num_batches: float = self._count(loader)
        """Per worker and epoch, a worker's None included; infinite if unknown, an estimate for iterables."""
        self.has_exact_length = self._share is not None and math.isfinite(self.num_batches)
        self.has_own_state = self._stateful is not None

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """The batches from `skip` on. Those of streams are fetched and thrown away. Ends an earlier Feed."""
        for owner in self._epoch_setters:
            owner.set_epoch(epoch)
        origin = self._origin_in(epoch, skip)
        is_continued = self._continues_loader(skip)
        if not is_continued:
            origin = Position(epoch=epoch, num_batches=skip, num_items=self._num_dealt(origin, skip))
        self._origin = origin
        if skip > 0 and self._difference is not None and self._rank == 0:
            warnings.warn(self._difference, stacklevel=2)
        self._difference = None
        weights: deque[float] = deque()
        is_weighted_by_share = self._share is not None and self._is_divided
        passed: Any = None
        if self._share is not None:
            batches = self._shared_out(self._share, skip, weights if is_weighted_by_share else deque(maxlen=0))
        else:
            batches, passed = self._streamed(epoch, num_passed=0 if is_continued else origin.num_items)
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

    def num_left(self, epoch: int, num_done: int) -> float:
        num_dealt = self._num_dealt(self._origin_in(epoch, num_done), num_done)
        if self._share is not None and self._is_divided:
            return self._share.num_batches_after(num_dealt)
        return max(0.0, self.num_batches - num_dealt // self._group_size)

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        """Plain values and CPU tensors."""
        # In a combination there are loaders that the epoch has not come to.
        origin = self._origin if num_done >= self._origin.num_batches else Position()
        position = replace(origin, num_batches=num_done, num_items=self._num_dealt(origin, num_done))
        state = {
            **self._generators.state_dict(),
            "position": position.to_dict(),
            "num_items": self._num_items,
            "world_size": self._world_size,
            "has_begun": self._has_begun,
            "opening": self._opening.state,
        }
        if self._processes is not None:
            assert self._share is not None
            num_given = min(num_done - origin.num_batches, self._share.num_drawn)
            state["processes"] = self._processes.state_dict(num_given=num_given)
        # A loader that has not begun may do so to have a state.
        of_loader = self._stateful.state_dict() if self._stateful is not None and self._has_begun else self._state
        return state if of_loader is None else {**state, "loader": of_loader, "origin": origin.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The epoch under way when the state was taken is replayed or continued if it is asked for again; the others go
        on from where the generators stood."""
        self._generators.load_state_dict(state)
        self._opening.state = state.get("opening")
        self._origin = Position.of(state.get("position")) or Position()
        is_alike = state.get("world_size") == self._world_size
        is_stream = self._share is None and self._is_divided
        # What a loader has yielded on one of three workers is not what it is to go on with on one of two; but a stream
        # stands at the same place on all of them.
        if self._stateful is not None and "loader" in state and (is_alike or is_stream):
            self._state = state["loader"]
            if self._stateful is self._loader and self._share is not None:
                self._origin = Position.of(state["origin"]) or self._origin
        if is_alike and self._processes is not None:
            self._processes.load_state_dict(state.get("processes"))
        is_persistent = self._has_processes and self._loader.persistent_workers
        self._is_seeding_again = is_persistent and state.get("has_begun", False)
        self._difference = self._difference_to(state, is_alike=is_alike)

    @property
    def is_last_batch_short(self) -> bool:
        return self._share is not None and self._is_divided and self._share.is_last_batch_short

    def descriptions(self) -> list[Description]:
        if not self._is_divided and not self._is_split_by_sampler:
            return [{}]
        description = describe(self._users_loader, share=self._share if self._is_divided else None)
        if not self._is_divided and not self._must_agree:
            description["number of batches"] = self.num_batches
        return [description]

    def order_fingerprint(self) -> int:
        """Call it after `epoch`."""
        return self._share.order_fingerprint() if self._share is not None and self._is_divided else 0

    def _origin_in(self, epoch: int, num_done: int) -> Position:
        """Where the loader began, if that is before `num_done` batches of this epoch; else at the epoch's start."""
        origin = self._origin
        is_before = origin.epoch == epoch and origin.num_batches <= num_done
        return origin if is_before else Position(epoch=epoch)

    def _num_dealt(self, origin: Position, num_done: int) -> int:
        num_dealt = origin.num_items_at(num_done, group_size=self._group_size)
        return num_dealt if self._num_items is None else min(num_dealt, self._num_items)

    @property
    def _group_size(self) -> int:
        """Items of a global batch."""
        if self._share is not None:
            return self._share.group_size
        return self._world_size if self._is_divided else 1

    @property
    def _num_items(self) -> int | None:
        """Of an epoch; None where that is not known exactly."""
        is_known = self._share is not None and math.isfinite(self._share.num_items)
        return int(self._share.num_items) if self._share is not None and is_known else None

    def _difference_to(self, state: dict[str, Any], *, is_alike: bool) -> str | None:
        if not self._is_divided and not is_alike:
            return (
                f"the epoch under way was begun by {state.get('world_size')} workers and goes on with "
                f"{self._world_size}, but its samples are split by the loader itself: some of them may be repeated or "
                "left out"
            )
        before, now = state.get("num_items"), self._num_items
        if before is not None and now is not None and before != now:
            return (
                f"the epoch under way was begun with {before} samples or batches and the loader has {now} now: their "
                "order is another one, so that some of them may be repeated or left out"
            )
        if self._has_processes and not getattr(self._loader, "in_order", True):
            return (
                "the DataLoader hands its batches out as they come (in_order=False), so that some of the epoch under "
                "way may be repeated or left out: with in_order=True it goes on exactly"
            )
        return None

    def _continues_loader(self, skip: int) -> bool:
        """Whether the loader goes on from a state of its own that was taken inside the epoch."""
        state, self._state, self._has_begun = self._state, None, True
        if state is None:
            return False
        if self._stateful is not self._loader and self._share is not None:
            # A data set that is read by index: where to go on is its sampler's business.
            self._stateful.load_state_dict(state)
            return False
        # A DataLoader whose epoch has ended begins twice, drawing twice from the generators that the run goes on with.
        if skip == 0 and isinstance(self._loader, DataLoader):
            return False
        self._stateful.load_state_dict(state)
        return skip > 0

    def _shared_out(self, share: Share, skip: int, weights: deque[float]) -> Iterator[Any]:
        origin = self._origin
        if self._processes is not None:
            if self._processes.is_restart_due():
                self._is_seeding_again = True
                self._generators.expect_seeding()
            self._processes.begin(self._loader, num_drawn=share.num_drawn, is_going_on=skip > 0)
        self._opening.num_passed = origin.num_items
        num_replayed = skip - origin.num_batches
        share.start(origin.epoch, num_dealt=origin.num_items, num_replayed=num_replayed, weights=weights)
        outside = RandomState.take() if self._is_seeding_again else None
        batches = iterate_share(self._loader, share)
        if outside is not None:
            outside.restore()
        self._is_seeding_again = False
        return batches

    def _streamed(self, epoch: int, *, num_passed: int) -> tuple[Iterator[Any], Any]:
        """The batches of this rank, and the last one of those that were passed over."""
        if num_passed > 0 and self._rank == 0:
            warnings.warn(
                f"the training loader is a stream without a state_dict: the {num_passed} batches of this epoch that "
                "the run has had are fetched and thrown away",
                stacklevel=3,
            )
        self._opening.num_passed = num_passed
        self._generators.begin(epoch)
        if not self._is_divided or self._world_size == 1:
            return open_stream(self._loader, opening=self._opening)
        return every_nth(
            self._loader,
            rank=self._rank,
            world_size=self._world_size,
            own_random=IsolatedRandom(self._seed + epoch),
            opening=self._opening,
            compare=self._compare,
        )

    def _shared(self, loader: Any) -> Share | None:
        """The index batches of this rank; all of them where the loader is not divided; None for a stream."""
        rank, world_size = (self._rank, self._world_size) if self._is_divided else (0, 1)
        if isinstance(loader, Sequence):
            return share_of_sequence(loader, rank=rank, world_size=world_size, is_padded=self._is_padded)
        if not is_map_style(loader):
            return None
        # Without a reference to self: a cycle would keep worker processes alive until the garbage collector comes.
        if self._is_divided:
            source = IndexSource.of(loader)
            order = partial(_order, generators=self._generators, source=source, seed=self._seed, world_size=world_size)
        else:
            source = IndexSource(sampler=loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
            order = partial(_own_order, generators=self._generators, source=source, opening=self._opening)
        return Share(
            order,
            num_items=length_of(source.sampler),
            batch_size=source.batch_size,
            drop_last=source.drop_last,
            is_padded=self._is_padded,
            smallest_share=self._smallest_share,
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


def _order(
    epoch: int, *, generators: SamplerGenerators, source: IndexSource, seed: int, world_size: int
) -> Iterator[Any]:
    generators.begin(epoch)
    return source.order(seed=seed + epoch, num_at_once=world_size * (source.batch_size or 1))


def _own_order(epoch: int, *, generators: SamplerGenerators, source: IndexSource, opening: Opening) -> Iterator[Any]:
    """The user's own, drawn from the random numbers of the process."""
    generators.begin(epoch)
    passed = opening.num_passed
    items, _ = open_stream(source.sampler, opening=opening)
    return chain(range(passed), items)


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
            weight = sizes[rank] * len(sizes) / sum(sizes)
            weights.append(weight if len(set(sizes)) == 1 else wrap_uneven(weight))
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

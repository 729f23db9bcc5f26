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
from raylit.worker.data.batches import get_batch_size
from raylit.worker.data.loader_processes import ProcessRandom, RankSeeding
from raylit.worker.data.sampling import (
    Feed,
    IndexSource,
    IsolatedRandom,
    RandomState,
    SamplerGenerators,
    Share,
    build_sequence_share,
    can_prefetch,
    copy_loader,
    describe,
    find_parts,
    find_samplers,
    find_stateful_part,
    get_length,
    is_map_style,
    is_plain_batching,
    is_split_by_user,
    iterate_share,
    replace_sampler,
    wrap_uneven,
)
from raylit.worker.data.sources import EpochRandomState, open_stream, shard_stream


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Position in an epoch: the batches of each worker so far, and the items that all workers together had by then.

    It holds for every world size and batch size: the items that are left stay the same and are cut into other batches.
    """

    epoch: int = -1
    num_batches: int = 0
    num_items: int = 0
    """Samples; batches where a loader's batches are dealt out whole."""

    @classmethod
    def from_dict(cls, stored: dict[str, Any] | None) -> "Position | None":
        """Return the position that `to_dict` has stored; None for None."""
        return None if stored is None else cls(**stored)

    def to_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}

    def num_items_at(self, num_batches: int, *, group_size: int) -> int:
        """Return the items dealt out at batch `num_batches`, at `group_size` items per step from this position on."""
        return self.num_items + (num_batches - self.num_batches) * group_size


_END = object()


class TrainData:
    """Training loader, shared out over the ranks: every sample of an epoch goes to exactly one of them.

    A map-style DataLoader is divided at its sampler, so only a rank's own samples are fetched. The order of an epoch is
    a function of `seed` and the epoch alone; a sampler with its own `generator` follows that one, whose state continues
    from epoch to epoch. A DistributedSampler is taken as the user's own split.

    Any other iterable is read by every rank, which keeps every `world_size`-th batch; with several ranks it is iterated
    under isolated random numbers, equal on all of them. A stream that splits itself by rank would be divided twice:
    `compare` gets the first `world_size` batches of an epoch and raises where they differ between ranks. Such a stream
    needs use_distributed_sampler=False.

    Sized loaders need no communication. For the others the ranks agree on each batch through `agree`: an all-gather of
    every rank's next batch size, 0 where its data has ended. Building a TrainData is collective for these.

    `epoch` draws a number from torch's generator, as iterating a DataLoader does: restore the random state of a resumed
    run after it. A resumed epoch repeats the order and, with an unchanged number of processes, the random augmentations
    that run in a DataLoader's worker processes. With `in_order=False` the batches that were trained are not known
    exactly; a warning says so.

    An epoch that was begun with another world size or batch size continues with every sample that no rank has had, in
    batches of the current size.

    A loader with its own `state_dict` and `load_state_dict`, or a data set that has them and is read in this process,
    continues from its state; a DataLoader only inside an epoch. A stream without them is read from its start to its
    position.

    With `is_padded`, for a member of a combination, no rank is ever without a batch: the first samples of the epoch
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
        """Divide the loader. Collective for loaders that need `agree`.

        Args:
            loader: The user's loader.
            rank: Rank of this worker.
            world_size: Number of ranks.
            seed: Seed of the order of samples.
            shard: False if the user has divided the data already.
            agree: All-gathers one integer of each rank.
            compare: Compares the first batches of a stream over the ranks; collective.
            is_padded: Give every rank a batch in every step.
            is_syncing_batchnorm: A part of a batch may be a single sample, and each rank needs one.
        """
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._agree = agree
        self._compare = compare
        self._is_padded = is_padded
        self._smallest_share = 1 if is_syncing_batchnorm else None
        self._is_split_by_sampler = shard and is_split_by_user(loader)
        self._is_divided = shard and not self._is_split_by_sampler
        self._user_loader = loader
        self._epoch_setters = [owner for owner in find_parts(loader) if callable(getattr(owner, "set_epoch", None))]
        self._generators = SamplerGenerators(
            # A DataLoader's own generator seeds its processes; other loaders' generators are not touched.
            [*([loader] if isinstance(loader, DataLoader) else ()), *find_samplers(loader)],
            has_persistent_workers=getattr(loader, "persistent_workers", False),
        )
        self._start_state = EpochRandomState()
        self._share = self._build_share(loader)
        self._loader: Any = loader
        if self._share is not None and isinstance(loader, DataLoader):
            # Weights and batches are paired by their order.
            is_order_needed = self._is_divided and world_size > 1
            self._loader = replace_sampler(loader, self._share, in_order=True if is_order_needed else None)
        has_own_seeds = isinstance(loader, DataLoader) and loader.num_workers > 0 and loader.generator is not None
        if rank > 0 and has_own_seeds and (self._share is not None or not self._is_divided):
            self._loader = copy_loader(self._loader)
            self._loader.worker_init_fn = RankSeeding(self._loader.worker_init_fn, rank=rank)
        self._needs_agreement = world_size > 1 and not self._has_known_sizes(loader)
        stateful = find_stateful_part(loader)
        self._stateful = self._loader if stateful is loader else stateful
        self._loader_state: Any = None
        """State of the stateful part in a resumed run, which the next epoch continues from."""
        self._has_begun = False
        self._loader_origin = Position()
        """Position at which the loader's current iteration began."""
        self._has_processes = can_prefetch(loader)
        self._process_random: ProcessRandom | None = None
        if isinstance(loader, DataLoader) and self._has_processes and self._share is not None:
            self._process_random = ProcessRandom(self._loader)
        self._is_reseeding = False
        """The next iteration starts persistent processes that the uninterrupted run has started before."""
        self._resume_warning: str | None = None
        """Why a continued epoch is not exact, or None."""
        self.can_prefetch = can_prefetch(loader) and not self._needs_agreement
        self.num_batches: float = self._count_batches(loader)
        """Batches per worker and epoch, including those of None; infinite if unknown, an estimate for iterables."""
        self.has_exact_length = self._share is not None and math.isfinite(self.num_batches)
        self.has_own_state = self._stateful is not None

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """Begin an epoch at batch `skip` and return its feed; an earlier feed ends.

        The first `skip` batches of a stream are fetched and discarded.
        """
        for owner in self._epoch_setters:
            owner.set_epoch(epoch)
        origin = self._find_origin(epoch, skip)
        is_continued = self._restore_loader(skip)
        if not is_continued:
            origin = Position(epoch=epoch, num_batches=skip, num_items=self._count_dealt(origin, skip))
        self._loader_origin = origin
        if skip > 0 and self._resume_warning is not None and self._rank == 0:
            warnings.warn(self._resume_warning, stacklevel=2)
        self._resume_warning = None
        weights: deque[float] = deque()
        is_divided_share = self._share is not None and self._is_divided
        last_skipped: Any = None
        if self._share is not None:
            batches = self._open_share(self._share, skip, weights if is_divided_share else deque(maxlen=0))
        else:
            batches, last_skipped = self._open_stream(epoch, num_passed=0 if is_continued else origin.num_items)
        if self._needs_agreement:
            assert self._agree is not None
            last = last_skipped if self._is_padded else None
            agreed_batches = _agree_on_batches(
                batches, agree=self._agree, rank=self._rank, weights=weights, is_padded=self._is_padded, last=last
            )
            return Feed(agreed_batches, weights=weights)
        if not is_divided_share:
            return Feed(batches, can_prefetch=self.can_prefetch)
        is_checked = self._world_size > 1 or skip > 0
        return Feed(batches, weights=weights, is_checked=is_checked, can_prefetch=self.can_prefetch)

    def num_left(self, epoch: int, num_done: int) -> float:
        num_dealt = self._count_dealt(self._find_origin(epoch, num_done), num_done)
        if self._share is not None and self._is_divided:
            return self._share.num_batches_after(num_dealt)
        return max(0.0, self.num_batches - num_dealt // self._group_size)

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        """Return the state after `num_done` batches of the epoch, as plain values and CPU tensors."""
        # In a combination the epoch may not have reached this loader.
        origin = self._loader_origin if num_done >= self._loader_origin.num_batches else Position()
        position = replace(origin, num_batches=num_done, num_items=self._count_dealt(origin, num_done))
        state = {
            **self._generators.state_dict(),
            "position": position.to_dict(),
            "num_items": self._num_items,
            "world_size": self._world_size,
            "has_begun": self._has_begun,
            "opening": self._start_state.state,
        }
        if self._process_random is not None:
            assert self._share is not None
            num_given = min(num_done - origin.num_batches, self._share.num_drawn)
            state["processes"] = self._process_random.state_dict(num_given=num_given)
        # Reading the state of a loader that has not begun could start its iteration.
        loader_state = (
            self._stateful.state_dict() if self._stateful is not None and self._has_begun else self._loader_state
        )
        return state if loader_state is None else {**state, "loader": loader_state, "origin": origin.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state: its epoch is replayed or continued when it is begun again.

        Other epochs continue from the states of the generators.
        """
        self._generators.load_state_dict(state)
        self._start_state.state = state.get("opening")
        self._loader_origin = Position.from_dict(state.get("position")) or Position()
        is_same_world_size = state.get("world_size") == self._world_size
        is_stream = self._share is None and self._is_divided
        # With another world size a loader's own state is of no use, but a stream's: it has the same position on all
        # ranks.
        if self._stateful is not None and "loader" in state and (is_same_world_size or is_stream):
            self._loader_state = state["loader"]
            if self._stateful is self._loader and self._share is not None:
                self._loader_origin = Position.from_dict(state["origin"]) or self._loader_origin
        if is_same_world_size and self._process_random is not None:
            self._process_random.load_state_dict(state.get("processes"))
        is_persistent = self._has_processes and self._loader.persistent_workers
        self._is_reseeding = is_persistent and state.get("has_begun", False)
        self._resume_warning = self._describe_difference(state, is_same_world_size=is_same_world_size)

    @property
    def is_last_batch_short(self) -> bool:
        return self._share is not None and self._is_divided and self._share.is_last_batch_short

    def descriptions(self) -> list[Description]:
        if not self._is_divided and not self._is_split_by_sampler:
            return [{}]
        description = describe(self._user_loader, share=self._share if self._is_divided else None)
        if not self._is_divided and not self._needs_agreement:
            description["number of batches"] = self.num_batches
        return [description]

    def order_fingerprint(self) -> int:
        """Return the fingerprint of the epoch's order; call it after `epoch`."""
        return self._share.order_fingerprint() if self._share is not None and self._is_divided else 0

    def _find_origin(self, epoch: int, num_done: int) -> Position:
        """Return where the loader began, if that is before batch `num_done` of this epoch; else the epoch's start."""
        origin = self._loader_origin
        is_before = origin.epoch == epoch and origin.num_batches <= num_done
        return origin if is_before else Position(epoch=epoch)

    def _count_dealt(self, origin: Position, num_done: int) -> int:
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
        """Items of an epoch; None where that is not known exactly."""
        is_known = self._share is not None and math.isfinite(self._share.num_items)
        return int(self._share.num_items) if self._share is not None and is_known else None

    def _describe_difference(self, state: dict[str, Any], *, is_same_world_size: bool) -> str | None:
        if not self._is_divided and not is_same_world_size:
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

    def _restore_loader(self, skip: int) -> bool:
        """Load the loader's own state, if there is one, and return whether it continues inside the epoch from it."""
        state, self._loader_state, self._has_begun = self._loader_state, None, True
        if state is None:
            return False
        if self._stateful is not self._loader and self._share is not None:
            # A data set that is read by index has no position of its own; its sampler has.
            self._stateful.load_state_dict(state)
            return False
        # A DataLoader restored at an epoch's end would begin twice and draw twice from the run's generators.
        if skip == 0 and isinstance(self._loader, DataLoader):
            return False
        self._stateful.load_state_dict(state)
        return skip > 0

    def _open_share(self, share: Share, skip: int, weights: deque[float]) -> Iterator[Any]:
        origin = self._loader_origin
        if self._process_random is not None:
            if self._process_random.is_restart_due():
                self._is_reseeding = True
                self._generators.expect_seeding()
            self._process_random.begin(self._loader, num_drawn=share.num_drawn, is_going_on=skip > 0)
        self._start_state.num_passed = origin.num_items
        num_replayed = skip - origin.num_batches
        share.start(origin.epoch, num_dealt=origin.num_items, num_replayed=num_replayed, weights=weights)
        random_state = RandomState.capture() if self._is_reseeding else None
        batches = iterate_share(self._loader, share)
        if random_state is not None:
            random_state.restore()
        self._is_reseeding = False
        return batches

    def _open_stream(self, epoch: int, *, num_passed: int) -> tuple[Iterator[Any], Any]:
        """Return the batches of this rank and the last one of those that were skipped."""
        if num_passed > 0 and self._rank == 0:
            warnings.warn(
                f"the training loader is a stream without a state_dict: the {num_passed} batches of this epoch that "
                "the run has had are fetched and thrown away",
                stacklevel=3,
            )
        self._start_state.num_passed = num_passed
        self._generators.begin(epoch)
        if not self._is_divided or self._world_size == 1:
            return open_stream(self._loader, start_state=self._start_state)
        return shard_stream(
            self._loader,
            rank=self._rank,
            world_size=self._world_size,
            isolated_random=IsolatedRandom(self._seed + epoch),
            start_state=self._start_state,
            compare=self._compare,
        )

    def _build_share(self, loader: Any) -> Share | None:
        """Return the index batches of this rank; all of them where the loader is not divided; None for a stream."""
        rank, world_size = (self._rank, self._world_size) if self._is_divided else (0, 1)
        if isinstance(loader, Sequence):
            return build_sequence_share(loader, rank=rank, world_size=world_size, is_padded=self._is_padded)
        if not is_map_style(loader):
            return None
        # No reference to self: a cycle would keep worker processes alive until a garbage collection.
        if self._is_divided:
            source = IndexSource.from_loader(loader)
            order = partial(
                _draw_order, generators=self._generators, source=source, seed=self._seed, world_size=world_size
            )
        else:
            source = IndexSource(sampler=loader.sampler if loader.batch_sampler is None else loader.batch_sampler)
            order = partial(_draw_user_order, generators=self._generators, source=source, start_state=self._start_state)
        return Share(
            order,
            num_items=get_length(source.sampler),
            batch_size=source.batch_size,
            drop_last=source.drop_last,
            is_padded=self._is_padded,
            smallest_share=self._smallest_share,
            rank=rank,
            world_size=world_size,
        )

    def _has_known_sizes(self, loader: Any) -> bool:
        """Return whether every rank knows the number and sizes of the other ranks' batches without communication."""
        if self._is_divided:
            return self._share is not None
        sampler = getattr(loader, "sampler", None)
        return (
            is_map_style(loader)
            and (loader.batch_sampler is None or is_plain_batching(loader.batch_sampler))
            and type(sampler) is DistributedSampler
            and sampler.num_replicas == self._world_size
        )

    def _count_batches(self, loader: Iterable[Any]) -> float:
        if self._share is not None and self._is_divided:
            return self._share.num_batches
        num_batches = get_length(loader)
        if self._is_divided and math.isfinite(num_batches):
            num_batches = math.ceil(num_batches / self._world_size)
        if not self._needs_agreement:
            return num_batches
        # Ranks that stopped at different lengths would leave the others waiting in `agree`.
        assert self._agree is not None, f"a loader of world_size={self._world_size} with uneven ranks needs `agree`"
        counts = self._agree(-1 if math.isinf(num_batches) else int(num_batches))
        return math.inf if min(counts) < 0 else max(counts)


def _draw_order(
    epoch: int, *, generators: SamplerGenerators, source: IndexSource, seed: int, world_size: int
) -> Iterator[Any]:
    generators.begin(epoch)
    return source.order(seed=seed + epoch, num_at_once=world_size * (source.batch_size or 1))


def _draw_user_order(
    epoch: int, *, generators: SamplerGenerators, source: IndexSource, start_state: EpochRandomState
) -> Iterator[Any]:
    """Draw the order of the user's own sampler from the random numbers of the process."""
    generators.begin(epoch)
    num_skipped = start_state.num_passed
    items, _ = open_stream(source.sampler, start_state=start_state)
    return chain(range(num_skipped), items)


def _agree_on_batches(
    batches: Iterator[Any],
    *,
    agree: Callable[[int], list[int]],
    rank: int,
    weights: deque[float],
    is_padded: bool,
    last: Any,
) -> Iterator[Any]:
    """Yield this rank's batches until the last rank's data has ended. Collective, once per batch.

    A rank whose data has ended yields None, or with `is_padded` its last batch again.
    """
    batch: Any = None
    while True:
        if batch is not _END:
            batch = next(batches, _END)
        # An empty batch counts as 1: it is not the end of the data.
        sizes = agree(0 if batch is _END else max(1, get_batch_size(batch)))
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

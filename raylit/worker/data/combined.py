"""Several loaders as one, and a loader cut to the batches that a run overfits."""

import copy
import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from raylit.compat.torch_core import drop_iterator
from raylit.config import CombinationName
from raylit.core.combined_loader import CombinedLoader, holds_loaders, num_steps, stepwise
from raylit.worker.data.agreement import Description, fingerprint_indices
from raylit.worker.data.batches import TrainSource
from raylit.worker.data.eval_data import EvalData
from raylit.worker.data.sampling import Feed, is_map_style, is_plain_batching, is_split_by_user, is_torchdata_sampler
from raylit.worker.data.sources import skip_batches
from raylit.worker.data.train_data import TrainData


class RepeatedEpoch:
    """TrainSource whose epochs are all like the first: samplers that draw an order draw it again."""

    def __init__(self, source: TrainSource) -> None:
        self._source = source
        self.num_batches = source.num_batches
        self.has_exact_length = source.has_exact_length
        self.has_own_state = source.has_own_state

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        return self._source.epoch(0, skip=skip)

    def num_left(self, epoch: int, num_done: int) -> float:
        return self._source.num_left(0, num_done)

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        return self._source.state_dict(num_done=num_done)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)

    @property
    def is_last_batch_short(self) -> bool:
        return self._source.is_last_batch_short

    def descriptions(self) -> list[Description]:
        return self._source.descriptions()

    def order_fingerprint(self) -> int:
        return self._source.order_fingerprint()


def remove_shuffling(loader: Any) -> Any:
    """Return the loader, or a collection of loaders, in the order of its data set; warn where it was shuffled.

    Samplers that torch does not define are kept: their order is the same in every epoch, which is what matters.
    """
    if isinstance(loader, CombinedLoader):
        return CombinedLoader(
            loader.restore_shape([remove_shuffling(member) for member in loader.flattened]), loader.mode
        )
    if isinstance(loader, dict) or holds_loaders(loader):
        return remove_shuffling(CombinedLoader(loader)).iterables
    if not is_map_style(loader):
        return loader
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        sampler = _replace_shuffling_sampler(loader.sampler, loader)
    else:
        sampler = (
            _replace_shuffling_sampler(batch_sampler.sampler, loader) if is_plain_batching(batch_sampler) else None
        )
    if sampler is None:
        return loader
    warnings.warn(
        "overfit_batches: the training loader shuffles; its batches are now taken in the order of the data set",
        stacklevel=2,
    )
    clone = copy.copy(loader)
    clone.__dict__["sampler"] = sampler
    drop_iterator(clone)
    if batch_sampler is not None:
        batching = copy.copy(batch_sampler)
        batching.sampler = sampler
        clone.__dict__["batch_sampler"] = batching
    return clone


def _replace_shuffling_sampler(sampler: Any, loader: "DataLoader[Any]") -> Any:
    """Return a sampler in data-set order for one that shuffles; None where it does not or is unknown."""
    if isinstance(sampler, DistributedSampler):
        if not sampler.shuffle:
            return None
        split = copy.copy(sampler)
        split.shuffle = False
        return split
    if isinstance(sampler, SubsetRandomSampler):
        return list(sampler.indices)
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)) or is_torchdata_sampler(sampler, "RandomSampler"):
        dataset: Any = loader.dataset
        return SequentialSampler(dataset)
    return None


_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Distance between the seeds of members; with one seed, loaders of one length would be shuffled alike."""
_PASS_STRIDE = 1_000_000
"""Added to the epoch that a loader's samplers get, for each further pass over it in the same epoch."""


def build_train_source(
    loader: Any,
    *,
    combination: CombinationName,
    rank: int,
    world_size: int,
    seed: int,
    shard: bool,
    agree: Callable[[int], list[int]],
    compare: Callable[[list[Any]], None] | None = None,
    is_syncing_batchnorm: bool = False,
) -> TrainSource:
    """Build the source of one loader or of several. Collective.

    Several loaders are a CombinedLoader, or a bare collection, which is combined by `combination`. The other arguments
    are those of `TrainData`.
    """
    loader = combine_loaders(loader, combination)
    make = partial(
        TrainData,
        rank=rank,
        world_size=world_size,
        shard=shard,
        agree=agree,
        compare=compare,
        is_syncing_batchnorm=is_syncing_batchnorm,
    )
    if not isinstance(loader, CombinedLoader):
        return make(loader, seed=seed)
    return CombinedTrainData(loader, make=make, seed=seed)


def combine_loaders(loader: Any, combination: CombinationName) -> Any:
    """Return a bare collection as a CombinedLoader, and any other loader unchanged."""
    is_collection = isinstance(loader, dict) or holds_loaders(loader)
    return CombinedLoader(loader, combination) if is_collection else loader


class CombinedTrainData:
    """Training loaders of a combination, each a TrainData. Building it is collective.

    A loader that is read more than once in an epoch has a different order in each pass. What TrainData says of resumed
    epochs holds for each loader. With "max_size_cycle" or "sequential" and an iterable among the loaders a resumed
    epoch is replayed from its start, step by step; it is exact if the world size is unchanged.
    """

    def __init__(self, combined: CombinedLoader, *, make: Callable[..., TrainData], seed: int) -> None:
        self._combined = combined
        self._members = [
            make(loader, seed=(seed + index * _SEED_STRIDE) % 2**63, is_padded=combined.mode != "sequential")
            for index, loader in enumerate(combined.flattened)
        ]
        lengths = [member.num_batches for member in self._members]
        has_lengths = all(member.has_exact_length for member in self._members)
        self._is_replayed = combined.mode in ("max_size_cycle", "sequential") and not has_lengths
        """The position of an epoch in its loaders can only be found by replaying it from its start."""
        self.num_batches: float = num_steps(lengths, mode=combined.mode)
        """Batches per worker and epoch; infinite if unknown, an estimate where a loader is an iterable."""
        self.has_exact_length = has_lengths
        self.has_own_state = any(member.has_own_state for member in self._members)
        self._epoch = -1
        self._num_done_before = 0
        """Steps of the epoch before the current iteration, or this run, began."""
        self._start_positions = [_PassPosition() for _ in self._members]
        """Position of each loader at that step."""

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """Begin an epoch at combined batch `skip` and return its feed; an earlier feed ends."""
        positions = [_PassPosition() for _ in self._members] if self._is_replayed else self._find_positions(epoch, skip)
        self._epoch, self._num_done_before, self._start_positions = epoch, skip, positions
        if self._combined.mode == "sequential" and self._members:
            return self._chain_members(epoch, positions, num_passed=skip if self._is_replayed else 0)
        steps = self._open_steps(epoch, positions)
        if self._is_replayed:
            skip_batches(steps, skip)
        # Beginning another pass draws from torch's generator.
        is_cycling = self._combined.mode == "max_size_cycle"
        can_prefetch = not is_cycling and all(member.can_prefetch for member in self._members)
        return Feed(map(self._combined.restore_shape, steps), can_prefetch=can_prefetch)

    def num_left(self, epoch: int, num_done: int) -> float:
        if self._is_replayed or not self._members:
            return max(0, self.num_batches - num_done)
        positions = self._find_positions(epoch, num_done)
        lefts = [self._count_left_in_pass(epoch, index, position) for index, position in enumerate(positions)]
        if self._combined.mode == "max_size_cycle":
            left_in_first_pass = [left for left, position in zip(lefts, positions, strict=True) if position.number == 0]
            is_empty = any(member.num_batches == 0 for member in self._members)
            return 0 if is_empty else max(left_in_first_pass, default=0)
        return num_steps(lefts, mode=self._combined.mode)

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        positions = self._start_positions if self._is_replayed else self._find_positions(self._epoch, num_done)
        return {
            "epoch": self._epoch,
            "num_done": num_done,
            "places": [tuple(position) for position in positions],
            "members": [
                member.state_dict(num_done=position.num_done)
                for member, position in zip(self._members, positions, strict=True)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state as TrainData does; the state of another number of loaders is ignored."""
        states = state.get("members", [])
        if len(states) != len(self._members):
            return
        self._epoch, self._num_done_before = state["epoch"], state["num_done"]
        self._start_positions = [_PassPosition(*position) for position in state["places"]]
        for member, member_state in zip(self._members, states, strict=True):
            # A loader that continues from its own state cannot be replayed from its start.
            ignored_keys = {"loader"} if self._is_replayed else set()
            member.load_state_dict({key: value for key, value in member_state.items() if key not in ignored_keys})

    @property
    def is_last_batch_short(self) -> bool:
        return any(member.is_last_batch_short for member in self._members)

    def descriptions(self) -> list[Description]:
        return [
            {"mode of the combination": self._combined.mode},
            *chain.from_iterable(member.descriptions() for member in self._members),
        ]

    def order_fingerprint(self) -> int:
        return fingerprint_indices([member.order_fingerprint() for member in self._members])

    def _find_positions(self, epoch: int, num_done: int) -> list["_PassPosition"]:
        """Return the position of each loader after `num_done` steps of the epoch."""
        num_steps_left, starts = num_done - self._num_done_before, self._start_positions
        if epoch != self._epoch or num_steps_left < 0:
            num_steps_left, starts = num_done, [_PassPosition() for _ in self._members]
        positions = []
        for index, start in enumerate(starts):
            # An estimated length does not end a pass.
            left = self._count_left_in_pass(epoch, index, start) if self._members[index].has_exact_length else math.inf
            num_steps_taken = min(num_steps_left, left)
            position = _PassPosition(start.number, start.num_done + int(num_steps_taken))
            if self._combined.mode == "sequential":
                num_steps_left -= int(num_steps_taken)
            elif (
                self._combined.mode == "max_size_cycle"
                and num_steps_left > left
                and self._members[index].num_batches > 0
            ):
                # A loader at the end of a pass is still in that pass.
                length = int(self._members[index].num_batches)
                num_passes, last_batch = divmod(int(num_steps_left - left) - 1, length)
                position = _PassPosition(start.number + 1 + num_passes, last_batch + 1)
            positions.append(position)
        return positions

    def _count_left_in_pass(self, epoch: int, index: int, position: "_PassPosition") -> float:
        return self._members[index].num_left(epoch + position.number * _PASS_STRIDE, position.num_done)

    def _open_steps(self, epoch: int, positions: list["_PassPosition"]) -> Iterator[list[Any]]:
        """Return an iterator over the steps from each loader's position on."""

        def open_pass(number: int, *, member: TrainData, position: _PassPosition) -> Feed:
            return member.epoch(
                epoch + number * _PASS_STRIDE, skip=position.num_done if number == position.number else 0
            )

        openers = [
            partial(open_pass, member=member, position=position)
            for member, position in zip(self._members, positions, strict=True)
        ]
        return stepwise(openers, mode=self._combined.mode, passes=[position.number for position in positions])

    def _chain_members(self, epoch: int, positions: list["_PassPosition"], *, num_passed: int) -> Feed:
        lefts = [self._count_left_in_pass(epoch, index, position) for index, position in enumerate(positions)]
        index = next((index for index, left in enumerate(lefts) if left > 0), len(lefts) - 1)
        if self._is_replayed:
            index = 0
        weights: deque[float] = deque()
        # The first loader begins now, each further one when the one before it ends.
        first_feed = self._members[index].epoch(epoch, skip=positions[index].num_done)

        def iterate_members() -> Iterator[Any]:
            for number in range(index, len(self._members)):
                feed = first_feed if number == index else self._members[number].epoch(epoch)
                for batch in feed:
                    weights.append(feed.weight)
                    yield batch

        feed = Feed(iterate_members(), weights=weights)
        skip_batches(feed, num_passed)
        return feed


class _PassPosition(NamedTuple):
    """Position of a loader in an epoch."""

    number: int = 0
    """Number of the pass through the data."""
    num_done: int = 0
    """Batches of that pass."""


def build_eval_data(
    loader: Any,
    *,
    rank: int,
    world_size: int,
    seed: int,
    shard: bool,
    is_recording: bool = False,
    compare: Callable[[list[Any]], None] | None = None,
) -> EvalData:
    """Build the evaluation data of one loader, or of several that are combined into one stream of batches."""
    if isinstance(loader, CombinedLoader):
        shard = shard and not any(is_split_by_user(member) for member in loader.flattened)
        loader = _CombinedBatches(loader, seed=seed)
    return EvalData(
        loader,
        rank=rank,
        world_size=world_size,
        seed=seed,
        shard=shard,
        is_recording=is_recording,
        compare=compare,
    )


class _CombinedBatches:
    """Batches of a combination in a single process; every rank reads all of them."""

    def __init__(self, combined: CombinedLoader, *, seed: int) -> None:
        self._combined = combined
        self._members = [EvalData(loader, rank=0, world_size=1, seed=seed) for loader in combined.flattened]

    def __iter__(self) -> Iterator[Any]:
        if self._combined.mode == "sequential":
            return chain.from_iterable(member.batches() for member in self._members)
        openers = [lambda number, member=member: member.batches() for member in self._members]
        return map(self._combined.restore_shape, stepwise(openers, mode=self._combined.mode))

    def __len__(self) -> int:
        length = num_steps([member.num_batches for member in self._members], mode=self._combined.mode)
        if length == float("inf"):
            raise TypeError("a loader of the combination has no length")
        return int(length)

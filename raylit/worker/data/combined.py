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

from raylit.compat.torch_data import drop_iterator
from raylit.config.plan import CombinationName
from raylit.core.combined_loader import CombinedLoader, holds_loaders, num_steps, stepwise
from raylit.worker.data.agreement import Description, fingerprint_of_indices
from raylit.worker.data.batches import Feed, TrainSource
from raylit.worker.data.eval_data import EvalData
from raylit.worker.data.sampling import is_map_style, is_of_torchdata, is_plain_batching, is_users_own_split
from raylit.worker.data.sources import advance
from raylit.worker.data.train_data import TrainData


class SameEpoch:
    """A TrainSource whose epochs are all like the first: samplers that draw an order draw it again."""

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
    """The loader, or each one of a collection, in the order of its data set; a warning where it was shuffled.

    Samplers that torch does not know stay: their order is the same in every epoch, which is what matters.
    """
    if isinstance(loader, CombinedLoader):
        return CombinedLoader(loader.shaped([remove_shuffling(member) for member in loader.flattened]), loader.mode)
    if isinstance(loader, dict) or holds_loaders(loader):
        return remove_shuffling(CombinedLoader(loader)).iterables
    if not is_map_style(loader):
        return loader
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        sampler = _in_order(loader.sampler, loader)
    else:
        sampler = _in_order(batch_sampler.sampler, loader) if is_plain_batching(batch_sampler) else None
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


def _in_order(sampler: Any, loader: "DataLoader[Any]") -> Any:
    """What takes the place of a sampler that shuffles; None where it does not, or nobody knows."""
    if isinstance(sampler, DistributedSampler):
        if not sampler.shuffle:
            return None
        split = copy.copy(sampler)
        split.shuffle = False
        return split
    if isinstance(sampler, SubsetRandomSampler):
        return list(sampler.indices)
    if isinstance(sampler, (RandomSampler, WeightedRandomSampler)) or is_of_torchdata(sampler, "RandomSampler"):
        dataset: Any = loader.dataset
        return SequentialSampler(dataset)
    return None


_SEED_STRIDE = 0x9E3779B97F4A7C15
"""Loaders of one length would else be shuffled alike."""
_PASS_STRIDE = 1_000_000
"""What a further pass through a loader in the same epoch adds to the epoch that its samplers are told."""


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
    """Of one loader, or of several: a CombinedLoader, or a bare collection, combined by `combination`. Collective."""
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
    """A bare collection as a CombinedLoader; any other loader as it is."""
    is_collection = isinstance(loader, dict) or holds_loaders(loader)
    return CombinedLoader(loader, combination) if is_collection else loader


class CombinedTrainData:
    """The training loaders of a combination, each a TrainData of its own. Building it is collective.

    A loader that is run through more than once in an epoch has an order of its own for each pass. What TrainData says
    of resumed epochs holds for each loader; with "max_size_cycle" or "sequential" and an iterable among the loaders a
    resumed epoch is run through from its start, by steps: it is exact where the number of workers has stayed.
    """

    def __init__(self, combined: CombinedLoader, *, make: Callable[..., TrainData], seed: int) -> None:
        self._combined = combined
        self._members = [
            make(loader, seed=(seed + index * _SEED_STRIDE) % 2**63, is_padded=combined.mode != "sequential")
            for index, loader in enumerate(combined.flattened)
        ]
        lengths = [member.num_batches for member in self._members]
        has_lengths = all(member.has_exact_length for member in self._members)
        self._is_run_through = combined.mode in ("max_size_cycle", "sequential") and not has_lengths
        """Where in which loader an epoch goes on can only be found out from its start."""
        self.num_batches: float = num_steps(lengths, mode=combined.mode)
        """Per worker and epoch; infinite if unknown, an estimate where a loader is an iterable."""
        self.has_exact_length = has_lengths
        self.has_own_state = any(member.has_own_state for member in self._members)
        self._epoch = -1
        self._num_before = 0
        """Steps of the epoch before this run, or the iteration under way, began."""
        self._starts = [_Place() for _ in self._members]
        """Where each loader was then."""

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """The combined batches from `skip` on. Ends an earlier Feed."""
        places = [_Place() for _ in self._members] if self._is_run_through else self._places(epoch, skip)
        self._epoch, self._num_before, self._starts = epoch, skip, places
        if self._combined.mode == "sequential" and self._members:
            return self._one_after_the_other(epoch, places, num_passed=skip if self._is_run_through else 0)
        steps = self._steps(epoch, places)
        if self._is_run_through:
            advance(steps, skip)
        # To begin another pass draws from torch's generator.
        is_cycling = self._combined.mode == "max_size_cycle"
        may_run_ahead = not is_cycling and all(member.may_run_ahead for member in self._members)
        return Feed(map(self._combined.shaped, steps), may_run_ahead=may_run_ahead)

    def num_left(self, epoch: int, num_done: int) -> float:
        if self._is_run_through or not self._members:
            return max(0, self.num_batches - num_done)
        places = self._places(epoch, num_done)
        lefts = [self._left_in_pass(epoch, index, place) for index, place in enumerate(places)]
        if self._combined.mode == "max_size_cycle":
            first = [left for left, place in zip(lefts, places, strict=True) if place.number == 0]
            is_empty = any(member.num_batches == 0 for member in self._members)
            return 0 if is_empty else max(first, default=0)
        return num_steps(lefts, mode=self._combined.mode)

    def state_dict(self, *, num_done: int) -> dict[str, Any]:
        places = self._starts if self._is_run_through else self._places(self._epoch, num_done)
        return {
            "epoch": self._epoch,
            "num_done": num_done,
            "places": [tuple(place) for place in places],
            "members": [
                member.state_dict(num_done=place.num_done) for member, place in zip(self._members, places, strict=True)
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As TrainData's. The state of other loaders than these is left alone."""
        states = state.get("members", [])
        if len(states) != len(self._members):
            return
        self._epoch, self._num_before = state["epoch"], state["num_done"]
        self._starts = [_Place(*place) for place in state["places"]]
        for member, of_member in zip(self._members, states, strict=True):
            # A loader that goes on from its own state cannot be run through from its start.
            left_out = {"loader"} if self._is_run_through else set()
            member.load_state_dict({key: value for key, value in of_member.items() if key not in left_out})

    @property
    def is_last_batch_short(self) -> bool:
        return any(member.is_last_batch_short for member in self._members)

    def descriptions(self) -> list[Description]:
        return [
            {"mode of the combination": self._combined.mode},
            *chain.from_iterable(member.descriptions() for member in self._members),
        ]

    def order_fingerprint(self) -> int:
        return fingerprint_of_indices([member.order_fingerprint() for member in self._members])

    def _places(self, epoch: int, num_done: int) -> list["_Place"]:
        """Where each loader is after so many steps of the epoch."""
        num_more, starts = num_done - self._num_before, self._starts
        if epoch != self._epoch or num_more < 0:
            num_more, starts = num_done, [_Place() for _ in self._members]
        places = []
        for index, start in enumerate(starts):
            # An estimate is no border.
            left = self._left_in_pass(epoch, index, start) if self._members[index].has_exact_length else math.inf
            num_taken = min(num_more, left)
            place = _Place(start.number, start.num_done + int(num_taken))
            if self._combined.mode == "sequential":
                num_more -= int(num_taken)
            elif self._combined.mode == "max_size_cycle" and num_more > left and self._members[index].num_batches > 0:
                # At its end a loader is still in the pass that ends there.
                length = int(self._members[index].num_batches)
                further, rest = divmod(int(num_more - left) - 1, length)
                place = _Place(start.number + 1 + further, rest + 1)
            places.append(place)
        return places

    def _left_in_pass(self, epoch: int, index: int, place: "_Place") -> float:
        return self._members[index].num_left(epoch + place.number * _PASS_STRIDE, place.num_done)

    def _steps(self, epoch: int, places: list["_Place"]) -> Iterator[list[Any]]:
        """From where each loader stands."""

        def opened(number: int, *, member: TrainData, place: _Place) -> Feed:
            return member.epoch(epoch + number * _PASS_STRIDE, skip=place.num_done if number == place.number else 0)

        openers = [
            partial(opened, member=member, place=place) for member, place in zip(self._members, places, strict=True)
        ]
        return stepwise(openers, mode=self._combined.mode, passes=[place.number for place in places])

    def _one_after_the_other(self, epoch: int, places: list["_Place"], *, num_passed: int) -> Feed:
        lefts = [self._left_in_pass(epoch, index, place) for index, place in enumerate(places)]
        index = next((index for index, left in enumerate(lefts) if left > 0), len(lefts) - 1)
        if self._is_run_through:
            index = 0
        weights: deque[float] = deque()
        # Begun here and now; the loaders after it when it ends.
        first = self._members[index].epoch(epoch, skip=places[index].num_done)

        def chained() -> Iterator[Any]:
            for number in range(index, len(self._members)):
                feed = first if number == index else self._members[number].epoch(epoch)
                for batch in feed:
                    weights.append(feed.weight)
                    yield batch

        feed = Feed(chained(), weights=weights)
        advance(feed, num_passed)
        return feed


class _Place(NamedTuple):
    """Of a loader in an epoch."""

    number: int = 0
    """Of its pass through the data."""
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
    """Of one loader; of several where they are combined into one stream of batches."""
    if isinstance(loader, CombinedLoader):
        shard = shard and not any(is_users_own_split(member) for member in loader.flattened)
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
    """The batches of a combination in a single process; every rank runs through them."""

    def __init__(self, combined: CombinedLoader, *, seed: int) -> None:
        self._combined = combined
        self._members = [EvalData(loader, rank=0, world_size=1, seed=seed) for loader in combined.flattened]

    def __iter__(self) -> Iterator[Any]:
        if self._combined.mode == "sequential":
            return chain.from_iterable(member.batches() for member in self._members)
        openers = [lambda number, member=member: member.batches() for member in self._members]
        return map(self._combined.shaped, stepwise(openers, mode=self._combined.mode))

    def __len__(self) -> int:
        length = num_steps([member.num_batches for member in self._members], mode=self._combined.mode)
        if length == float("inf"):
            raise TypeError("a loader of the combination has no length")
        return int(length)

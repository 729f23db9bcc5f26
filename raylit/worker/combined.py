"""Several loaders as one, shared out over the ranks: for training in step with each other, for evaluations as one
stream. Worker."""

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

from raylit.combined_loader import CombinedLoader, holds_loaders, num_steps, stepwise
from raylit.plan import CombinationName
from raylit.worker.data import Feed, TrainData, TrainSource
from raylit.worker.eval_data import EvalData
from raylit.worker.loaders import is_users_own_split
from raylit.worker.streams import advance

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
) -> TrainSource:
    """Of one loader, or of several: a CombinedLoader, or a bare collection, combined by `combination`. Collective."""
    loader = joined(loader, combination)
    make = partial(TrainData, rank=rank, world_size=world_size, shard=shard, agree=agree)
    if not isinstance(loader, CombinedLoader):
        return make(loader, seed=seed)
    return CombinedTrainData(loader, make=make, seed=seed)


def joined(loader: Any, combination: CombinationName) -> Any:
    """A bare collection as a CombinedLoader; any other loader as it is."""
    is_collection = isinstance(loader, dict) or holds_loaders(loader)
    return CombinedLoader(loader, combination) if is_collection else loader


class CombinedTrainData:
    """The training loaders of a combination, each a TrainData of its own. Building it is collective.

    A loader that is run through more than once in an epoch has an order of its own for each pass. What TrainData says
    of resumed epochs holds for each loader; with "max_size_cycle" and an iterable among the loaders a resumed epoch is
    run through from its start.
    """

    def __init__(self, combined: CombinedLoader, *, make: Callable[..., TrainData], seed: int) -> None:
        self._combined = combined
        self._members = [
            make(loader, seed=(seed + index * _SEED_STRIDE) % 2**63, is_padded=combined.mode != "sequential")
            for index, loader in enumerate(combined.flattened)
        ]
        lengths = [member.num_batches for member in self._members]
        self._has_lengths = all(member.has_exact_length for member in self._members)
        self.num_batches: float = num_steps(lengths, mode=combined.mode)
        """Per worker and epoch; infinite if unknown, an estimate where a loader is an iterable."""

    def epoch(self, epoch: int, *, skip: int = 0) -> Feed:
        """The combined batches from `skip` on. Ends an earlier Feed."""
        if self._combined.mode == "sequential" and self._members:
            return self._one_after_the_other(epoch, skip)
        is_cycling = self._combined.mode == "max_size_cycle"
        if is_cycling and not self._has_lengths:
            steps = self._steps(epoch, [(0, 0) for _ in self._members])
            advance(steps, skip)
        elif is_cycling and self.num_batches > 0:
            lengths = [int(member.num_batches) for member in self._members]
            # At its end a loader is still in the pass that ends there.
            passes = [max(0, skip - 1) // length for length in lengths]
            steps = self._steps(epoch, [(n, skip - n * length) for n, length in zip(passes, lengths, strict=True)])
        else:
            steps = self._steps(epoch, [(0, skip) for _ in self._members])
        # To begin another pass draws from torch's generator.
        may_run_ahead = not is_cycling and all(member.may_run_ahead for member in self._members)
        return Feed(map(self._combined.shaped, steps), may_run_ahead=may_run_ahead)

    def state_dict(self) -> dict[str, Any]:
        return {"members": [member.state_dict() for member in self._members]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As TrainData's. The state of other loaders than these is left alone."""
        states = state.get("members", [])
        if len(states) != len(self._members):
            return
        is_run_through = self._combined.mode in ("max_size_cycle", "sequential") and not self._has_lengths
        for member, of_member in zip(self._members, states, strict=True):
            # A loader that goes on from its own state cannot be run through from its start.
            left_out = {"loader", "world_size"} if is_run_through else set()
            member.load_state_dict({key: value for key, value in of_member.items() if key not in left_out})

    def _steps(self, epoch: int, positions: list[tuple[int, int]]) -> Iterator[list[Any]]:
        """From where each loader stands: its pass, and the batches of it that are done."""

        def opened(number: int, *, member: TrainData, position: tuple[int, int]) -> Feed:
            first, num_done = position
            return member.epoch(epoch + number * _PASS_STRIDE, skip=num_done if number == first else 0)

        openers = [
            partial(opened, member=member, position=position)
            for member, position in zip(self._members, positions, strict=True)
        ]
        return stepwise(openers, mode=self._combined.mode, passes=[number for number, _ in positions])

    def _one_after_the_other(self, epoch: int, skip: int) -> Feed:
        index = 0
        while self._has_lengths and index < len(self._members) - 1 and skip >= self._members[index].num_batches:
            skip -= int(self._members[index].num_batches)
            index += 1
        weights: deque[float] = deque()
        # Begun here and now; the loaders after it when it ends.
        first = self._members[index].epoch(epoch, skip=skip if self._has_lengths else 0)

        def chained() -> Iterator[Any]:
            for number in range(index, len(self._members)):
                feed = first if number == index else self._members[number].epoch(epoch)
                for batch in feed:
                    weights.append(feed.weight)
                    yield batch

        feed = Feed(chained(), weights=weights)
        if not self._has_lengths:
            advance(feed, skip)
        return feed


def build_eval_data(
    loader: Any, *, rank: int, world_size: int, seed: int, shard: bool, is_recording: bool = False
) -> EvalData:
    """Of one loader; of several where they are combined into one stream of batches."""
    if isinstance(loader, CombinedLoader):
        shard = shard and not any(is_users_own_split(member) for member in loader.flattened)
        loader = _CombinedBatches(loader, seed=seed)
    return EvalData(loader, rank=rank, world_size=world_size, seed=seed, shard=shard, is_recording=is_recording)


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

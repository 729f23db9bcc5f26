"""EvalData: a user's validation, test or prediction loader, shared out over the ranks. Worker."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from raylit.worker.data.agreement import Description
from raylit.worker.data.sampling import (
    IndexSource,
    IsolatedRandom,
    Share,
    describe,
    is_map_style,
    is_users_own_split,
    iterate_share,
    length_of,
    may_run_ahead,
    share_of_sequence,
    with_indices,
)
from raylit.worker.data.sources import Opening, every_nth


class EvalData:
    """A validation, test or prediction loader, shared out over the ranks: batch i of the loader in a single process
    goes to rank i modulo the number of ranks, so each sample is evaluated exactly once; a rank may have one less than
    another. Random samplers follow `seed`, alike on all ranks and in every evaluation, unless they have a
    `generator` of their own.

    Each item is the batch's index in the single process and the batch. A loader that is not divided (`shard=False`, a
    DistributedSampler) counts as if its ranks took turns.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        rank: int,
        world_size: int,
        seed: int,
        shard: bool = True,
        is_recording: bool = False,
        compare: Callable[[list[Any]], None] | None = None,
    ) -> None:
        """`is_recording`: the samples' indices are kept for `indices_of`. `compare`: see every_nth."""
        self._users_loader = loader
        self._compare = compare
        self._batch_size: int | None = None
        self.has_own_order = False
        """A sampler draws it, in each rank's process."""
        self._is_divided = shard and not is_users_own_split(loader)
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._loader = loader
        self._share: Share | None = None
        self._recorded: _RecordedShare | None = None
        self._is_stream = False
        self.may_run_ahead = may_run_ahead(loader)
        """A batch may be fetched before the step that comes before it."""
        self.first_uneven = math.inf
        """The step from which on not every rank may have a batch, or one of the same size: alike on all ranks. 0 where
        that is not known; infinite where there is none."""
        if not self._is_divided:
            sampler = getattr(loader, "sampler", None)
            is_even = type(sampler) is DistributedSampler and sampler.num_replicas == world_size
            if world_size > 1 and not is_even:
                self.first_uneven = 0.0
            self.num_batches: float = length_of(loader)
            """Of a worker: an upper bound, since the last global batch may be incomplete; infinite if unknown."""
            return
        self.first_uneven = 0.0
        is_last_short = False
        num_batches = length_of(loader)
        self.num_batches = num_batches if math.isinf(num_batches) else math.ceil(num_batches / world_size)
        if isinstance(loader, DataLoader) and is_map_style(loader):
            source = IndexSource.of(loader)
            num_at_once = world_size * (source.batch_size or 1)
            self._batch_size = source.batch_size
            self.has_own_order = type(source.sampler) is not SequentialSampler
            if source.batch_size is not None and not source.drop_last:
                is_last_short = length_of(source.sampler) % source.batch_size != 0
            self._share = Share(
                lambda epoch: source.batches(seed=seed, num_at_once=num_at_once),
                num_items=num_batches,
                rank=rank,
                world_size=world_size,
            )
            # An index is paired with its batch by their order.
            if is_recording:
                self._recorded = _RecordedShare(self._share)
            self._loader = with_indices(loader, self._recorded or self._share, in_order=True)
        elif isinstance(loader, Sequence):
            self._share = share_of_sequence(loader, rank=rank, world_size=world_size)
        else:
            self._is_stream = world_size > 1
        if world_size == 1:
            self.first_uneven = math.inf
        elif not self._is_stream and math.isfinite(num_batches):
            is_last_uneven = is_last_short or num_batches % world_size != 0
            self.first_uneven = self.num_batches - 1 if is_last_uneven else math.inf

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return zip(count(self._rank, self._world_size), self.batches(), strict=False)

    def indices_of(self, number: int) -> list[Any]:
        """The data set's indices of the samples in this rank's batch of that number; empty where nobody knows them."""
        item = [] if self._recorded is None else self._recorded.items[number]
        return list(item) if isinstance(item, (list, tuple)) else [item]

    def description(self) -> Description:
        """What all ranks must have alike."""
        if not self._is_divided:
            return {}
        description = describe(self._users_loader, share=self._share)
        if self._batch_size is not None:
            description["batch size"] = self._batch_size
        return description

    def order_fingerprint(self) -> int:
        """Of the order that the last iteration follows; see Share."""
        return 0 if self._share is None else self._share.order_fingerprint()

    def batches(self) -> Iterator[Any]:
        """Of this rank, without their index."""
        if self._is_stream:
            return every_nth(
                self._loader,
                rank=self._rank,
                world_size=self._world_size,
                own_random=IsolatedRandom(self._seed),
                opening=Opening(),
                compare=self._compare,
            )[0]
        if self._share is not None:
            self._share.start(0, num_dealt=0, weights=deque(maxlen=0))
        return iterate_share(self._loader, self._share)


class _RecordedShare:
    """A share that keeps what it has yielded."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self.items: list[Any] = []

    def __len__(self) -> int:
        return len(self._share)

    def __iter__(self) -> Iterator[Any]:
        return self._noted(iter(self._share))

    def _noted(self, items: Iterator[Any]) -> Iterator[Any]:
        self.items = []
        for item in items:
            self.items.append(item)
            yield item

"""EvalData: a user's validation, test or prediction loader, shared out over the ranks."""

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
    build_sequence_share,
    can_prefetch,
    describe,
    get_length,
    is_map_style,
    is_split_by_user,
    iterate_share,
    replace_sampler,
)
from raylit.worker.data.sources import EpochRandomState, shard_stream


class EvalData:
    """Validation, test or prediction loader, shared out over the ranks so that each sample is evaluated exactly once.

    Batch i of the loader in a single process goes to rank i modulo the world size; a rank may have one batch less than
    another. Random samplers follow `seed`, alike on all ranks and in every evaluation, unless they have a `generator`
    of their own. Iterating yields pairs of the batch's index in the single process and the batch. The batches of a
    loader that is not divided (`shard=False`, a DistributedSampler) are numbered as if its ranks took turns.
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
        """Divide the loader.

        Args:
            loader: The user's loader.
            rank: Rank of this worker.
            world_size: Number of ranks.
            seed: Seed of random samplers.
            shard: False if the user has divided the data already.
            is_recording: Record the samples' indices for `read_indices`.
            compare: See `shard_stream`.
        """
        self._user_loader = loader
        self._compare = compare
        self._batch_size: int | None = None
        self.has_own_order = False
        """A sampler draws the order in each rank's process."""
        self._is_divided = shard and not is_split_by_user(loader)
        self._rank = rank
        self._world_size = world_size
        self._seed = seed
        self._loader = loader
        self._share: Share | None = None
        self._recorded_share: _RecordedShare | None = None
        self._is_stream = False
        self.can_prefetch = can_prefetch(loader)
        """A batch may be fetched before the step on the batch before it."""
        self.first_uneven = math.inf
        """First step in which ranks may have no batch or batches of different sizes; equal on all ranks.

        0 where that is not known; infinite where there is no such step.
        """
        if not self._is_divided:
            sampler = getattr(loader, "sampler", None)
            is_even = type(sampler) is DistributedSampler and sampler.num_replicas == world_size
            if world_size > 1 and not is_even:
                self.first_uneven = 0.0
            self.num_batches: float = get_length(loader)
            """Batches per worker: an upper bound, as the last global batch may be incomplete; infinite if unknown."""
            return
        self.first_uneven = 0.0
        is_last_short = False
        num_batches = get_length(loader)
        self.num_batches = num_batches if math.isinf(num_batches) else math.ceil(num_batches / world_size)
        if isinstance(loader, DataLoader) and is_map_style(loader):
            source = IndexSource.from_loader(loader)
            num_at_once = world_size * (source.batch_size or 1)
            self._batch_size = source.batch_size
            self.has_own_order = type(source.sampler) is not SequentialSampler
            if source.batch_size is not None and not source.drop_last:
                is_last_short = get_length(source.sampler) % source.batch_size != 0
            self._share = Share(
                lambda epoch: source.batches(seed=seed, num_at_once=num_at_once),
                num_items=num_batches,
                rank=rank,
                world_size=world_size,
            )
            # Indices and batches are paired by their order.
            if is_recording:
                self._recorded_share = _RecordedShare(self._share)
            self._loader = replace_sampler(loader, self._recorded_share or self._share, in_order=True)
        elif isinstance(loader, Sequence):
            self._share = build_sequence_share(loader, rank=rank, world_size=world_size)
        else:
            self._is_stream = world_size > 1
        if world_size == 1:
            self.first_uneven = math.inf
        elif not self._is_stream and math.isfinite(num_batches):
            is_last_uneven = is_last_short or num_batches % world_size != 0
            self.first_uneven = self.num_batches - 1 if is_last_uneven else math.inf

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return zip(count(self._rank, self._world_size), self.batches(), strict=False)

    def read_indices(self, number: int) -> list[Any]:
        """Return the data-set indices of the samples in this rank's batch `number`; empty where they are not known."""
        item = [] if self._recorded_share is None else self._recorded_share.items[number]
        return list(item) if isinstance(item, (list, tuple)) else [item]

    def description(self) -> Description:
        """Return the properties that must be equal on all ranks."""
        if not self._is_divided:
            return {}
        description = describe(self._user_loader, share=self._share)
        if self._batch_size is not None:
            description["batch size"] = self._batch_size
        return description

    def order_fingerprint(self) -> int:
        """Return the fingerprint of the order of the last iteration; see `Share.order_fingerprint`."""
        return 0 if self._share is None else self._share.order_fingerprint()

    def batches(self) -> Iterator[Any]:
        """Return an iterator over this rank's batches, without their indices."""
        if self._is_stream:
            return shard_stream(
                self._loader,
                rank=self._rank,
                world_size=self._world_size,
                isolated_random=IsolatedRandom(self._seed),
                start_state=EpochRandomState(),
                compare=self._compare,
            )[0]
        if self._share is not None:
            self._share.start(0, num_dealt=0, weights=deque(maxlen=0))
        return iterate_share(self._loader, self._share)


class _RecordedShare:
    """Share that records what it yields."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self.items: list[Any] = []

    def __len__(self) -> int:
        return len(self._share)

    def __iter__(self) -> Iterator[Any]:
        return self._record_items(iter(self._share))

    def _record_items(self, items: Iterator[Any]) -> Iterator[Any]:
        self.items = []
        for item in items:
            self.items.append(item)
            yield item

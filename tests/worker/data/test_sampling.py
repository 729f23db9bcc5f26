"""Share, IndexSource, SamplerGenerators, IsolatedRandom."""

import itertools
import random
from collections import deque

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from raylit.errors import CheckpointError
from raylit.worker.data.sampling import IndexSource, IsolatedRandom, SamplerGenerators, Share

SIZES = [1, 2, 5, 6, 7, 11, 12, 13, 24]


def dealt_out(num_items, *, world_size, skip=0, **options):
    """For each rank its items and its weights."""
    dealt = []
    for rank in range(world_size):
        share = Share(
            lambda epoch: iter(range(num_items)), num_items=num_items, rank=rank, world_size=world_size, **options
        )
        weights = deque()
        share.start(0, num_dealt=skip * world_size * (options.get("batch_size") or 1), weights=weights)
        dealt.append((list(share), list(weights), share.num_batches))
    return dealt


class TestShare:
    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("num_items", SIZES)
    def test_every_sample_goes_to_exactly_one_rank(self, world_size, num_items):
        dealt = dealt_out(num_items, world_size=world_size, batch_size=2)
        items = [item for batches, _, _ in dealt for batch in batches for item in batch]
        assert sorted(items) == list(range(num_items))

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("num_items", SIZES)
    def test_global_batches_equal_those_of_one_process_with_a_larger_batch_size(self, world_size, num_items):
        dealt = dealt_out(num_items, world_size=world_size, batch_size=2)
        together = list(BatchSampler(range(num_items), batch_size=2 * world_size, drop_last=False))
        columns = itertools.zip_longest(*[batches for batches, _, _ in dealt], fillvalue=[])
        assert [sorted(itertools.chain(*column)) for column in columns] == together
        assert {num_batches for _, _, num_batches in dealt} == {len(together)}

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("num_items", SIZES)
    def test_weighted_means_over_ranks_are_means_over_samples(self, world_size, num_items):
        dealt = dealt_out(num_items, world_size=world_size, batch_size=2)
        assert len({len(weights) for _, weights, _ in dealt}) == 1, "every rank weighs every global batch"
        for k in range(len(dealt[0][1])):
            shares = [batches[k] if k < len(batches) else [] for batches, _, _ in dealt]
            samples = list(itertools.chain(*shares))
            means = [sum(share) / len(share) if share else 0.0 for share in shares]
            weights = [weights[k] for _, weights, _ in dealt]
            average = sum(w * mean for w, mean in zip(weights, means, strict=True)) / world_size
            assert average == pytest.approx(sum(samples) / len(samples))
            assert sum(weights) == pytest.approx(world_size)
            assert [w == 0.0 for w in weights] == [share == [] for share in shares]
            if len(samples) == 2 * world_size:
                assert weights == [1.0] * world_size, "exactly: the loop compares with 1.0"

    @pytest.mark.parametrize("world_size", [1, 2, 3])
    @pytest.mark.parametrize("num_items", SIZES)
    def test_drop_last_drops_an_incomplete_global_batch_on_every_rank(self, world_size, num_items):
        dealt = dealt_out(num_items, world_size=world_size, batch_size=2, drop_last=True)
        num_groups = num_items // (2 * world_size)
        for batches, weights, num_batches in dealt:
            assert [len(batch) for batch in batches] == [2] * num_groups
            assert weights == [1.0] * num_groups
            assert num_batches == num_groups
        items = [item for batches, _, _ in dealt for batch in batches for item in batch]
        assert sorted(items) == list(range(num_groups * 2 * world_size))

    def test_whole_batches_are_dealt_out_in_turn_and_weighted_by_the_ranks_that_have_one(self):
        assert dealt_out(5, world_size=3) == [([0, 3], [1.0, 1.5], 2), ([1, 4], [1.0, 1.5], 2), ([2], [1.0, 0.0], 2)]

    @pytest.mark.parametrize("options", [{}, {"batch_size": 2}])
    @pytest.mark.parametrize("skip", [0, 1, 2, 3, 4, 9])
    def test_skipping_yields_the_rest_of_the_epoch(self, options, skip):
        whole, tail = (dealt_out(13, world_size=3, skip=s, **options) for s in (0, skip))
        for (all_items, all_weights, _), (items, weights, _) in zip(whole, tail, strict=True):
            assert (items, weights) == (all_items[skip:], all_weights[skip:])

    def test_a_later_start_does_not_change_a_running_iteration(self):
        share = Share(lambda epoch: iter(range(100 * epoch, 100 * epoch + 4)), num_items=4, rank=0, world_size=1)
        first, second = deque(), deque()
        share.start(1, num_dealt=0, weights=first)
        batches = iter(share)
        share.start(2, num_dealt=3, weights=second)
        assert list(batches) == [100, 101, 102, 103]
        assert (len(first), len(second)) == (4, 0)

    def test_the_order_is_drawn_at_the_first_item(self):
        drawn = []
        share = Share(lambda epoch: iter([drawn.append(epoch)]), num_items=1, rank=0, world_size=1)
        iter(share)
        batches = iter(share)
        assert drawn == []
        next(batches)
        assert drawn == [0]

    def test_an_unknown_number_of_items_has_no_length(self):
        share = Share(lambda epoch: itertools.count(), num_items=float("inf"), batch_size=2, rank=1, world_size=2)
        with pytest.raises(TypeError):
            len(share)
        assert list(itertools.islice(share, 2)) == [[1, 3], [5, 7]]


class Drawing:
    """Sampler that draws from all the global generators, item by item."""

    def __iter__(self):
        for _ in range(7):
            yield (torch.randint(1000, ()).item(), random.randrange(1000), int(numpy.random.randint(1000)))


class SizedDrawing(Drawing):
    def __len__(self):
        return 7


def ordered(sampler, *, seed=3, num_at_once=4):
    return IndexSource(sampler=sampler).order(seed=seed, num_at_once=num_at_once)


class TestOrder:
    @pytest.mark.parametrize("seed", [0, 3])
    def test_a_plain_shuffle_equals_distributed_sampler(self, seed):
        reference = DistributedSampler(range(20), num_replicas=1, rank=0, seed=seed)
        reference.set_epoch(2)
        assert list(ordered(RandomSampler(range(20)), seed=seed + 2)) == list(reference)

    def test_a_random_sampler_with_options_keeps_them(self):
        drawn = list(ordered(RandomSampler(range(50), replacement=True)))
        assert len(drawn) == 50
        assert len(set(drawn)) < 50, "some are drawn twice"
        few = list(ordered(RandomSampler(range(1000), num_samples=4)))
        assert len(few) == 4
        assert max(few) > 4, "out of all of them"
        own = RandomSampler(range(10), generator=torch.Generator().manual_seed(8))
        assert list(ordered(own)) == torch.randperm(10, generator=torch.Generator().manual_seed(8)).tolist()

    @pytest.mark.parametrize("kind", [Drawing, SizedDrawing])
    def test_a_custom_sampler_depends_on_the_seed_only_and_leaves_global_random_state_unchanged(self, kind):
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
        expected = torch.rand(3).tolist(), [random.random() for _ in range(3)], numpy.random.rand(3).tolist()
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1)
        items, seen = ordered(kind()), ([], [], [])
        drawn = []
        for _ in range(3):
            drawn += itertools.islice(items, 2)
            for values, value in zip(seen, (torch.rand(()).item(), random.random(), numpy.random.rand()), strict=True):
                values.append(value)
        drawn += items
        assert seen == expected
        assert len(drawn) == 7
        assert drawn == list(ordered(kind(), num_at_once=3))
        assert drawn != list(ordered(kind(), seed=4))

    def test_an_endless_sampler_is_read_up_to_its_length(self):
        endless = itertools.count()

        class Endless:
            def __len__(self):
                return 3

            def __iter__(self):
                return endless

        assert list(itertools.islice(ordered(Endless()), 8)) == list(range(8))
        assert next(endless) == 9

    def test_a_plain_batch_sampler_is_unwrapped_and_any_other_is_kept(self):
        class Own(BatchSampler):
            pass

        data = range(10)
        weighted = WeightedRandomSampler([1.0] * 10, 10)
        plain = DataLoader(data, batch_size=4, sampler=weighted, drop_last=True)
        assert IndexSource.from_loader(plain) == IndexSource(sampler=weighted, batch_size=4, drop_last=True)
        given = DataLoader(data, batch_sampler=BatchSampler(weighted, 3, False))
        assert IndexSource.from_loader(given) == IndexSource(sampler=weighted, batch_size=3)
        own = DataLoader(data, batch_sampler=Own(SequentialSampler(data), 3, False))
        assert IndexSource.from_loader(own) == IndexSource(sampler=own.batch_sampler)
        unbatched = DataLoader(data, batch_size=None, sampler=weighted)
        assert IndexSource.from_loader(unbatched) == IndexSource(sampler=weighted)


class TestIsolatedRandom:
    def test_it_continues_its_own_random_state_and_restores_the_outer_one(self):
        own = IsolatedRandom(5)
        torch.manual_seed(1)
        before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        with own:
            first = torch.rand(()).item(), random.random(), numpy.random.rand()
        with pytest.raises(KeyError), own:
            raise KeyError
        with own:
            second = torch.rand(()).item(), random.random(), numpy.random.rand()
        after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        with IsolatedRandom(5):
            together = [(torch.rand(()).item(), random.random(), numpy.random.rand()) for _ in range(2)]
        assert together == [first, second]


class TestSamplerGenerators:
    def test_a_repeated_epoch_starts_from_the_same_state_and_the_next_one_continues(self):
        generator = torch.Generator().manual_seed(4)
        sampler = RandomSampler(range(30), generator=generator)
        by_hand = [list(RandomSampler(range(30), generator=g)) for g in [torch.Generator().manual_seed(4)] * 2]
        states = SamplerGenerators([sampler, BatchSampler(sampler, 3, False), sampler])
        drawn = []
        for epoch in (0, 0, 1):
            states.begin(epoch)
            drawn.append(list(sampler))
        assert drawn == [by_hand[0], by_hand[0], by_hand[1]]

    def test_resuming_inside_an_epoch_with_other_samplers_is_an_error(self):
        with_one = SamplerGenerators([RandomSampler(range(3), generator=torch.Generator())])
        with_one.begin(2)
        without = SamplerGenerators([SequentialSampler(range(3))])
        without.load_state_dict(with_one.state_dict())
        with pytest.raises(CheckpointError, match="epoch 2 was begun with 1 sampler generators, the loader has 0"):
            without.begin(2)
        without.begin(3)

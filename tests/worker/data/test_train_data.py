"""TrainData, Feed and EvalData over real loaders; the ranks run in this process, one after the other or in lockstep."""

import dataclasses
import itertools
import math
import random
import threading
from collections import namedtuple

import numpy
import pytest
import torch
from lockstep import in_lockstep
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from raylit.errors import ModuleError
from raylit.worker.data.batches import get_batch_size
from raylit.worker.data.eval_data import EvalData
from raylit.worker.data.train_data import TrainData

WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3])


def numbers(num_samples):
    return TensorDataset(torch.arange(num_samples))


def samples(batch):
    return None if batch is None else batch[0].tolist()


def taken(data, epoch=0, *, skip=0, limit=None):
    """Samples and weight of each batch of an epoch."""
    feed = data.epoch(epoch, skip=skip)
    return [(samples(batch), feed.weight) for batch in itertools.islice(feed, limit)]


def trained(make_loader, world_size, *, epoch=0, skip=0, seed=0, **options):
    """What each rank takes of an epoch, for loaders that need no agreement."""
    return [
        taken(TrainData(make_loader(), rank=rank, world_size=world_size, seed=seed, **options), epoch, skip=skip)
        for rank in range(world_size)
    ]


def global_batches(ranks):
    """The samples of each step in the order of the epoch: those that were dealt out in turn, put back together."""
    steps = []
    for step in zip(*ranks, strict=True):
        shares = [share or [] for share, _ in step]
        steps.append([s for column in itertools.zip_longest(*shares) for s in column if s is not None])
    return steps


def flat(nested):
    return list(itertools.chain.from_iterable(nested))


def streamed(make_loader, world_size, *, epoch=0, skip=0, **options):
    """What each rank takes of an epoch, for loaders whose batches are agreed upon."""

    def run(rank, agree):
        data = TrainData(make_loader(rank), rank=rank, world_size=world_size, seed=0, agree=agree, **options)
        return taken(data, epoch, skip=skip)

    return in_lockstep(world_size, run)


class Backwards(Sampler):
    def __init__(self, num_samples):
        self.num_samples = num_samples
        self.epochs = []

    def __len__(self):
        return self.num_samples

    def __iter__(self):
        return iter(range(self.num_samples - 1, -1, -1))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Unsized(Sampler):
    """Shuffles with the global generators, without a length."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        order = list(range(self.num_samples))
        random.shuffle(order)
        yield from order


class Pairs(Sampler):
    """A batch sampler of its own kind: batches of sizes 1, 2, 3, 1, ..."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __len__(self):
        return len(list(iter(self)))

    def __iter__(self):
        rest = torch.randperm(self.num_samples).tolist()
        for size in itertools.cycle([1, 2, 3]):
            if not rest:
                return
            yield rest[:size]
            rest = rest[size:]


class Counting(IterableDataset):
    def __init__(self, num_samples, *, length=None, is_shuffled=False):
        self.num_samples = num_samples
        self.length = length
        self.is_shuffled = is_shuffled

    def __iter__(self):
        order = list(range(self.num_samples))
        if self.is_shuffled:
            order = torch.randperm(self.num_samples).tolist()
            random.shuffle(order)
            numpy.random.shuffle(order)
        for number in order:
            yield (torch.tensor(number),)


class SizedCounting(Counting):
    def __len__(self):
        return self.length


MAP_STYLE = {
    "sequential": lambda: DataLoader(numbers(23), batch_size=3),
    "shuffle": lambda: DataLoader(numbers(23), batch_size=3, shuffle=True),
    "even": lambda: DataLoader(numbers(24), batch_size=2, shuffle=True),
    "custom sampler": lambda: DataLoader(numbers(23), batch_size=3, sampler=Backwards(23)),
    "unsized sampler": lambda: DataLoader(numbers(23), batch_size=3, sampler=Unsized(23)),
    "subset sampler": lambda: DataLoader(numbers(40), batch_size=3, sampler=SubsetRandomSampler(range(23))),
    "loader's generator": lambda: DataLoader(
        numbers(23), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(2)
    ),
    "sampler's generator": lambda: DataLoader(
        numbers(23), batch_size=3, sampler=RandomSampler(range(23), generator=torch.Generator().manual_seed(2))
    ),
    "given batch sampler": lambda: DataLoader(numbers(23), batch_sampler=BatchSampler(Backwards(23), 3, False)),
    "custom batch sampler": lambda: DataLoader(numbers(23), batch_sampler=Pairs(23)),
    "no batches": lambda: DataLoader(
        numbers(23), batch_size=None, sampler=BatchSampler(RandomSampler(range(23)), 3, False)
    ),
    "list of batches": lambda: [(torch.arange(start, min(start + 3, 23)),) for start in range(0, 23, 3)],
}  # fmt: skip
ALL_MAP_STYLE = pytest.mark.parametrize("make_loader", MAP_STYLE.values(), ids=MAP_STYLE)


class TestMapStyle:
    @ALL_MAP_STYLE
    @WORLD_SIZES
    def test_every_sample_goes_to_exactly_one_rank_once(self, make_loader, world_size):
        ranks = trained(make_loader, world_size)
        num_samples = 24 if make_loader is MAP_STYLE["even"] else 23
        assert sorted(flat(share for rank in ranks for share, _ in rank if share)) == list(range(num_samples))

    @ALL_MAP_STYLE
    @WORLD_SIZES
    def test_the_number_of_batches_is_known_and_equal_on_all_ranks(self, make_loader, world_size):
        counts = {len(rank) for rank in trained(make_loader, world_size)}
        known = TrainData(make_loader(), rank=0, world_size=world_size, seed=0).num_batches
        assert counts == {known} or (math.isinf(known) and make_loader is MAP_STYLE["unsized sampler"])

    @ALL_MAP_STYLE
    @WORLD_SIZES
    def test_weights_add_up_to_the_number_of_ranks(self, make_loader, world_size):
        for step in zip(*trained(make_loader, world_size), strict=True):
            assert sum(weight for _, weight in step) == pytest.approx(world_size)
            assert [weight == 0.0 for _, weight in step] == [share is None for share, _ in step]

    @ALL_MAP_STYLE
    @WORLD_SIZES
    def test_skipping_yields_the_rest_of_the_uninterrupted_epoch(self, make_loader, world_size):
        whole = trained(make_loader, world_size, epoch=3)
        assert len(whole[0]) > 1
        for skip in (1, len(whole[0]) - 1, len(whole[0])):
            assert trained(make_loader, world_size, epoch=3, skip=skip) == [rank[skip:] for rank in whole]

    @pytest.mark.parametrize("name", [name for name in MAP_STYLE if name not in ("custom batch sampler", "no batches")])
    def test_the_order_is_the_same_for_every_number_of_ranks(self, name):
        orders = [flat(global_batches(trained(MAP_STYLE[name], world_size, epoch=1))) for world_size in (1, 2, 3, 5)]
        if name == "list of batches":
            orders = [sorted(order) for order in orders]
        assert orders[0] == orders[1] == orders[2] == orders[3]

    @pytest.mark.parametrize("shuffle", [True, False])
    @pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
    def test_full_batches_equal_those_of_distributed_sampler(self, shuffle, num_workers, world_size):
        data = numbers(24)
        for rank in range(world_size):
            sampler = DistributedSampler(data, num_replicas=world_size, rank=rank, shuffle=shuffle, seed=5)
            by_hand = DataLoader(data, batch_size=4, sampler=sampler, num_workers=num_workers)
            own = DataLoader(data, batch_size=4, shuffle=shuffle, num_workers=num_workers)
            train_data = TrainData(own, rank=rank, world_size=world_size, seed=5)
            for epoch in (0, 1):
                sampler.set_epoch(epoch)
                assert taken(train_data, epoch) == [(samples(batch), 1.0) for batch in by_hand]

    def test_worker_processes_do_not_change_the_batches(self):
        plain = DataLoader(numbers(25), batch_size=2, shuffle=True)
        forked = DataLoader(numbers(25), batch_size=2, shuffle=True, num_workers=2, prefetch_factor=5)
        assert trained(lambda: forked, 2) == trained(lambda: plain, 2)
        assert trained(lambda: forked, 2, skip=5) == trained(lambda: plain, 2, skip=5)

    @WORLD_SIZES
    def test_drop_last_drops_an_incomplete_global_batch(self, world_size):
        ranks = trained(lambda: DataLoader(numbers(23), batch_size=3, drop_last=True), world_size)
        num_steps = 23 // (3 * world_size)
        assert global_batches(ranks) == torch.arange(num_steps * 3 * world_size).view(num_steps, -1).tolist()
        assert {weight for rank in ranks for _, weight in rank} == {1.0}

    def test_a_rank_without_a_share_of_the_last_batch_gets_none_once(self):
        feed = TrainData(DataLoader(numbers(13), batch_size=2), rank=2, world_size=3, seed=0).epoch(0)
        assert [samples(next(feed)), samples(next(feed))] == [[2, 5], [8, 11]]
        assert next(feed) is None
        assert feed.weight == 0.0
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(feed)

    def test_batches_of_a_custom_batch_sampler_stay_whole(self):
        single, double = (trained(MAP_STYLE["custom batch sampler"], world_size) for world_size in (1, 2))
        whole = [share for share, _ in single[0]]
        assert [len(share) for share in whole[:4]] == [1, 2, 3, 1]
        assert [share for step in zip(*double, strict=True) for share, _ in step if share] == whole

    def test_the_order_depends_on_seed_and_epoch(self):
        for name in ("shuffle", "unsized sampler", "subset sampler", "custom batch sampler"):
            orders = {
                str(trained(MAP_STYLE[name], 2, seed=seed, epoch=epoch)) for seed, epoch in [(0, 0), (0, 1), (9, 0)]
            }
            assert len(orders) == 3, name

    def test_only_the_samples_of_the_rank_after_the_skipped_ones_are_fetched(self):
        fetched = []

        class Watched(torch.utils.data.Dataset):
            def __len__(self):
                return 12

            def __getitem__(self, index):
                fetched.append(index)
                return (index,)

        list(TrainData(DataLoader(Watched(), batch_size=2), rank=1, world_size=2, seed=0).epoch(0, skip=1))
        assert fetched == [5, 7, 9, 11]

    def test_set_epoch_reaches_samplers_and_data_set(self):
        dataset, inner, outer = numbers(4), Backwards(4), BatchSampler(Backwards(4), 2, False)
        dataset.epochs, outer.sampler, outer.epochs = [], inner, []
        dataset.set_epoch, outer.set_epoch = dataset.epochs.append, outer.epochs.append
        data = TrainData(DataLoader(dataset, batch_sampler=outer), rank=0, world_size=1, seed=0)
        data.epoch(4), data.epoch(5)
        assert dataset.epochs == inner.epochs == outer.epochs == [4, 5]

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_a_distributed_sampler_is_kept_as_the_users_split(self, world_size):
        for rank in range(world_size):
            sampler = DistributedSampler(range(10), num_replicas=world_size, rank=rank, seed=3, shuffle=True)
            loader = DataLoader(numbers(10), batch_size=2, sampler=sampler)
            data = TrainData(loader, rank=rank, world_size=world_size, seed=0)
            whole = taken(data, 2)
            sampler.set_epoch(2)
            assert whole == [(samples(batch), 1.0) for batch in loader]
            assert data.num_batches == len(loader)
            assert taken(data, 2, skip=2) == whole[2:]


class TestLoader:
    def test_the_users_loader_is_unchanged_and_its_copy_keeps_class_and_options(self):
        class Tagged(DataLoader):
            tag = None

            def __iter__(self):
                for batch in super().__iter__():
                    yield [*batch, self.tag]

        def collate(items):
            return [torch.stack([item[0] for item in items]) * 10]

        loader = Tagged(numbers(11), batch_size=2, collate_fn=collate, num_workers=2, persistent_workers=True)
        loader.tag = "mine"
        assert len(list(loader)) == 6, "its worker processes are running now, and remain its own"
        attributes = dict(vars(loader))
        data = TrainData(loader, rank=1, world_size=2, seed=0)
        for epoch in range(2):
            batches = list(data.epoch(epoch))
            assert [batch[0].tolist() for batch in batches[:2]] == [[10, 30], [50, 70]]
            assert {batch[1] for batch in batches} == {"mine"}
        assert vars(loader) == attributes
        assert len(data._loader) == data.num_batches == 3

    def test_persistent_workers_serve_every_epoch(self):
        def pids(items):
            return torch.stack([item[0] for item in items]), torch.utils.data.get_worker_info().id, process_id()

        def process_id():
            return threading.get_native_id()

        loader = DataLoader(
            numbers(23), batch_size=3, shuffle=True, num_workers=2, persistent_workers=True, collate_fn=pids
        )
        data = TrainData(loader, rank=0, world_size=1, seed=0)
        processes = [{batch[2] for batch in data.epoch(epoch)} for epoch in range(2)]
        assert processes[0] == processes[1]
        assert len(processes[0]) == 2

    @pytest.mark.parametrize("options", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
    def test_an_interrupted_epoch_leaves_no_batches_to_the_next(self, options):
        loader = DataLoader(numbers(25), batch_size=2, **options)
        data = TrainData(loader, rank=1, world_size=2, seed=0)
        whole = taken(data)
        assert whole[-1] == (None, 0.0)
        assert taken(data, limit=2) == whole[:2]
        assert taken(data, skip=1, limit=1) == whole[1:2]
        assert taken(data) == whole

    def test_weights_match_their_batches_for_loaders_with_in_order_false(self):
        loader = DataLoader(SlowToStart(numbers(11)), batch_size=2, num_workers=2, in_order=False)
        shares = [share for share, _ in taken(TrainData(loader, rank=0, world_size=2, seed=0))]
        assert shares == [[0, 2], [4, 6], [8, 10]]

    @pytest.mark.parametrize("batches_for_one", [0, 2])
    def test_a_loader_that_ignores_its_batch_sampler_is_an_error_if_sharded_or_resumed(self, batches_for_one):
        class Straying(DataLoader):
            def __iter__(self):
                for batch in super().__iter__():
                    yield from [batch] * batches_for_one

        for world_size, skip in [(2, 0), (1, 1)]:
            data = TrainData(Straying(numbers(8), batch_size=2), rank=0, world_size=world_size, seed=0)
            with pytest.raises(ModuleError, match="use_distributed_sampler=False"):
                list(data.epoch(0, skip=skip))
        alone = TrainData(Straying(numbers(8), batch_size=2), rank=0, world_size=1, seed=0)
        assert len(list(alone.epoch(0))) == 4 * batches_for_one


class SlowToStart(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        if index == 0:
            threading.Event().wait(0.3)
        return self.data[index]


class TestRandomNumbers:
    def train(self, epochs_of_batches, model):
        """A loop with dropout; returns its weights."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batches in epochs_of_batches:
            for x, y in batches():
                optimizer.zero_grad()
                torch.nn.functional.mse_loss(model(x), y).backward()
                optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    @pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
    @pytest.mark.parametrize("has_generator", [False, True])
    def test_one_worker_equals_a_hand_written_loop_bit_for_bit(self, options, has_generator):
        data = TensorDataset(torch.randn(22, 4), torch.randn(22, 1))

        def loader(sampler):
            own = {"generator": torch.Generator().manual_seed(9)} if has_generator else {}
            order = {"shuffle": True} if sampler is None else {"sampler": sampler}
            return DataLoader(data, batch_size=4, **order, **own, **options)

        def model():
            torch.manual_seed(1)
            return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

        sampler = None if has_generator else DistributedSampler(data, num_replicas=1, rank=0, seed=7)
        by_hand = loader(sampler)

        def epoch_by_hand(epoch):
            if sampler is not None:
                sampler.set_epoch(epoch)
            return by_hand

        own = TrainData(loader(None), rank=0, world_size=1, seed=7)
        expected = self.train([lambda epoch=epoch: epoch_by_hand(epoch) for epoch in range(3)], model())
        state = torch.get_rng_state()
        actual = self.train([lambda epoch=epoch: own.epoch(epoch) for epoch in range(3)], model())
        assert torch.equal(actual, expected)
        assert torch.equal(torch.get_rng_state(), state)

    @ALL_MAP_STYLE
    @WORLD_SIZES
    def test_an_epoch_draws_as_many_random_numbers_as_a_plain_loader(self, make_loader, world_size):
        data = TrainData(make_loader(), rank=0, world_size=world_size, seed=0)
        is_drawing = not isinstance(make_loader(), list) and make_loader().generator is None
        torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
        if is_drawing:
            torch.empty((), dtype=torch.int64).random_()
        expected = torch.rand(()), random.random(), numpy.random.rand()
        torch.manual_seed(3), random.seed(3), numpy.random.seed(3)
        list(data.epoch(0))
        assert (torch.rand(()), random.random(), numpy.random.rand()) == expected

    @pytest.mark.parametrize(
        ("kind", "options"),
        [
            ("shared", {}),
            ("shared", {"num_workers": 1}),
            ("shared", {"num_workers": 1, "persistent_workers": True}),
            ("sampler's", {}),
            ("weighted", {}),
        ],
    )
    def test_the_order_of_a_generator_continues_after_a_resume(self, kind, options):
        def make():
            generator = torch.Generator().manual_seed(6)
            if kind == "shared":
                return DataLoader(numbers(17), batch_size=3, shuffle=True, generator=generator, **options)
            if kind == "weighted":
                sampler = WeightedRandomSampler(torch.arange(17.0), 17, generator=generator)
            else:
                sampler = RandomSampler(range(17), generator=generator)
            return DataLoader(numbers(17), batch_size=3, sampler=sampler, **options)

        def data_of_rank():
            return TrainData(make(), rank=1, world_size=2, seed=0)

        uninterrupted = data_of_rank()
        epochs = [taken(uninterrupted, epoch) for epoch in range(3)]
        assert epochs[0] != epochs[1]
        first = data_of_rank()
        taken(first, 0)
        at_the_border = first.state_dict(num_done=3)
        feed = first.epoch(1)
        next(feed)
        inside = first.state_dict(num_done=1)
        resumed = data_of_rank()
        resumed.load_state_dict(at_the_border)
        assert [taken(resumed, 1), taken(resumed, 2)] == epochs[1:]
        resumed = data_of_rank()
        resumed.load_state_dict(inside)
        assert [taken(resumed, 1, skip=1), taken(resumed, 2)] == [epochs[1][1:], epochs[2]]
        resumed = data_of_rank()
        resumed.load_state_dict(inside)
        assert taken(resumed, 1) == epochs[1], "no batch of the epoch under way was finished"


STREAMS = {
    "iterable data set": lambda rank: DataLoader(Counting(23), batch_size=3),
    "with a length": lambda rank: DataLoader(SizedCounting(23, length=23), batch_size=3),
    "shuffled": lambda rank: DataLoader(Counting(23, is_shuffled=True), batch_size=3),
    "shuffled in a process": lambda rank: DataLoader(Counting(23, is_shuffled=True), batch_size=3, num_workers=1),
    "no loader at all": lambda rank: OwnLoader(23),
}


class OwnLoader:
    def __init__(self, num_samples):
        self.num_samples = num_samples

    def __iter__(self):
        return ((part,) for part in torch.arange(self.num_samples).split(3))


class TestStreams:
    @pytest.mark.parametrize("make_loader", STREAMS.values(), ids=STREAMS)
    @WORLD_SIZES
    def test_every_batch_goes_to_exactly_one_rank(self, make_loader, world_size):
        ranks = streamed(make_loader, world_size)
        dealt = [share for step in zip(*ranks, strict=True) for share, _ in step if share is not None]
        assert sorted(flat(dealt)) == list(range(23))
        assert [len(share) for share in dealt] == [3] * 7 + [2], "in the order of the stream"

    def test_ranks_with_different_random_states_read_one_stream(self):
        def run(rank, agree):
            torch.manual_seed(rank), random.seed(rank), numpy.random.seed(rank)
            expected = torch.rand(1), random.random(), numpy.random.rand()
            torch.manual_seed(rank), random.seed(rank), numpy.random.seed(rank)
            loader = DataLoader(Counting(20, is_shuffled=True), batch_size=2)
            whole = taken(TrainData(loader, rank=rank, world_size=2, seed=0, agree=agree))
            assert (torch.rand(1), random.random(), numpy.random.rand()) == expected
            return whole

        assert sorted(flat(share for rank in in_lockstep(2, run) for share, _ in rank)) == list(range(20))

    def test_every_epoch_has_different_random_numbers(self):
        first, second = (streamed(STREAMS["shuffled"], 2, epoch=epoch) for epoch in (0, 1))
        assert first != second

    def test_batches_are_weighted_by_their_size(self):
        # Batches of 3, 3, 3, 3, 2: the last two global batches are (3, 3) and (2, nothing).
        assert streamed(lambda rank: DataLoader(Counting(14), batch_size=3), 2) == [
            [([0, 1, 2], 1.0), ([6, 7, 8], 1.0), ([12, 13], 2.0)],
            [([3, 4, 5], 1.0), ([9, 10, 11], 1.0), (None, 0.0)],
        ]
        assert [rank[-1] for rank in streamed(lambda rank: DataLoader(Counting(11), batch_size=3), 2)] == [
            ([6, 7, 8], 2 * 3 / 5),
            ([9, 10], 2 * 2 / 5),
        ]

    @pytest.mark.parametrize("skip", [0, 1, 2, 3, 5])
    @WORLD_SIZES
    @pytest.mark.filterwarnings("ignore:the training loader is a stream")
    def test_skipping_yields_the_rest_of_the_epoch(self, skip, world_size):
        make_loader = STREAMS["shuffled" if world_size > 1 else "iterable data set"]
        whole = streamed(make_loader, world_size)
        assert streamed(make_loader, world_size, skip=skip) == [rank[skip:] for rank in whole]

    def test_lengths_are_per_worker_and_infinite_where_unknown(self):
        def num_batches(loader):
            return in_lockstep(
                3, lambda rank, agree: TrainData(loader, rank=rank, world_size=3, seed=0, agree=agree).num_batches
            )

        assert num_batches(DataLoader(Counting(23), batch_size=3)) == [math.inf] * 3
        assert num_batches(DataLoader(SizedCounting(23, length=23), batch_size=3)) == [3] * 3
        assert num_batches(OwnLoader(23)) == [math.inf] * 3

    def test_one_worker_reads_the_stream_without_agreement(self):
        data = TrainData(OwnLoader(7), rank=0, world_size=1, seed=0, agree=None)
        assert taken(data) == [([0, 1, 2], 1.0), ([3, 4, 5], 1.0), ([6], 1.0)]

    def test_an_empty_batch_does_not_end_the_epoch(self):
        batches = [(torch.ones(size),) for size in (0, 0, 2, 2)]
        ranks = streamed(lambda rank: iter(batches), 2)
        assert [[share for share, _ in rank] for rank in ranks] == [[[], [1.0, 1.0]]] * 2

    def test_an_exhausted_iterator_is_not_called_again(self):
        class StartingAnew:
            def __init__(self, num_batches):
                self.num_batches, self.num_yielded = num_batches, 0

            def __iter__(self):
                return self

            def __next__(self):
                self.num_yielded = (self.num_yielded + 1) % (self.num_batches + 1)
                if self.num_yielded == 0:
                    raise StopIteration
                return (torch.arange(2),)

        ranks = streamed(lambda rank: StartingAnew(1 + 2 * rank), 2, shard=False)
        assert [[share is not None for share, _ in rank] for rank in ranks] == [[True, False, False], [True] * 3]

    @pytest.mark.filterwarnings("ignore:the training loader is a stream")
    @pytest.mark.parametrize("kind", [list, iter])
    def test_a_split_by_the_user_is_kept_and_its_batches_are_agreed_upon(self, kind):
        def own_part(rank):
            return kind([(torch.arange(4),)] * (rank + 1))

        whole = [[(None if k > rank else [0, 1, 2, 3], 3.0 / (3 - k) if k <= rank else 0.0) for k in range(3)]
                 for rank in range(3)]  # fmt: skip
        assert streamed(own_part, 3, shard=False) == whole
        assert streamed(own_part, 3, shard=False, skip=1) == [rank[1:] for rank in whole]

    def test_user_splits_of_different_lengths_have_the_largest_number_of_batches(self):
        def run(rank, agree):
            loader = DataLoader(numbers(4 + 4 * rank), batch_size=2)
            data = TrainData(loader, rank=rank, world_size=2, seed=0, shard=False, agree=agree)
            return data.num_batches, taken(data)

        (few, first), (many, second) = in_lockstep(2, run)
        assert (few, many) == (4, 4)
        assert first == [([0, 1], 1.0), ([2, 3], 1.0), (None, 0.0), (None, 0.0)]
        assert second == [([0, 1], 1.0), ([2, 3], 1.0), ([4, 5], 2.0), ([6, 7], 2.0)]


EVALUATED = {
    **MAP_STYLE,
    "drop_last": lambda: DataLoader(numbers(23), batch_size=3, drop_last=True),
    "out of order": lambda: DataLoader(SlowToStart(numbers(23)), batch_size=3, num_workers=2, in_order=False),
    **{name: lambda make=make: make(0) for name, make in STREAMS.items()},
}


class TestEvalData:
    @pytest.mark.parametrize("make_loader", EVALUATED.values(), ids=EVALUATED)
    @WORLD_SIZES
    def test_single_process_batches_are_dealt_out_in_turn(self, make_loader, world_size):
        (single,) = evaluated(make_loader, 1)
        ranks = evaluated(make_loader, world_size)
        for rank, own in enumerate(ranks):
            assert [index for index, _ in own] == list(range(rank, len(single), world_size))
        together = dict(flat(ranks))
        assert len(together) == len(single)
        seen = [together[index] for index in range(len(single))]
        num_samples = {"even": 24, "drop_last": 21}.get(name_of(make_loader), 23)
        assert sorted(flat(seen)) == list(range(num_samples))
        if not name_of(make_loader).startswith("shuffled"):
            assert seen == [share for _, share in single]

    @WORLD_SIZES
    def test_the_order_of_a_sequential_data_set_is_kept(self, world_size):
        loader = DataLoader(numbers(10), batch_size=4)
        ranks = [list(EvalData(loader, rank=rank, world_size=world_size, seed=0)) for rank in range(world_size)]
        for index, batch in flat(ranks):
            assert samples(batch) == list(range(index * 4, min(index * 4 + 4, 10)))
        assert EvalData(loader, rank=0, world_size=world_size, seed=0).num_batches == math.ceil(3 / world_size)

    def test_a_second_evaluation_has_the_same_batches(self):
        for name in ("shuffle", "custom batch sampler", "unsized sampler"):
            data = EvalData(MAP_STYLE[name](), rank=1, world_size=2, seed=4)
            first, second = ([(index, samples(batch)) for index, batch in data] for _ in range(2))
            assert first == second, name

    def test_an_unknown_length_is_infinite(self):
        assert EvalData(OwnLoader(5), rank=0, world_size=2, seed=0).num_batches == math.inf

    def test_a_split_by_the_user_is_kept(self):
        sampler = DistributedSampler(range(8), num_replicas=2, rank=1, shuffle=False)
        split = DataLoader(numbers(8), batch_size=2, sampler=sampler)
        own = DataLoader(numbers(4), batch_size=2)
        for loader, shard, expected in [(split, True, [[1, 3], [5, 7]]), (own, False, [[0, 1], [2, 3]])]:
            data = EvalData(loader, rank=1, world_size=2, seed=0, shard=shard)
            assert [(index, samples(batch)) for index, batch in data] == [(1, expected[0]), (3, expected[1])]
            assert data.num_batches == 2


def evaluated(make_loader, world_size):
    ranks = [EvalData(make_loader(), rank=rank, world_size=world_size, seed=0) for rank in range(world_size)]
    return [[(index, samples(batch)) for index, batch in data] for data in ranks]


def name_of(make_loader):
    return next(name for name, make in EVALUATED.items() if make is make_loader)


@dataclasses.dataclass
class Texts:
    texts: list
    ids: torch.Tensor


Pair = namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(5, 2), 5),
        (torch.zeros(0, 2), 0),
        (torch.zeros(()), 1),
        ([torch.zeros(3), torch.zeros(4)], 3),
        (("text", [torch.zeros(3)]), 3),
        ({"name": "text", "x": {"y": torch.zeros(7, 1)}}, 7),
        (Pair("text", torch.zeros(4)), 4),
        (Texts(["a", "b"], torch.zeros(2, 9)), 2),
        (["a", "b", "c"], 1),
        ("text", 1),
        (None, 1),
        ({}, 1),
        (range(10**12), 1),
    ],
)
def test_the_size_of_a_batch_is_that_of_its_first_tensor(batch, size):
    assert get_batch_size(batch) == size

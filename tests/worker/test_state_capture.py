"""Training data resumed inside an epoch: other world sizes, stateful loaders and data sets, random augmentation.

The ranks run in this process.
"""

import itertools
import random

import numpy
import pytest
import torch
from lockstep import in_lockstep
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler, TensorDataset

import raylit as pl
from raylit.worker.data.combined import build_train_source
from raylit.worker.data.train_data import TrainData

THROWN_AWAY = pytest.mark.filterwarnings("ignore:the training loader is a stream")


def numbers(num_samples, start=0):
    return TensorDataset(torch.arange(start, start + num_samples))


class Stream(IterableDataset):
    def __init__(self, num_samples, *, is_shuffled=False):
        self.num_samples = num_samples
        self.is_shuffled = is_shuffled

    def __iter__(self):
        order = torch.randperm(self.num_samples) if self.is_shuffled else torch.arange(self.num_samples)
        yield from ((number,) for number in order)


class Chunks(Sampler):
    """Index batches of sizes 1, 2, 3, 1, ..."""

    def __len__(self):
        return 12

    def __iter__(self):
        rest = torch.randperm(23).tolist()
        for size in itertools.cycle([1, 2, 3]):
            if not rest:
                return
            yield rest[:size]
            rest = rest[size:]


LOADERS = {
    "in order": lambda: DataLoader(numbers(23), batch_size=2),
    "shuffled": lambda: DataLoader(numbers(23), batch_size=2, shuffle=True),
    "generator": lambda: DataLoader(
        numbers(23), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "sampler": lambda: DataLoader(numbers(23), batch_size=2, sampler=RandomSampler(range(23))),
    "batch sampler": lambda: DataLoader(numbers(23), batch_sampler=Chunks()),
    "no batches": lambda: DataLoader(numbers(23), batch_size=None, sampler=BatchSampler(range(23), 2, False)),
    "list": lambda: [(part,) for part in torch.arange(23).split(2)],
    "stream": lambda: DataLoader(Stream(23), batch_size=2),
    "shuffled stream": lambda: DataLoader(Stream(23, is_shuffled=True), batch_size=2),
}
COMBINED = ("min_size", "max_size", "max_size_cycle", "sequential")
CHAINS = [((2, 2), (3, 1), (1, None)), ((1, 3), (2, None)), ((3, 1), (2, 2), (3, 0), (2, None)), ((2, 6), (1, None))]
"""World sizes, each with the batches of a rank before the next one resumes; None: to the end."""


def samples(batch):
    if isinstance(batch, (list, dict)) and not torch.is_tensor(batch[0] if isinstance(batch, list) else None):
        return [samples(part) for part in (batch.values() if isinstance(batch, dict) else batch)]
    return [] if batch is None else batch[0].tolist()


def run_of(make_source, state, *, world_size, epoch, num_done, num_more):
    """Return what each rank takes and its state; the weights of every step add up to the number of ranks."""

    def run(rank, agree):
        torch.manual_seed(100 + rank)
        source = make_source(rank, world_size, agree)
        if state is not None:
            source.load_state_dict(state)
        num_left = source.num_left(epoch, num_done)
        feed = source.epoch(epoch, skip=num_done)
        taken = [(samples(batch), feed.weight) for batch in itertools.islice(feed, num_more)]
        return taken, source.state_dict(num_done=num_done + len(taken)), num_left

    ranks = in_lockstep(world_size, run)
    for step in zip(*[taken for taken, _, _ in ranks], strict=True):
        assert sum(weight for _, weight in step) == pytest.approx(world_size)
    return [[batch for batch, _ in taken] for taken, _, _ in ranks], [state for _, state, _ in ranks], ranks[0][2]


def through(make_source, chain, *, epoch=1):
    """Return all samples that the ranks of a chain take, and how far off each run's estimate of its length was."""
    state, num_done, met, estimates = None, 0, [], []
    for world_size, num_more in chain:
        taken, states, num_left = run_of(
            make_source, state, world_size=world_size, epoch=epoch, num_done=num_done, num_more=num_more
        )
        met += taken
        if num_more is None:
            estimates.append(num_left - len(taken[0]))
        num_done += len(taken[0])
        state = states[-1]
    return met, estimates[0]


def flat(nested):
    return [item for part in nested for item in (flat(part) if isinstance(part, list) else [part])]


@THROWN_AWAY
@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize("name", LOADERS)
def test_another_world_size_takes_every_remaining_sample_once(name, chain):
    def make_source(rank, world_size, agree):
        return TrainData(LOADERS[name](), rank=rank, world_size=world_size, seed=7, agree=agree)

    met, error = through(make_source, chain)
    assert sorted(flat(met)) == list(range(23))
    assert error == 0 or "stream" in name


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_samples", [1, 5, 6, 12, 13, 24])
def test_the_rest_of_an_epoch_is_cut_into_full_batches_except_the_last(num_samples, drop_last):
    def make_source(rank, world_size, agree):
        loader = DataLoader(numbers(num_samples), batch_size=2, shuffle=True, drop_last=drop_last)
        return TrainData(loader, rank=rank, world_size=world_size, seed=7)

    for num_before in range(4):
        met, error = through(make_source, [(2, num_before), (3, None)])
        num_had = min(num_before * 4, num_samples // 4 * 4 if drop_last else num_samples)
        num_rest = num_samples - num_had
        num_met = num_had + (num_rest // 6 * 6 if drop_last else num_rest)
        assert len(flat(met)) == len(set(flat(met))) == num_met
        assert error == 0


def test_another_batch_size_continues_with_the_remaining_samples():
    def of_size(batch_size):
        def make_source(rank, world_size, agree):
            loader = DataLoader(numbers(23), batch_size=batch_size, shuffle=True)
            return TrainData(loader, rank=rank, world_size=world_size, seed=7)

        return make_source

    first, states, _ = run_of(of_size(4), None, world_size=1, epoch=0, num_done=0, num_more=3)
    rest, _, _ = run_of(of_size(3), states[0], world_size=1, epoch=0, num_done=3, num_more=None)
    together = run_of(of_size(4), None, world_size=1, epoch=0, num_done=0, num_more=None)[0]
    assert flat(first) + flat(rest) == flat(together)
    assert [len(batch) for batch in rest[0]] == [3, 3, 3, 2]


@pytest.mark.parametrize("chain", CHAINS[:3], ids=str)
@pytest.mark.parametrize("mode", COMBINED)
def test_a_combination_continues_each_loader_at_its_position(mode, chain):
    def make_source(rank, world_size, agree):
        loaders = [
            DataLoader(numbers(50), batch_size=2, shuffle=True),
            DataLoader(numbers(17, start=100), batch_size=2, shuffle=True),
        ]
        loader = pl.CombinedLoader(loaders, mode)
        return build_train_source(
            loader, combination=mode, rank=rank, world_size=world_size, seed=3, shard=True, agree=agree
        )

    met, error = through(make_source, chain)
    assert error == 0
    long = [number for number in flat(met) if number < 100]
    short = [number for number in flat(met) if number >= 100]
    if mode == "sequential":
        assert sorted(long + short) == [*range(50), *range(100, 117)]
    elif mode == "min_size":
        assert set(short) == set(range(100, 117))
        assert len(set(long)) == len(long)
    else:
        # Nobody is without a batch: a few from the start of the epoch fill the last one up.
        assert set(long) == set(range(50))
        assert len(long) <= 50 + 2
        assert set(short) == set(range(100, 117))


def test_a_resume_that_is_not_exact_warns():
    def make(num_samples, world_size, **options):
        loader = DataLoader(numbers(num_samples), batch_size=2, **options)
        return TrainData(
            loader, rank=0, world_size=world_size, seed=0, agree=lambda n: [n] * world_size, shard=not options
        )

    for before, after, message in [
        (make(20, 1), make(22, 1), "begun with 20 samples or batches and the loader has 22 now"),
        (make(20, 2, shuffle=True), make(20, 1, shuffle=True), "begun by 2 workers and goes on with 1, but .* itself"),
        (*(make(20, 1, num_workers=1, in_order=False) for _ in range(2)), "with in_order=True it goes on exactly"),
    ]:
        list(itertools.islice(before.epoch(0), 2))
        after.load_state_dict(before.state_dict(num_done=2))
        with pytest.warns(UserWarning, match=message):
            after.epoch(0, skip=2)


def test_a_stream_without_a_state_warns_once_that_it_is_read_from_its_start():
    first = TrainData(DataLoader(Stream(9)), rank=0, world_size=1, seed=0)
    list(itertools.islice(first.epoch(0), 2))
    resumed = TrainData(DataLoader(Stream(9)), rank=0, world_size=1, seed=0)
    resumed.load_state_dict(first.state_dict(num_done=2))
    with pytest.warns(UserWarning, match="stream without a state_dict: the 2 batches") as caught:
        rest = [samples(batch) for batch in resumed.epoch(0, skip=2)]
    assert len(caught) == 1
    assert rest == [[number] for number in range(2, 9)]


class Counter(IterableDataset):
    """Stateful stream that counts the samples fetched."""

    def __init__(self):
        self.position = 0
        self.is_resumed = False
        self.num_fetched = 0

    def __iter__(self):
        self.position = self.position if self.is_resumed else 0
        self.is_resumed = False
        while self.position < 20:
            self.position += 1
            self.num_fetched += 1
            yield (torch.tensor(self.position - 1),)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position, self.is_resumed = state["position"], True


@pytest.mark.parametrize("chain", [((1, 3), (1, None)), ((2, 2), (2, None)), ((2, 2), (1, 3), (3, None))], ids=str)
def test_a_stateful_data_set_continues_from_its_state_with_any_world_size(chain):
    made = []

    def make_source(rank, world_size, agree):
        made.append(Counter())
        return TrainData(DataLoader(made[-1], batch_size=2), rank=rank, world_size=world_size, seed=0, agree=agree)

    met, _ = through(make_source, chain)
    assert sorted(flat(met)) == list(range(20))
    num_had = sum(world_size * num * 2 for world_size, num in chain[:-1])
    assert {one.num_fetched for one in made[-chain[-1][0] :]} == {20 - num_had}


class Augmented(Dataset):
    """A sample and random numbers of every kind."""

    def __init__(self, num_samples=23, generator=None):
        self.num_samples = num_samples

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        noise = [torch.rand(()).item(), random.random(), numpy.random.rand()]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


def seeded_by_hand(process):
    numpy.random.seed(torch.initial_seed() % 2**32)


PROCESSES = {
    "one": {"num_workers": 1},
    "two": {"num_workers": 2, "prefetch_factor": 1},
    "ahead": {"num_workers": 2, "prefetch_factor": 4},
    "persistent": {"num_workers": 2, "persistent_workers": True},
    "init": {"num_workers": 2, "worker_init_fn": seeded_by_hand},
    "generator": {"num_workers": 1, "shuffle": False, "generator": 4},
}


@pytest.mark.parametrize("options", PROCESSES.values(), ids=PROCESSES)
def test_random_augmentation_in_loader_processes_continues_after_a_resume(options):
    def make():
        seed = options.get("generator")
        of_own = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
        loader = DataLoader(Augmented(), batch_size=2, **{"shuffle": True, **options, **of_own})
        return TrainData(loader, rank=0, world_size=1, seed=0)

    def taken(source, epoch, *, skip=0, limit=None):
        feed = source.epoch(epoch, skip=skip)
        return [batch.tolist() for batch in itertools.islice(feed, limit)]

    torch.manual_seed(1)
    whole = make()
    epochs, states = [], {}
    for epoch in range(3):
        feed, batches = whole.epoch(epoch), []
        for index, batch in enumerate(feed):
            batches.append(batch.tolist())
            states[epoch, index + 1] = whole.state_dict(num_done=index + 1), torch.get_rng_state()
        epochs.append(batches)
    assert len({tuple(batch[0]) for epoch in epochs for batch in epoch}) == 3 * 12
    for epoch, num_done in [(0, 1), (1, 1), (1, 2), (1, 7), (2, 11), (0, 12)]:
        state, random_state = states[epoch, num_done]
        torch.manual_seed(99)
        resumed = make()
        resumed.load_state_dict(state)
        if num_done < 12:
            rest = taken(resumed, epoch, skip=num_done)
            assert rest == epochs[epoch][num_done:], (epoch, num_done)
        # Where a feed has begun the run's own random numbers go on with those of the checkpoint.
        torch.set_rng_state(random_state)
        if epoch < 2:
            assert taken(resumed, epoch + 1) == epochs[epoch + 1], (epoch, num_done)


def test_recording_random_states_does_not_change_random_numbers():
    def loader():
        return DataLoader(Augmented(), batch_size=2, num_workers=2)

    torch.manual_seed(1)
    by_hand = [batch.tolist() for batch in loader()]
    torch.manual_seed(1)
    source = TrainData(loader(), rank=0, world_size=1, seed=0)
    assert [batch.tolist() for batch in source.epoch(0)] == by_hand

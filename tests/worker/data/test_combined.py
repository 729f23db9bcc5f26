"""Combinations of loaders, shared out over ranks that run in this process."""

import itertools
import math

import pytest
import torch
from lockstep import in_lockstep
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import raylit as pl
from raylit.worker.data.combined import build_eval_data, build_train_source

WORLD_SIZES = pytest.mark.parametrize("world_size", [1, 2, 3])
MODES = pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size", "sequential"])


def numbers(start, stop, batch_size=2, **options):
    return DataLoader(TensorDataset(torch.arange(start, stop)), batch_size=batch_size, **options)


class Stream(IterableDataset):
    def __init__(self, start, stop):
        self.start, self.stop = start, stop

    def __iter__(self):
        yield from ((torch.tensor(number),) for number in range(self.start, self.stop))


def samples(batch):
    if isinstance(batch, dict):
        return {key: samples(value) for key, value in batch.items()}
    return batch[0].tolist() if batch is not None else None


def source_of(loader, *, rank=0, world_size=1, mode="max_size_cycle", agree=None, shard=True):
    return build_train_source(
        loader, combination=mode, rank=rank, world_size=world_size, seed=3, shard=shard, agree=agree
    )


def taken(source, epoch=0, *, skip=0, limit=None):
    feed = source.epoch(epoch, skip=skip)
    return [(samples(batch), feed.weight) for batch in itertools.islice(feed, limit)]


def trained(make_loader, world_size, *, epoch=0, skip=0, **options):
    """What each rank takes of an epoch."""

    def run(rank, agree):
        return taken(
            source_of(make_loader(), rank=rank, world_size=world_size, agree=agree, **options), epoch, skip=skip
        )

    return in_lockstep(world_size, run)


def uneven():
    return {"short": numbers(0, 7, shuffle=True), "long": numbers(100, 123, shuffle=True)}


def with_stream():
    return {"short": DataLoader(Stream(0, 7), batch_size=2), "long": numbers(100, 123, shuffle=True)}


COLLECTIONS = pytest.mark.parametrize("make", [uneven, with_stream])


@COLLECTIONS
@MODES
@WORLD_SIZES
def test_every_rank_runs_the_same_number_of_steps(make, mode, world_size):
    ranks = trained(make, world_size, mode=mode)
    assert len({len(rank) for rank in ranks}) == 1
    if make is uneven:
        known = source_of(make(), world_size=world_size, mode=mode).num_batches
        assert (
            known
            == len(ranks[0])
            == {
                "min_size": math.ceil(7 / (2 * world_size)),
                "sequential": math.ceil(7 / (2 * world_size)) + math.ceil(23 / (2 * world_size)),
            }.get(mode, math.ceil(23 / (2 * world_size)))
        )


@COLLECTIONS
@pytest.mark.parametrize("mode", ["max_size_cycle", "max_size"])
@WORLD_SIZES
def test_every_rank_has_a_batch_in_every_step_and_every_sample_is_seen(make, mode, world_size):
    ranks = trained(make, world_size, mode=mode)
    assert {weight for rank in ranks for _, weight in rank} == {1.0}
    for key, expected in [("short", set(range(7))), ("long", set(range(100, 123)))]:
        met = [batch[key] for rank in ranks for batch, _ in rank if batch[key] is not None]
        assert set(itertools.chain.from_iterable(met)) == expected
        at_once = {tuple(batch[key] is None for batch, _ in step) for step in zip(*ranks, strict=True)}
        assert at_once <= {(True,) * world_size, (False,) * world_size}
    if mode == "max_size_cycle":
        assert all(None not in batch.values() for rank in ranks for batch, _ in rank)


@WORLD_SIZES
def test_sequential_mode_shares_samples_out_exactly_once(world_size):
    ranks = trained(lambda: [numbers(0, 7), numbers(100, 105)], world_size, mode="sequential")
    met = [sample for rank in ranks for batch, _ in rank if batch for sample in batch]
    assert sorted(met) == [*range(7), *range(100, 105)]
    for step in zip(*ranks, strict=True):
        assert sum(weight for _, weight in step) == pytest.approx(world_size)


@COLLECTIONS
@MODES
@WORLD_SIZES
@pytest.mark.filterwarnings("ignore:the training loader is a stream")
def test_skipping_yields_the_rest_of_the_uninterrupted_epoch(make, mode, world_size):
    whole = trained(make, world_size, mode=mode, epoch=2)
    for skip in range(1, len(whole[0]) + 1):
        assert trained(make, world_size, mode=mode, epoch=2, skip=skip) == [rank[skip:] for rank in whole], skip


def test_each_pass_and_each_loader_has_a_different_order():
    source = source_of([numbers(0, 8, shuffle=True), numbers(0, 8, shuffle=True), numbers(0, 32)])
    steps = [[samples(part) for part in batch] for batch in source.epoch(0)]
    first, second = [steps[k][0] for k in range(4)], [steps[k][0] for k in range(4, 8)]
    other = [steps[k][1] for k in range(4)]
    for order in (first, second, other):
        assert sorted(itertools.chain.from_iterable(order)) == list(range(8))
    assert first != second
    assert first != other


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_first_loader_has_the_same_batches_as_without_a_combination(world_size):
    alone = trained(lambda: numbers(0, 12, shuffle=True), world_size)
    combined = trained(lambda: {"x": numbers(0, 12, shuffle=True)}, world_size)
    assert combined == [[({"x": batch}, weight) for batch, weight in rank] for rank in alone]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_a_samplers_own_generator_continues_after_a_resume(mode):
    def make():
        def loader(start, stop):
            sampler = RandomSampler(range(stop - start), generator=torch.Generator().manual_seed(start))
            return numbers(start, stop, sampler=sampler)

        return {"short": loader(0, 8), "long": loader(100, 130)}

    uninterrupted = source_of(make(), mode=mode)
    epochs = [taken(uninterrupted, epoch) for epoch in range(3)]
    first = source_of(make(), mode=mode)
    taken(first, 0)
    taken(first, 1, limit=3)
    resumed = source_of(make(), mode=mode)
    resumed.load_state_dict(first.state_dict(num_done=3))
    assert taken(resumed, 1, skip=3) == epochs[1][3:]
    assert taken(resumed, 2) == epochs[2]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
@WORLD_SIZES
def test_an_evaluation_deals_out_the_single_process_combination_in_turn(mode, world_size):
    def evaluated(world_size):
        def data(rank):
            combined = pl.CombinedLoader(uneven(), mode)
            return build_eval_data(combined, rank=rank, world_size=world_size, seed=0, shard=True)

        return [[(index, samples(batch)) for index, batch in data(rank)] for rank in range(world_size)], data(0)

    ((single,), _), (ranks, data) = evaluated(1), evaluated(world_size)
    together = dict(itertools.chain.from_iterable(ranks))
    assert [together[index] for index in range(len(single))] == [batch for _, batch in single]
    assert len(together) == len(single) == (4 if mode == "min_size" else 12)
    assert data.num_batches == math.ceil(len(single) / world_size)


def test_a_loader_with_fewer_batches_than_ranks_is_an_error():
    with pytest.raises(pl.ModuleError, match=r"no batch at all .* workers \(3\)"):
        trained(lambda: {"few": DataLoader(Stream(0, 2), batch_size=2), "many": numbers(0, 12)}, 3)

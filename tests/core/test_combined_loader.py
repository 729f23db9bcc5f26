"""CombinedLoader by hand: its modes, its shapes, what counts as a collection."""

import collections

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl
from raylit.core.combined_loader import holds_loaders


def loader(num_samples, batch_size=1):
    return DataLoader(torch.arange(num_samples), batch_size=batch_size)


def plain(value):
    """Tensors as lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Pair):
        return Pair(*map(plain, value))
    return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value


STEPS = {
    "min_size": [([0], [0, 1]), ([1], [2, 3])],
    "max_size": [([0], [0, 1]), ([1], [2, 3]), (None, [4])],
    "max_size_cycle": [([0], [0, 1]), ([1], [2, 3]), ([0], [4])],
}


@pytest.mark.parametrize("mode", STEPS)
def test_each_step_has_a_batch_of_every_loader(mode):
    combined = pl.CombinedLoader((loader(2), loader(5, 2)), mode)
    assert plain(list(combined)) == [(step, index, 0) for index, step in enumerate(STEPS[mode])]
    assert len(combined) == len(STEPS[mode])


def test_sequential_counts_batches_per_loader():
    combined = pl.CombinedLoader({"a": loader(2), "b": loader(1)}, "sequential")
    assert plain(list(combined)) == [([0], 0, 0), ([1], 1, 0), ([0], 0, 1)]
    assert len(combined) == 3


Pair = collections.namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    ("collection", "first"),
    [
        ([loader(1), loader(1)], [[0], [0]]),
        ((loader(1),), ([0],)),
        ({"a": loader(1), "b": [loader(1), loader(2)]}, {"a": [0], "b": [[0], [0]]}),
        (Pair(loader(1), {"x": loader(1)}), Pair([0], {"x": [0]})),
        ({"batches": [torch.tensor([7]), torch.tensor([8])]}, {"batches": [7]}),
        (loader(1), [0]),
    ],
)
def test_batches_have_the_shape_of_the_collection(collection, first):
    batch, _, _ = next(iter(pl.CombinedLoader(collection)))
    assert plain(batch) == first
    assert type(batch) is type(collection) or isinstance(collection, DataLoader)


def test_a_shuffled_loader_is_reshuffled_when_it_restarts():
    shuffled = DataLoader(torch.arange(50), batch_size=50, shuffle=True)
    steps = [batch[0].tolist() for batch, _, _ in pl.CombinedLoader([shuffled, loader(3)], "max_size_cycle")]
    assert len(steps) == 3
    assert steps[0] != steps[1] != steps[2]


def test_an_empty_loader_ends_modes_that_need_its_batches():
    for mode, num_steps in [("min_size", 0), ("max_size_cycle", 0), ("max_size", 2), ("sequential", 2)]:
        combined = pl.CombinedLoader([loader(0), loader(2)], mode)
        assert len(combined) == len(list(combined)) == num_steps, mode
        assert list(pl.CombinedLoader([], mode)) == []


def test_the_length_of_a_loader_without_length_is_a_type_error():
    with pytest.raises(TypeError):
        len(pl.CombinedLoader([(batch for batch in ()), loader(2)]))


def test_the_error_for_an_unknown_mode_names_the_known_ones():
    with pytest.raises(pl.ConfigError, match=r"mode='longest'.*'min_size', 'max_size_cycle', 'max_size', 'sequential'"):
        pl.CombinedLoader([], "longest")


def test_holds_loaders_distinguishes_loaders_from_batches():
    batch = (torch.ones(2), {"x": torch.ones(2)})
    for collection in (
        [loader(1)],
        (iter([batch]),),
        {"a": loader(1)},
        [[batch, batch], loader(1)],
        [{"a": loader(1)}],
    ):
        assert holds_loaders(collection), collection
    for batches in ([batch, batch], [torch.ones(2)], [["text"]], batch, {"x": torch.ones(2)}, loader(1), []):
        assert not holds_loaders(batches), batches
    assert not holds_loaders([TensorDataset(torch.ones(2))[0]])

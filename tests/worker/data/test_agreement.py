"""Ranks with different data raise an error; random numbers, small last batches and classes of the user's script."""

import os
import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler, Subset, TensorDataset

import raylit as pl
from raylit.worker.data.agreement import Fingerprint, fingerprint_indices, fingerprint_samples
from raylit.worker.data.sampling import Share

FULL = TensorDataset(torch.arange(24.0)[:, None])


class Names(Dataset):
    def __init__(self, names):
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return torch.tensor([float(self.names[index][1:])])


class EntropyOrder(Sampler):
    def __len__(self):
        return 24

    def __iter__(self):
        return iter(numpy.random.default_rng().permutation(24).tolist())


class OwnSplit(IterableDataset):
    def __iter__(self):
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        yield from (torch.tensor([float(number)]) for number in range(rank, 24, world_size))


def loaders(case, rank):
    """The training loader and the validation loader of a rank."""
    plain = DataLoader(FULL, batch_size=2)
    if case == "length":
        return DataLoader(Subset(FULL, range(24 - 4 * rank)), batch_size=2), plain
    if case == "length of the user's own split":
        short = Subset(FULL, range(24 - 4 * rank))
        return DataLoader(short, batch_size=2, sampler=DistributedSampler(short, 2, rank)), plain
    if case == "indices":
        return DataLoader(Subset(FULL, numpy.random.default_rng().permutation(24)[:16]), batch_size=2), plain
    if case == "values":
        return DataLoader(torch.tensor(numpy.random.default_rng().permutation(24)).float()[:, None], 2), plain
    if case == "names":
        return DataLoader(Names([f"s{number}" for number in numpy.random.default_rng().permutation(24)]), 2), plain
    if case == "batch size":
        return DataLoader(FULL, batch_size=2 + rank), plain
    if case == "order":
        return DataLoader(FULL, batch_size=2, sampler=EntropyOrder()), plain
    if case == "order of one of two":
        return [plain, DataLoader(FULL, batch_size=2, sampler=EntropyOrder())], plain
    if case == "validation order":
        return plain, DataLoader(FULL, batch_size=2, sampler=EntropyOrder())
    if case == "validation length":
        return plain, DataLoader(Subset(FULL, range(24 - rank)), batch_size=2)
    if case == "stream":
        return DataLoader(OwnSplit(), batch_size=2), plain
    assert case == "validation stream"
    return plain, DataLoader(OwnSplit(), batch_size=2)


class Seen(pl.LightningModule):
    """Records what each rank has trained on in files."""

    def __init__(self, path):
        super().__init__()
        self.path = str(path)
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        with open(f"{self.path}/{self.global_rank}", "a") as file:
            file.write("".join(f"{value!r} " for value in torch.as_tensor(batch).flatten().tolist()))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Validated(Seen):
    def validation_step(self, batch, batch_idx): ...


class Disagreeing(pl.LightningDataModule):
    def __init__(self, case):
        self.case = case

    def setup(self, stage=None):
        self.train, self.val = loaders(self.case, int(os.environ["RANK"]))

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("length", r"training data: the length of the data set is 24 on rank 0, 20 on rank 1|number of samples"),
        ("length of the user's own split", "training data: the length of the data set is 24 on rank 0, 20 on rank 1"),
        ("indices", "training data: the samples on rank 1 are not those of rank 0"),
        ("values", "training data: the samples on rank 1 are not those of rank 0"),
        ("names", "training data: the samples on rank 1 are not those of rank 0"),
        ("batch size", "training data: the batch size is 2 on rank 0, 3 on rank 1"),
        ("order", "training data: the sampler's order on rank 1 is not that of rank 0"),
        ("order of one of two", "training data: the sampler's order on rank 1 is not that of rank 0"),
        ("validation order", "validation data: the sampler's order on rank 1"),
        ("validation length", "validation data: the length of the data set is 24 on rank 0, 23 on rank 1"),
        ("stream", "training data is a stream .* use_distributed_sampler=False"),
        ("validation stream", "validation data is a stream .* use_distributed_sampler=False"),
    ],
)
def test_ranks_with_different_data_raise_an_error_that_names_the_difference(case, message, quiet, tmp_path):
    with pytest.raises(pl.ModuleError, match=message):
        pl.fit(Validated(tmp_path), datamodule=Disagreeing(case), num_workers=2, max_epochs=1, **quiet)


class Drawn(pl.LightningDataModule):
    """A split that follows the random numbers, of which one rank has drawn more in `prepare_data`, and a set."""

    def prepare_data(self):
        torch.randn(3), numpy.random.rand(3)

    def setup(self, stage=None):
        part, _ = torch.utils.data.random_split(range(24), [16, 8])
        names = list({f"s{number}" for number in range(24)})
        self.train = Names([names[index] for index in part])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=2)


def numbers_of(path, rank):
    return [float(word) for word in (path / str(rank)).read_text().split()]


def test_a_random_split_of_a_set_is_the_same_on_all_ranks(quiet, tmp_path):
    pl.fit(Seen(tmp_path), datamodule=Drawn(), num_workers=2, max_epochs=1, **quiet)
    parts = [numbers_of(tmp_path, rank) for rank in range(2)]
    assert len(parts[0]) == len(parts[1]) == 8
    assert len(set(parts[0] + parts[1])) == 16


def test_a_stream_that_splits_itself_is_not_sharded_without_use_distributed_sampler(quiet, tmp_path):
    loader = DataLoader(OwnSplit(), batch_size=2)
    pl.fit(Seen(tmp_path), loader, num_workers=2, max_epochs=1, use_distributed_sampler=False, **quiet)
    assert [numbers_of(tmp_path, rank) for rank in range(2)] == [list(range(0, 24, 2)), list(range(1, 24, 2))]


def test_fingerprints_differ_with_the_data_but_not_with_rounding_or_directories():
    def of(value):
        fingerprint = Fingerprint()
        fingerprint.add_value(value)
        return fingerprint

    assert of({"x": torch.tensor([1.0, 2.0]), "y": ["a", 3]}) == of(
        {"x": torch.tensor([1.0, 2.0 + 1e-6]), "y": ["a", 3]}
    )
    assert of("/one/a.png") == of("/two/a.png") != of("/two/b.png")
    for other in (torch.tensor([2.0, 1.0]), torch.tensor([[1.0, 2.0]]), [1.0, 2.0], torch.tensor([1, 2])):
        assert of(torch.tensor([1.0, 2.0])) != of(other)
    assert fingerprint_samples(Names(["a", "b"])) != fingerprint_samples(Names(["b", "a"]))
    assert fingerprint_samples(Subset(FULL, [0, 1])) != fingerprint_samples(Subset(FULL, [1, 0]))
    assert fingerprint_indices([1, 2]) == fingerprint_indices([1, 2]) != fingerprint_indices([2, 1])
    assert fingerprint_indices(["a", "b"]) != fingerprint_indices(["b", "a"])


class Noise(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        draws = [torch.rand(()).item(), numpy.random.rand(), random.random()]
        return torch.tensor(draws, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "generator": torch.Generator()}])
def test_each_rank_draws_different_random_numbers(options, quiet, tmp_path):
    pl.fit(Seen(tmp_path), DataLoader(Noise(), batch_size=2, **options), num_workers=2, max_epochs=1, **quiet)
    drawn = [numbers_of(tmp_path, rank) for rank in range(2)]
    assert len(set(drawn[0] + drawn[1])) == 2 * 4 * 3, "three generators, four samples on each rank"


@pytest.mark.parametrize(
    ("num_samples", "world_size", "sizes"),
    [
        (11, 2, [3, 0]),
        (13, 2, [3, 2]),
        (12, 2, [4, 0]),
        (14, 4, [4, 4, 3, 3]),
        (9, 2, [1, 0]),
        (4, 2, [2, 2]),
        (3, 2, [3, 0]),
    ],
)
def test_no_share_of_the_last_batch_is_smaller_than_a_single_process_would_make_it(num_samples, world_size, sizes):
    last = []
    for rank in range(world_size):
        share = Share(
            lambda epoch: iter(range(num_samples)),
            num_items=num_samples,
            batch_size=4,
            rank=rank,
            world_size=world_size,
        )
        batches = [*share]
        last.append(len(batches[-1]) if len(batches) == -(-num_samples // (4 * world_size)) else 0)
    assert last == sizes


class Normed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.out = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.out(self.norm(batch[0])).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def normed(num_samples, **options):
    torch.manual_seed(0)
    model = Normed()
    data = TensorDataset(torch.arange(float(num_samples))[:, None] ** 2)
    pl.fit(model, DataLoader(data, batch_size=4), max_epochs=1, **options)
    return model.norm


def test_sharding_leaves_no_batch_of_one_sample_to_batch_norm(quiet):
    assert normed(11, num_workers=2, **quiet).num_batches_tracked.item() == 2


def test_synced_batch_norm_has_the_statistics_of_the_global_batches(quiet):
    by_hand = torch.nn.BatchNorm1d(1)
    for batch in (torch.arange(11.0)[:, None] ** 2).split(8):
        by_hand(batch)
    norm = normed(11, num_workers=2, sync_batchnorm=True, **quiet)
    torch.testing.assert_close(norm.running_var, by_hand.running_var)
    torch.testing.assert_close(norm.running_mean, by_hand.running_mean)


class NormedSignal(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.BatchNorm1d(3)
        self.layer = torch.nn.Linear(24, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(self.norm(batch[0]).flatten(1)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_synced_batch_norm_works_where_a_rank_has_no_sample_of_the_last_batch(quiet):
    data = TensorDataset(torch.linspace(-1, 2, 9 * 24).reshape(9, 3, 8) ** 3)
    alone, shared = NormedSignal(), NormedSignal()
    pl.fit(alone, DataLoader(data, batch_size=4), max_epochs=2, num_workers=0, **quiet)
    pl.fit(shared, DataLoader(data, batch_size=2), max_epochs=2, num_workers=2, sync_batchnorm=True, **quiet)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(("num_workers", "is_synced"), [(0, False), (2, False), (2, True)])
def test_the_error_for_a_last_batch_of_one_sample_names_drop_last(num_workers, is_synced, quiet):
    with pytest.raises((ValueError, pl.ModuleError), match="drop_last=True"):
        normed(9, num_workers=num_workers, sync_batchnorm=is_synced, **quiet)


SCRIPT = """
    import sys
    from typing import NamedTuple

    import torch
    from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

    import raylit as pl

    class Batch(NamedTuple):
        x: torch.Tensor

    class Data(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return Batch(torch.tensor([float(index)]))

    class Backwards(Sampler):
        def __len__(self):
            return 8

        def __iter__(self):
            return iter(range(7, -1, -1))

    def collate(items):
        return Batch(torch.stack([item.x for item in items]))

    def init(process):
        assert get_worker_info().id == process

    class Model(pl.LightningModule):
        def __init__(self, method):
            super().__init__()
            self.method, self.weight = method, torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            assert type(batch) is Batch
            self.log("x", batch.x.mean(), on_step=False, on_epoch=True)
            return self.weight * 1.0

        def train_dataloader(self):
            return DataLoader(
                Data(), 2, sampler=Backwards(), num_workers=1, collate_fn=collate, worker_init_fn=init,
                multiprocessing_context=self.method,
            )

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    if __name__ == "__main__":
        switches = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        for num_workers, method in [(0, "spawn"), (2, "fork"), (2, "spawn"), (2, "forkserver")]:
            fit = pl.fit(Model(method), num_workers=num_workers, max_epochs=1, **dict.fromkeys(switches, False))
            print(num_workers, method, float(fit.callback_metrics["x"]))
"""


@pytest.mark.cluster
@pytest.mark.slow
def test_loader_processes_find_the_classes_of_the_script(run_script):
    lines = run_script(SCRIPT, timeout_s=400.0).splitlines()
    assert lines == ["0 spawn 3.5", "2 fork 3.5", "2 spawn 3.5", "2 forkserver 3.5"]

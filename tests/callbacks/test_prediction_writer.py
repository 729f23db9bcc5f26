"""BasePredictionWriter: who writes what, when, with which indices."""

import pytest
import torch
from models import Regression, make_data
from torch.utils.data import DataLoader, RandomSampler

import raylit as pl


class Writer(pl.BasePredictionWriter):
    """A file for each batch, and one for each worker."""

    def __init__(self, directory, write_interval):
        super().__init__(write_interval)
        self.directory = directory

    def write_on_batch_end(self, trainer, pl_module, prediction, batch_indices, batch, batch_idx, dataloader_idx):
        path = self.directory / f"batch-{trainer.global_rank}-{dataloader_idx}-{batch_idx}.pt"
        torch.save((prediction, batch_indices, batch[0]), path)

    def write_on_epoch_end(self, trainer, pl_module, predictions, batch_indices):
        torch.save((predictions, batch_indices), self.directory / f"epoch-{trainer.global_rank}.pt")


def predict(loaders, writer, *, num_workers=0, **arguments):
    trainer = pl.Trainer(num_workers=num_workers, callbacks=writer, logger=False, enable_progress_bar=False)
    model = Regression()
    return model, trainer.predict(model, loaders, **arguments)


@pytest.mark.parametrize("loader_workers", [0, 1])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_each_worker_writes_its_batches_with_their_indices(num_workers, loader_workers, tmp_path):
    data = make_data(22)
    loader = DataLoader(data, batch_size=4, num_workers=loader_workers)
    model, outputs = predict(loader, Writer(tmp_path, "batch_and_epoch"), num_workers=num_workers)
    assert len(outputs) == 6
    seen = []
    for path in sorted(tmp_path.glob("batch-*.pt")):
        prediction, indices, x = torch.load(path)
        assert torch.equal(x, data[indices][0])
        torch.testing.assert_close(prediction, model(x))
        seen += indices
    assert sorted(seen) == list(range(22))
    ranks = sorted(tmp_path.glob("epoch-*.pt"))
    assert len(ranks) == max(1, num_workers)
    seen = []
    for path in ranks:
        predictions, (indices,) = torch.load(path)
        for prediction, of_batch in zip(predictions, indices, strict=True):
            torch.testing.assert_close(prediction, model(data[of_batch][0]))
            seen += of_batch
    assert sorted(seen) == list(range(22))


def test_only_the_interval_asked_for_is_written(tmp_path):
    for interval, pattern in (("batch", "batch-*"), ("epoch", "epoch-*")):
        directory = tmp_path / interval
        directory.mkdir()
        predict(DataLoader(make_data(8), batch_size=4), Writer(directory, interval))
        assert set(directory.iterdir()) == set(directory.glob(pattern)) != set()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_predictions_are_not_returned_with_return_predictions_false(num_workers, tmp_path):
    loader = DataLoader(make_data(8), batch_size=2)
    _, outputs = predict(loader, Writer(tmp_path, "epoch"), num_workers=num_workers, return_predictions=False)
    assert outputs is None
    assert sum(len(torch.load(path)[0]) for path in tmp_path.glob("epoch-*.pt")) == 4


def test_several_loaders_have_lists_of_their_own(tmp_path):
    class Several(Regression):
        def predict_step(self, batch, batch_idx, dataloader_idx=0):
            return dataloader_idx

    writer = Writer(tmp_path, "batch_and_epoch")
    loaders = [DataLoader(make_data(4), batch_size=2), DataLoader(make_data(3), batch_size=2)]
    pl.Trainer(callbacks=writer, logger=False, enable_progress_bar=False).predict(Several(), loaders)
    predictions, indices = torch.load(tmp_path / "epoch-0.pt")
    assert predictions == [[0, 0], [1, 1]]
    assert indices == [[[0, 1], [2, 3]], [[0, 1], [2]]]
    assert torch.load(tmp_path / "batch-0-1-1.pt")[1] == [2]


def test_indices_of_a_random_sampler_are_in_its_order(tmp_path):
    data = make_data(9)
    loader = DataLoader(data, batch_size=3, sampler=RandomSampler(data, generator=torch.Generator().manual_seed(3)))
    predict(loader, Writer(tmp_path, "batch"))
    seen = []
    for path in sorted(tmp_path.glob("batch-*.pt")):
        _, indices, x = torch.load(path)
        assert torch.equal(x, data[indices][0])
        seen += indices
    assert sorted(seen) == list(range(9)) != seen


def test_a_plain_iterable_has_no_indices(tmp_path):
    predict([make_data(4)[:], make_data(2)[:]], Writer(tmp_path, "batch"))
    assert [torch.load(path)[1] for path in tmp_path.glob("batch-*.pt")] == [[], []]


def test_an_unknown_interval_and_a_missing_method_are_errors():
    with pytest.raises(pl.ConfigError, match="write_interval='step'"):
        pl.BasePredictionWriter("step")
    with pytest.raises(NotImplementedError, match="define write_on_batch_end"):
        predict(DataLoader(make_data(4), batch_size=2), pl.BasePredictionWriter())

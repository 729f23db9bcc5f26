"""An in-memory data set is one copy per host, and a write to it is an error."""

import re

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

import raylit as pl
from raylit.errors import ModuleError
from tests.models import Regression, assert_same_weights, weights_of

pytestmark = [pytest.mark.timeout(100), pytest.mark.filterwarnings("ignore:.*validation is skipped")]


def own_memory_mb():
    with open("/proc/self/smaps_rollup", encoding="utf-8") as rollup:
        return sum(map(int, re.findall(r"Private_\w+: +(\d+) kB", rollup.read()))) / 1024


class Arrays(Dataset):
    """Samples from a tensor and an array, after an optional write of `write`'s."""

    def __init__(self, num_samples=64, width=8, write=None):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_samples, width, generator=generator)
        self.y = torch.randn(num_samples, width, generator=generator).numpy()
        self.write = write

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if self.write is not None and index == 5:
            self.write(self)
        return self.x[index, :8], self.y[index, :3]


class Reader(Regression):
    """Reads all of its data, and notes what that costs each worker."""

    def on_fit_start(self):
        data = self.trainer.train_dataloader.dataset
        before = own_memory_mb()
        self.total = float(data.x.sum(dtype=torch.float64)) + float(data.y.sum(dtype=np.float64))
        self.grown_mb = torch.tensor([own_memory_mb() - before, own_memory_mb()])
        self.is_one_object = self.table is data.x
        with torch.no_grad():
            self.net[0].weight.add_(0.0)

    def training_step(self, batch, batch_idx):
        self.log("own_mb", self.grown_mb[0], on_step=False, on_epoch=True, reduce_fx="max")
        x, y = batch
        return functional.mse_loss(self(x), y)


def fit(module, loader, quiet, num_workers=2, **options):
    return pl.fit(module, loader, num_workers=num_workers, max_epochs=1, accelerator="cpu", **quiet, **options)


@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_data_is_one_copy_per_host(quiet, num_loader_workers):
    data = Arrays(num_samples=64, width=800_000)  # 200 MB each
    module = Reader()
    module.table = data.x
    fit(module, DataLoader(data, batch_size=8, num_workers=num_loader_workers), quiet)
    assert module.grown_mb[0] < 20
    # A worker without data has some 250 MB of its own.
    assert module.grown_mb[1] < 400
    assert module.is_one_object
    assert module.table is data.x
    assert module.total == pytest.approx(
        float(data.x.sum(dtype=torch.float64)) + float(data.y.sum(dtype=np.float64))
    )  # the order follows the threads


def test_numbers_are_those_of_a_run_without_sharing(quiet):
    weights = []
    for num_workers in (0, 1):
        torch.manual_seed(0)
        module = Regression()
        fit(module, DataLoader(Arrays(4096), batch_size=512, shuffle=True), quiet, num_workers=num_workers)
        weights.append(weights_of(module))
    assert_same_weights(*weights)


def write_element(data):
    data.x[0] = 1


def write_through_from_numpy(data):
    torch.from_numpy(data.y)[0] = 1


@pytest.mark.parametrize("num_loader_workers", [0, 1])
@pytest.mark.parametrize("write", [write_element, write_through_from_numpy])
def test_a_write_in_a_run_is_an_error(quiet, write, num_loader_workers):
    data = Arrays(num_samples=4096, write=write)
    before = data.x.clone()
    with pytest.raises(ModuleError, match="written in place to a"):
        fit(Regression(), DataLoader(data, batch_size=512, num_workers=num_loader_workers), quiet)
    assert torch.equal(data.x, before)


def test_a_write_to_an_array_is_refused_at_once(quiet):
    def write(data):
        data.y[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        fit(Regression(), DataLoader(Arrays(num_samples=8192, write=write), batch_size=512), quiet)

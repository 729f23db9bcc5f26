"""In-memory data sets are stored once per host, and a write to one stays in the process that writes."""

import gc
import re
import time
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch.nn import functional
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

import raylit as pl
from tests.models import Regression, assert_same_weights, weights_of

pytestmark = [pytest.mark.timeout(100), pytest.mark.filterwarnings("ignore:.*validation is skipped")]


def own_memory_mb():
    with open("/proc/self/smaps_rollup", encoding="utf-8") as rollup:
        return sum(map(int, re.findall(r"Private_\w+: +(\d+) kB", rollup.read()))) / 1024


class Arrays(Dataset):
    """Data set of a tensor and an array, which `write` may change first."""

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
    """Module that reads all of its data and records the memory this takes in each worker."""

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
def test_data_is_stored_once_per_host(quiet, num_loader_workers):
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


def test_results_equal_a_run_without_sharing(quiet):
    weights = []
    for num_workers in (0, 1):
        torch.manual_seed(0)
        module = Regression()
        fit(module, DataLoader(Arrays(4096), batch_size=512, shuffle=True), quiet, num_workers=num_workers)
        weights.append(weights_of(module))
    assert_same_weights(*weights)


class Writing(Regression):
    """Module whose ranks write their own number to the data and check what the others' writes have changed."""

    def on_fit_start(self):
        data = self.trainer.train_dataloader.dataset
        self.is_shared = is_in_store([data.x, data.y])
        is_new = torch.equal(data.x[:2], self.given) and bool((data.y[0] == self.given_y).all())
        data.x[0] = self.global_rank + 1
        torch.from_numpy(data.y)[0] = self.global_rank + 1
        torch.distributed.barrier()
        is_own = bool((data.x[0] == self.global_rank + 1).all()) and bool((data.y[0] == self.global_rank + 1).all())
        self.was_right = bool(self.all_gather(torch.tensor(is_new and is_own)).all())


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_write_to_shared_data_stays_in_its_worker_and_run(quiet):
    data, module = Arrays(num_samples=4096), Writing()
    module.given, module.given_y = data.x[:2].clone(), data.y[0].copy()
    before = data.x.clone(), data.y.copy()
    for _ in range(2):
        fit(module, DataLoader(data, batch_size=512), quiet)
        assert module.was_right
        assert module.is_shared == [True, True]
    assert torch.equal(data.x, before[0])
    assert np.array_equal(data.y, before[1])


def scale_all(data):
    data.x *= 1.5


@pytest.mark.parametrize("num_loader_workers", [0, 1])
def test_a_data_set_that_writes_to_itself_gives_the_results_of_a_run_without_sharing(quiet, num_loader_workers):
    weights = []
    for num_workers in (0, 1):
        torch.manual_seed(0)
        module, data = Regression(), Arrays(4096, write=scale_all)
        loader = DataLoader(data, batch_size=512, num_workers=num_loader_workers)
        pl.fit(module, loader, num_workers=num_workers, max_epochs=2, accelerator="cpu", **quiet)
        weights.append(weights_of(module))
    assert_same_weights(*weights)


class Counting(Regression):
    """Module that counts in a plain tensor of its own, next to one that it does not change."""

    def __init__(self):
        super().__init__()
        self.counts = torch.zeros(50_000)
        self.others = {"left": torch.zeros(50_000), "written": [torch.zeros(50_000)]}
        self.left_alone = torch.zeros(50_000)

    def training_step(self, batch, batch_idx):
        self.counts[batch_idx] += 1
        self.others["written"][0][:3] = 5
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_writes_of_a_module_to_its_own_large_tensor_are_returned(quiet, num_workers):
    module = Counting()
    left_alone = module.left_alone
    fit(module, DataLoader(TensorDataset(torch.randn(64, 8), torch.randn(64, 3)), batch_size=8), quiet, num_workers)
    num_steps = 8 // max(1, num_workers)
    assert module.counts[:9].tolist() == [1] * num_steps + [0] * (9 - num_steps)
    assert module.others["written"][0][:4].tolist() == [5, 5, 5, 0]
    assert module.left_alone is left_alone


def test_a_write_to_a_shared_array_is_an_error(quiet):
    def write(data):
        data.y[0] = 1

    with pytest.raises(ValueError, match="read-only"):
        fit(Regression(), DataLoader(Arrays(num_samples=8192, write=write), batch_size=512), quiet)


def is_in_store(arrays):
    """Return for each array whether its memory maps a file of Ray's store."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        mappings = [(*(int(part, 16) for part in line.split()[0].split("-")), "plasma" in line) for line in maps]
    addresses = [array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data for array in arrays]
    return [any(low <= address < high and is_store for low, high, is_store in mappings) for address in addresses]


def make_kinds():
    x, y = torch.randn(20_000, 8), torch.randn(20_000, 3)
    pairs = TensorDataset(x, y)
    rows = [np.random.rand(100) for _ in range(200)]
    return {
        "subset": (Subset(pairs, range(10)), lambda it: it.dataset.tensors),
        "random_split": (random_split(pairs, [0.5, 0.5])[0], lambda it: it.dataset.tensors),
        "concatenation": (
            ConcatDataset([pairs, TensorDataset(x[:9_000], y[:9_000])]),
            lambda it: it.datasets[1].tensors,
        ),
        "list of arrays": (Listed(rows), lambda it: it.items),
        "list of pairs": (Listed([(row, 1) for row in rows]), lambda it: [row for row, _ in it.items]),
        "dict of arrays": (Listed(dict(enumerate(rows))), lambda it: list(it.items.values())),
        "list of tensors": (Listed([torch.randn(100) for _ in range(200)]), lambda it: it.items),
    }


class Listed(Dataset):
    def __init__(self, items):
        self.items = items


class ManyKinds(Arrays):
    """Data set of Arrays and all other kinds of data."""

    def __init__(self):
        super().__init__()
        self.kinds = {name: data for name, (data, _) in make_kinds().items()}


class Inspector(Regression):
    def on_fit_start(self):
        kinds = self.trainer.train_dataloader.dataset.kinds
        self.is_shared = {name: is_in_store(arrays_of(kinds[name])) for name, (_, arrays_of) in make_kinds().items()}
        rows = kinds["list of arrays"].items
        self.is_one = rows[0] is kinds["list of pairs"].items[0][0] is kinds["dict of arrays"].items[0]
        self.total = float(sum(row.sum() for row in rows))


def test_data_sets_of_all_kinds_are_shared(quiet):
    module, data = Inspector(), ManyKinds()
    fit(module, DataLoader(data, batch_size=8), quiet, num_workers=1)
    assert {name: all(shared) and len(shared) > 1 for name, shared in module.is_shared.items()} == dict.fromkeys(
        make_kinds(), True
    )
    assert module.is_one
    assert module.total == float(sum(row.sum() for row in data.kinds["list of arrays"].items))


class Tied(Regression):
    """Module that trains on a buffer to which it writes, and on an embedding whose weights its output layer shares."""

    def __init__(self):
        super().__init__()
        self.register_buffer("memory", torch.randn(10_000, 8))
        self.embedding = torch.nn.Embedding(5_000, 8)
        self.head = torch.nn.Linear(8, 5_000, bias=False)
        self.head.weight = self.embedding.weight

    def on_fit_start(self):
        x, tail = self.trainer.train_dataloader.dataset.tensors[:2]
        self.is_tied = self.head.weight is self.embedding.weight
        self.memory[5] = 7.0
        self.is_seen = bool((x[5] == 7.0).all()) and bool((tail[0] == 7.0).all())

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean() + self.head(batch[1]).square().mean()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_shared_with_the_module_stays_shared_with_it_and_writable(quiet, num_workers):
    module = Tied()
    data = TensorDataset(module.memory[:4_000], module.memory[5:4_005])
    fit(module, DataLoader(data, batch_size=2_000), quiet, num_workers=num_workers)
    assert module.is_tied
    assert module.is_seen
    assert module.head.weight is module.embedding.weight
    assert bool((data.tensors[0][5] == 7.0).all())


def stored_bytes():
    return ray.cluster_resources()["object_store_memory"] - ray.available_resources().get("object_store_memory", 0.0)


@pytest.fixture
def uncollected():
    """Disable garbage collection during the test, so that reference cycles stay."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_the_store_is_empty_after_the_run(quiet):
    data = Arrays(num_samples=64, width=100_000)  # 25 MB each
    module = Regression()
    module.register_buffer("memory", torch.zeros(1_000_000))
    fit(module, DataLoader(data, batch_size=8), quiet, num_workers=2)
    assert fit(module, DataLoader(data, batch_size=8), quiet, num_workers=2) is not None
    deadline = time.monotonic() + 10
    while stored_bytes() > 1_000_000 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert stored_bytes() < 1_000_000


SMALL_STORE = """
    import os
    import ray, torch
    import raylit as pl
    from models import Regression
    from torch.utils.data import DataLoader, TensorDataset

    def fit(num_samples):
        data = TensorDataset(torch.zeros(num_samples, 8), torch.zeros(num_samples, 3))
        pl.fit(Regression(), DataLoader(data, batch_size=8), num_workers=2, max_steps=2, logger=False,
               enable_checkpointing=False, enable_progress_bar=False)

    def start():
        ray.init(address="local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False,
                 logging_level="WARNING", log_to_driver=False)

    start()
    fit(4_000_000)  # 180 MB, which Ray keeps in files instead
    print("first")
    pl.shutdown()
    ray.shutdown()
    os.environ["RAY_local_fs_capacity_threshold"] = "0.0001"  # the disk counts as full
    start()
    try:
        fit(4_000_000)
    except pl.ResourcesError as error:
        print("refused:", error)
    fit(1_000)
    print("third")
    ray.shutdown()
"""


@pytest.mark.cluster
def test_data_larger_than_the_store_is_shared_from_disk_or_is_an_error(run_script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    shown = run_script(SMALL_STORE)
    assert "first" in shown
    assert "refused: no room for the module and its data of 0.2 GB: Ray's object store is full" in shown
    assert "third" in shown
    assert "the workers are replaced" not in shown

"""A run over two hosts: network namespaces of this machine, each with its own Ray node, joined by RAY_ADDRESS."""

import re

import pytest
from hosts import CHECKOUT, run_on_two_hosts

SCRIPT = """
import os, socket, sys
sys.path.insert(0, {tests!r})
import torch
from models import Regression, RegressionData
import raylit as pl

class Placed(Regression):
    def on_train_start(self):
        self.places = [None] * self.trainer.world_size
        place = (self.global_rank, self.local_rank, self.trainer.node_rank, socket.gethostname())
        torch.distributed.all_gather_object(self.places, place)

model = Placed()
trainer = pl.fit(model, RegressionData(4), num_processes=1, num_nodes=2, max_epochs=2, enable_progress_bar=False)
print("PLACES", model.places)
print("CHECKPOINT", os.path.exists(trainer.checkpoint_callback.best_model_path))
"""


SAVING = """
import os, resource, socket, sys
import torch
import raylit as pl

NUM_MB = 400

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

class Large(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.tables = torch.nn.ParameterList(torch.zeros(1000) for _ in range(20))

    def on_fit_start(self):
        self.host = socket.gethostname()

    def training_step(self, batch, batch_idx):
        return sum(table.sum() for table in self.tables)

    def on_save_checkpoint(self, checkpoint):
        generator = torch.Generator().manual_seed(self.global_step)
        numbers = torch.randint(255, (NUM_MB * 2**20,), dtype=torch.uint8, generator=generator)
        checkpoint["large"] = dict(enumerate(numbers.chunk(20)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Watching(pl.DriverCallback):
    def on_train_start(self, run):
        self.before = peak_mb()

    def on_end(self, run):
        self.more = peak_mb() - self.before

watching = Watching()
saving = pl.ModelCheckpoint("/tmp/only-here", "{step}", every_n_train_steps=2)
model = Large()
pl.fit(model, torch.utils.data.DataLoader(list(range(4))), num_workers=1, resources_per_worker={"CPU": 1, "h1": 1},
       max_epochs=1, callbacks=[saving, watching], logger=False, enable_progress_bar=False)
print("HOSTS", model.host, socket.gethostname())
print("MORE", watching.more)
checkpoint = torch.load(saving.best_model_path, weights_only=True)
expected = torch.randint(255, (NUM_MB * 2**20,), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
print("SAME", torch.equal(torch.cat(list(checkpoint["large"].values())), expected), os.listdir("/tmp/only-here"))
"""


@pytest.mark.cluster
def test_a_cluster_that_ray_address_names_is_used_and_the_driver_writes_the_checkpoint(tmp_path):
    output = run_on_two_hosts(SCRIPT.format(tests=str(CHECKOUT / "tests")), tmp_path)
    assert "PLACES [(0, 0, 0, 'h0'), (1, 0, 1, 'h1')]" in output
    assert "CHECKPOINT True" in output


@pytest.mark.cluster
def test_a_checkpoint_comes_in_pieces_from_a_host_that_does_not_see_the_drivers_disk(tmp_path):
    """400 MB of state; the driver holds a few pieces of it at a time."""
    output = run_on_two_hosts(SAVING, tmp_path)
    assert "HOSTS h1 h0" in output
    assert "SAME True ['" in output
    assert float(re.search(r"MORE (.*)", output)[1]) < 150

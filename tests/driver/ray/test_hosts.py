"""Runs over two hosts: network namespaces of this machine, each with its own Ray node, joined by RAY_ADDRESS."""

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


SHARDED = """
import os, resource, socket, warnings
import torch
import raylit as pl
from raylit.checkpoint import files

class Deep(pl.LightningModule):
    def configure_model(self):
        self.net = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(16)))

    def training_step(self, batch, batch_idx):
        return self.net(torch.ones(1, 1024) * (1 + batch.float().mean())).square().mean()

    def on_train_end(self):
        self.places = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(self.places, socket.gethostname())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

class SavingItself(Deep):
    def on_train_batch_end(self, *args):
        self.trainer.save_checkpoint("/tmp/only-here/mine.ckpt")

class Watching(pl.DriverCallback):
    def on_train_start(self, run):
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def on_train_end(self, run):
        run.finish_saves()
        self.more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before) / 1024

def fit(model, ckpt_path=None, gather_weights=True, **arguments):
    trainer = pl.Trainer(num_workers=2, strategy=pl.FSDPStrategy(gather_weights=gather_weights), max_epochs=1,
                         logger=False, enable_progress_bar=False, enable_model_summary=False, **arguments)
    torch.manual_seed(1)
    trainer.fit(model, torch.utils.data.DataLoader(list(range(8))), ckpt_path=ckpt_path)
    return model

watching = Watching()
saving = pl.ModelCheckpoint("/tmp/only-here", "{step}", every_n_train_steps=2, save_top_k=-1)
model = fit(Deep(), callbacks=[watching, saving])
print("HOSTS", sorted(model.places), "MORE", watching.more)
print("NAMES", sorted(os.listdir("/tmp/only-here/step=4.ckpt")))
read = files.read("/tmp/only-here/step=4.ckpt")["state_dict"]
print("SAME", all(torch.equal(read[name], value) for name, value in model.state_dict().items()))
again = fit(Deep(), ckpt_path="/tmp/only-here/step=2.ckpt", enable_checkpointing=False)
print("AGAIN", all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items()))
try:
    fit(SavingItself(), enable_checkpointing=False)
except pl.CheckpointError as error:
    print("TOLD", error)
"""


@pytest.mark.cluster
def test_a_cluster_that_ray_address_names_is_used_and_the_driver_writes_the_checkpoint(tmp_path):
    output = run_on_two_hosts(SCRIPT.format(tests=str(CHECKOUT / "tests")), tmp_path)
    assert "PLACES [(0, 0, 0, 'h0'), (1, 0, 1, 'h1')]" in output
    assert "CHECKPOINT True" in output


@pytest.mark.cluster
def test_a_checkpoint_is_sent_in_pieces_from_a_host_without_the_drivers_disk(tmp_path):
    """Send 400 MB of state, of which the driver holds a few pieces at a time."""
    output = run_on_two_hosts(SAVING, tmp_path)
    assert "HOSTS h1 h0" in output
    assert "SAME True ['" in output
    assert float(re.search(r"MORE (.*)", output)[1]) < 150


@pytest.mark.cluster
def test_parts_are_sent_in_pieces_from_hosts_without_the_drivers_disk_and_back(tmp_path):
    """Send 192 MB of state, half of it on each host."""
    output = run_on_two_hosts(SHARDED, tmp_path)
    assert "HOSTS ['h0', 'h1']" in output
    assert "NAMES ['.metadata', '__0_0.distcp', '__1_0.distcp', 'index.ckpt']" in output
    assert float(re.search(r"MORE (.*)", output)[1]) < 120
    assert "SAME True" in output
    assert "AGAIN True" in output
    assert re.search(r"TOLD worker 1 on h1 cannot see /tmp/only-here/.*all hosts share", output)

"""A run over two hosts: network namespaces of this machine, each with its own Ray node, joined by RAY_ADDRESS."""

import os
import shutil
import sys
import textwrap
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
NETCLUSTER = CHECKOUT.parent / "shared" / "netcluster"
DEADLINE_S = 100

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


@pytest.mark.cluster
def test_a_cluster_that_ray_address_names_is_used_and_the_driver_writes_the_checkpoint(tmp_path):
    if not NETCLUSTER.is_dir():
        pytest.skip(f"needs {NETCLUSTER}")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2, to make hosts out of network namespaces")
    sys.path.insert(0, str(NETCLUSTER))
    from netcluster import NetCluster

    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(CHECKOUT / "tests")))
    share = [path for path in (str(CHECKOUT), sys.prefix, str(tmp_path)) if path.startswith("/tmp/")]
    with NetCluster(hosts=2, cpus_per_host=1, share=share) as cluster:
        # The logs go to the driver's host alone: its /tmp is its own.
        job = cluster.popen(0, [sys.executable, str(script)], env={"RAY_ADDRESS": cluster.address}, cwd="/tmp")
        assert job.wait(DEADLINE_S) == 0, job.output
    assert "PLACES [(0, 0, 0, 'h0'), (1, 0, 1, 'h1')]" in job.output
    assert "CHECKPOINT True" in job.output

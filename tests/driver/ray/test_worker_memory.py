"""Memory of a worker process beyond that of a process with a hand-written training loop."""

import subprocess
import sys
from pathlib import Path

from models import Regression, RegressionData

import raylit as pl

MAX_EXTRA_MEGABYTES = 120
BY_HAND = """
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for x, y in DataLoader(TensorDataset(torch.randn(64, 8), torch.randn(64, 1)), batch_size=4, shuffle=True):
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
print(Path("/proc/self/smaps_rollup").read_text())
"""


class Measured(Regression):
    def on_train_end(self):
        self.report = Path("/proc/self/smaps_rollup").read_text()


def _megabytes(report):
    """Return the memory of this process alone, and with what it shares."""
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in report.splitlines()[1:] if line}
    return sizes["Private_Clean"] + sizes["Private_Dirty"], sizes["Rss"]


def test_a_worker_needs_little_more_memory_than_the_hand_written_loop(quiet):
    model = Measured()
    # A timeout that no other test uses, to get workers in which no other test has imported anything.
    pl.fit(model, RegressionData(), num_workers=1, max_epochs=1, start_timeout_s=601.0, keep_workers_s=0, **quiet)
    # Next to this process, as a worker is, since both share torch's libraries with it.
    done = subprocess.run([sys.executable, "-c", BY_HAND], capture_output=True, text=True, timeout=60, check=True)
    own, own_by_hand = _megabytes(model.report), _megabytes(done.stdout)
    assert 0 < own[1] - own_by_hand[1] <= MAX_EXTRA_MEGABYTES
    assert own[0] - own_by_hand[0] <= MAX_EXTRA_MEGABYTES

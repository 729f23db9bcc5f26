"""What raylit adds to a step of a hand-written loop, counted: exact numbers, whatever else the machine does."""

import gc
import os
import sys

import pytest
import torch
from models import Regression, make_data
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler

import raylit as pl

NUM_BATCHES = 400
MAX_EXTRA_CALLS = 0
MAX_FRAMES = 5


class Counter:
    """Counts the Python calls of this thread between `start` and `stop`."""

    def __init__(self):
        self.num_calls = 0

    def start(self):
        sys.setprofile(self._see)

    def stop(self):
        sys.setprofile(None)

    def _see(self, frame, event, argument):
        self.num_calls += event == "call"


class Logged(Regression):
    """Logs every step's loss; counts the calls between two of its steps."""

    first, last = 100, 300

    def __init__(self):
        super().__init__(optimizer="adam")
        self.counter = Counter()
        self.num_calls = 0
        self.frames = []

    def training_step(self, batch, batch_idx):
        if batch_idx == self.first:
            self.frames = _frames_above()
            self.counter.start()
        elif batch_idx == self.last:
            self.counter.stop()
            self.num_calls, self.counter = self.counter.num_calls, None
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        self.log("train_loss", loss, prog_bar=True)
        return loss


def _frames_above():
    """Return the files of the frames above the caller's, innermost first."""
    frame, files = sys._getframe(2), []
    while frame is not None:
        files.append(frame.f_code.co_filename)
        frame = frame.f_back
    return files


def calls_of_a_hand_written_loop():
    model = Logged()
    data = make_data(4 * NUM_BATCHES)
    loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    counter = Counter()
    for index, (x, y) in enumerate(loader):
        if index == Logged.first:
            counter.start()
        elif index == Logged.last:
            counter.stop()
            break
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return counter.num_calls / (Logged.last - Logged.first)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_step_adds_few_python_calls_to_a_hand_written_loop(num_workers, tmp_path):
    by_hand = calls_of_a_hand_written_loop()
    model = Logged()
    loader = DataLoader(make_data(4 * NUM_BATCHES), batch_size=4, shuffle=True)
    gc.collect()
    pl.fit(model, loader, num_workers=num_workers, max_epochs=1, limit_val_batches=0, default_root_dir=tmp_path)
    per_step = model.num_calls / (Logged.last - Logged.first)
    assert 0 < per_step <= by_hand + MAX_EXTRA_CALLS
    if num_workers:
        # By the package's own directory: the checkout, and what is installed inside it, may be called raylit as well.
        package = os.path.dirname(pl.__file__) + os.sep
        frames = [file for file in model.frames if file.startswith(package)]
        assert frames
        assert len(frames) <= MAX_FRAMES, frames

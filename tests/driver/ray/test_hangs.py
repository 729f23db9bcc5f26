"""Deaths of a worker for which others wait: the driver names the rank and the cause within seconds."""

import multiprocessing
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch
from models import Regression, RegressionData
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

LIMIT_S = 60
"""From a death to the error, on a busy machine; gloo alone would wait for 30 minutes."""


class Perishes(Regression):
    """Module in which one rank's process ends at a place after which the others wait for it in a collective."""

    def __init__(self, directory, *, place, rank):
        super().__init__()
        self.path, self.place, self.rank = os.path.join(directory, "ended"), place, rank

    def _pass(self, place):
        if place == self.place and self.global_rank == self.rank:
            Path(self.path).touch()
            os._exit(3)

    def prepare_data(self):
        self._pass("prepare_data")

    def on_save_checkpoint(self, checkpoint):
        self._pass("on_save_checkpoint")

    def on_train_batch_start(self, batch, batch_idx):
        if self.place == "all_reduce":
            if self.global_rank == self.rank:
                time.sleep(1.0)  # by now the other waits
                self._pass("all_reduce")
            torch.distributed.all_reduce(torch.ones(1))

    def teardown(self, stage):
        self._pass("teardown")


@pytest.mark.parametrize(
    ("place", "rank"),
    [
        ("prepare_data", 0),
        ("all_reduce", 0),
        ("on_save_checkpoint", 0),
        ("teardown", 1),
    ],
)
def test_the_rank_that_ends_is_named_within_seconds(place, rank, tmp_path):
    module = Perishes(str(tmp_path), place=place, rank=rank)
    with pytest.raises(pl.WorkerDied, match=r"exit code 3|without a word") as caught:
        pl.fit(module, RegressionData(), num_workers=2, max_epochs=1, logger=False, enable_progress_bar=False)
    assert time.time() - (tmp_path / "ended").stat().st_mtime < LIMIT_S
    assert caught.value.rank == rank


class Fragile(TensorDataset):
    def __getitem__(self, index):
        if index == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore:.*validation is skipped")
def test_the_death_of_a_loader_process_is_an_error_of_its_rank(quiet):
    loader = DataLoader(Fragile(torch.randn(48, 8), torch.randn(48, 3)), batch_size=4, num_workers=1)
    started = time.monotonic()
    # The batch before may still be on its way from the process: see the next test.
    told = r"DataLoader worker .* (killed by signal|exited unexpectedly)|Connection reset by peer"
    with pytest.raises((RuntimeError, ConnectionResetError), match=told) as caught:
        pl.fit(Regression(), loader, num_workers=2, max_epochs=1, **quiet)
    assert time.monotonic() - started < 60
    assert "was ended by SIGKILL" in str(caught.value)
    assert "In rank 0 of 2" in str(caught.value.__cause__)


class KillsItsLoader(Regression):
    """Create what a loader's process has in the temporary directory while it sends tensors."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory
        self.earlier = {process.pid for process in multiprocessing.active_children()}

    def training_step(self, batch, batch_idx):
        [process] = [process for process in multiprocessing.active_children() if process.pid not in self.earlier]
        for name, pid in (("pymp-own", process.pid), ("pymp-other", process.pid + 1)):
            (self.directory / name).mkdir(exist_ok=True)
            (self.directory / name / f"listener-{pid}-0-abc").touch()
        os.kill(process.pid, signal.SIGKILL)
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:.*validation is skipped")
def test_temporary_files_of_a_killed_loader_process_are_removed(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loader = DataLoader(TensorDataset(torch.randn(480, 8), torch.randn(480, 3)), batch_size=4, num_workers=1)
    # torch notices the death, or that the batch under way does not come.
    with pytest.raises(
        (RuntimeError, ConnectionError, EOFError),
        match=r"process \d+ was ended by SIGKILL\)\. The kernel kills by SIGKILL where",
    ):
        pl.fit(KillsItsLoader(tmp_path), loader, num_workers=0, max_epochs=1, **quiet)
    assert not (tmp_path / "pymp-own").exists()
    assert (tmp_path / "pymp-other").exists()

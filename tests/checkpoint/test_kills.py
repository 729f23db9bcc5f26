"""Whatever is killed while a checkpoint is on its way, the one before it can be used."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import raylit as pl
from raylit.checkpoint import files, index

_MODULE = """
import os, sys, time, torch
import raylit as pl

class Filled(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(4_000_000))

    def training_step(self, batch, batch_idx):
        return self.table.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

"""
_DRIVERS = (
    _MODULE
    + """
def train(directory):
    torch.set_num_threads(1)
    saving = pl.ModelCheckpoint(directory, "{step}", every_n_train_steps=2, save_last=sys.argv[1] == "1")
    data = torch.utils.data.DataLoader(list(range(100_000)))
    pl.fit(Filled(), data, num_workers=0, max_epochs=1, callbacks=saving, logger=False, enable_progress_bar=False,
           enable_model_summary=False)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        train(line.strip())
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""
)
"""For each line, a directory, a driver that trains, and saves 32 MB at every other step, until it is killed."""


def check(directory: pathlib.Path | str) -> int:
    """Return the step of the newest checkpoint, which is intact: a damaged one would be a warning, and so an error."""
    listed = index.read_index(directory).entries
    found = index.find_newest_usable(directory)
    assert found is not None
    path, checkpoint = found
    table: Tensor = checkpoint["state_dict"]["table"]
    assert torch.equal(table, table[:1].expand_as(table)), path
    step: int = checkpoint["global_step"]
    assert step >= max(entry.step for entry in listed)
    return step


def kill_drivers(directory: pathlib.Path, *, num_kills: int, seed: int, has_last: bool) -> int:
    """How many of the kills fell into a write."""
    delays, num_broken_off = random.Random(seed), 0
    command = [sys.executable, "-W", "ignore", "-c", _DRIVERS, str(int(has_last))]
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(pl.__file__).parents[1])}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as drivers:
        assert drivers.stdin is not None
        assert drivers.stdout is not None
        for number in range(num_kills):
            place = directory / str(number)
            drivers.stdin.write(f"{place}\n")
            drivers.stdin.flush()
            pid = int(drivers.stdout.readline())
            deadline = time.monotonic() + 60
            while not (place / index.FILE_NAME).exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(delays.uniform(0, 0.2))
            is_aimed = number % 2 == 0  # at a write; the others fall where they may
            while is_aimed and not any(index.FILE_NAME not in path.name for path in place.glob(".*.tmp")):
                assert time.monotonic() < deadline
            os.kill(pid, signal.SIGKILL)
            while drivers.stdout.readline().strip() != "dead":
                assert time.monotonic() < deadline
            assert check(place) >= 2
            num_broken_off += len(list(place.glob(".*.tmp")))
            shutil.rmtree(place)
        drivers.stdin.close()
    return num_broken_off


def test_a_killed_driver_leaves_a_usable_checkpoint(tmp_path: pathlib.Path) -> None:
    assert kill_drivers(tmp_path, num_kills=3, seed=0, has_last=True) > 0, "no kill fell into a write"


@pytest.mark.slow
@pytest.mark.parametrize("has_last", [True, False])
@pytest.mark.timeout(300)
def test_a_driver_may_be_killed_at_any_moment(has_last: bool, tmp_path: pathlib.Path) -> None:
    assert kill_drivers(tmp_path, num_kills=15, seed=1 + has_last, has_last=has_last) > 1


class KilledWhileSaving(pl.LightningModule):
    """Its first worker is killed in the step after the fifth save began."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(4_000_000))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.table.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def test_a_killed_worker_leaves_a_usable_checkpoint(tmp_path: pathlib.Path) -> None:
    saving = pl.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1)
    data = torch.utils.data.DataLoader(list(range(20)))
    with pytest.raises(pl.WorkerDied):
        pl.fit(
            KilledWhileSaving(),
            data,
            num_workers=1,
            max_epochs=1,
            callbacks=saving,
            logger=False,
            enable_progress_bar=False,
        )
    assert check(tmp_path) in (4, 5)
    assert list(tmp_path.glob(".*.tmp")) == []


class FailsWhileSaving(KilledWhileSaving):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 5:
            raise ValueError("in the middle of a save")
        return self.table.sum()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_save_is_finished_when_a_hook_fails(num_workers: int, tmp_path: pathlib.Path) -> None:
    saving = pl.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1)
    data = torch.utils.data.DataLoader(list(range(20)))
    with pytest.raises(ValueError, match="in the middle"):
        pl.fit(
            FailsWhileSaving(),
            data,
            num_workers=num_workers,
            max_epochs=1,
            callbacks=saving,
            logger=False,
            enable_progress_bar=False,
        )
    assert check(tmp_path) == 5


class InterruptedWhileSaving(KilledWhileSaving):
    """Sends Ctrl-C to the driver in a step beside which a file is being written."""

    def __init__(self, directory: pathlib.Path, driver: int) -> None:
        super().__init__()
        self.directory, self.driver, self.is_sent = directory, driver, False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        deadline = time.monotonic() + 1
        while self.global_step >= 3 and not self.is_sent and time.monotonic() < deadline:
            if any(self.directory.glob(".*.tmp")):
                self.is_sent = True
                os.kill(self.driver, signal.SIGINT)
            elif (self.directory / f"step={self.global_step}.ckpt").exists():
                break
        return self.table.sum()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_ctrl_c_during_a_save_leaves_two_complete_checkpoints(num_workers: int, tmp_path: pathlib.Path) -> None:
    saving = pl.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=1, callbacks=saving, **quiet)
    data = torch.utils.data.DataLoader(list(range(300)))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(InterruptedWhileSaving(tmp_path, os.getpid()), data)
    assert check(tmp_path) == trainer.global_step < 300
    paths = {f"step={step}.ckpt" for step in range(1, trainer.global_step + 1)}
    assert {path.name for path in tmp_path.iterdir()} == {*paths, index.FILE_NAME}
    assert all(files.read(tmp_path / path)["global_step"] for path in paths)


_SHARDED = (
    _MODULE
    + """
class OnSlowDisk(Filled):
    def on_fit_start(self):
        flush = os.fsync
        os.fsync = lambda file: (time.sleep(0.05), flush(file))

saving = pl.ModelCheckpoint(sys.argv[1], "{step}", every_n_train_steps=2, save_last=True)
pl.fit(OnSlowDisk(), torch.utils.data.DataLoader(list(range(100_000))), num_workers=2, strategy="fsdp", max_epochs=1,
       callbacks=saving, logger=False, enable_progress_bar=False, enable_model_summary=False)
"""
)
_MOMENTS = {
    "begun": ".*.tmp",
    "own part": ".*.tmp/__0_0.distcp",
    "another's part": ".*.tmp/__1_0.distcp",
    "all parts": ".*.tmp/.metadata",
    "index": ".*.tmp/.*.tmp",
    "all but its name": ".*.tmp/index.ckpt",
    "all parts at a URL": "step=[!2]*.ckpt/parts-*/.metadata",
}
"""Of the writing of a sharded checkpoint, by what is there then."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "scheme"),
    [
        *((moment, "") for moment in ("begun", "another's part", "index", "all but its name")),
        ("all parts at a URL", "file://"),
    ],
)
@pytest.mark.timeout(180)
def test_a_driver_killed_while_parts_are_written_leaves_the_previous_checkpoint(
    moment: str, scheme: str, tmp_path: pathlib.Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SHARDED)
    place, deadline = tmp_path / "checkpoints", time.monotonic() + 90
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(pl.__file__).parents[1])}
    with subprocess.Popen([sys.executable, str(script), f"{scheme}{place}"], env=environment) as driver:
        while not (place / index.FILE_NAME).exists() or not list(place.glob(_MOMENTS[moment])):
            assert time.monotonic() < deadline
            assert driver.poll() is None
        driver.kill()
    assert check(f"{scheme}{place}") >= 2
    while list(place.glob(".*.tmp")):  # its workers may go on for a moment
        assert time.monotonic() < deadline
        files.remove_abandoned(place)
        time.sleep(0.2)


class KilledAtMoment(KilledWhileSaving):
    """One of its workers is killed at a moment of a save after the third."""

    def __init__(self, place: pathlib.Path, *, rank: int, moment: str) -> None:
        super().__init__()
        self._place, self._rank, self._moment = place, rank, moment

    def on_train_start(self) -> None:
        if self.trainer.global_rank == self._rank:
            threading.Thread(target=self._kill, daemon=True).start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.table.sum()

    def _kill(self) -> None:
        for awaited in ("step=3.ckpt", _MOMENTS[self._moment]):
            while not list(self._place.glob(awaited)):
                time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("rank", "moment"),
    [
        (1, "another's part"),
        *(pytest.param(0, moment, marks=pytest.mark.slow) for moment in ("begun", "own part", "all parts", "index")),
        *(pytest.param(1, moment, marks=pytest.mark.slow) for moment in ("begun", "all parts", "index")),
    ],
)
def test_a_worker_killed_while_parts_are_written_leaves_the_previous_checkpoint(
    rank: int, moment: str, tmp_path: pathlib.Path
) -> None:
    saving = pl.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1)
    with pytest.raises(pl.WorkerDied):
        pl.fit(
            KilledAtMoment(tmp_path, rank=rank, moment=moment),
            torch.utils.data.DataLoader(list(range(4000))),
            num_workers=2,
            strategy="fsdp",
            max_epochs=1,
            callbacks=saving,
            logger=False,
            enable_progress_bar=False,
        )
    assert check(tmp_path) >= 3
    assert list(tmp_path.glob(".*.tmp")) == []

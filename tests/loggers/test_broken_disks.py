"""Loggers whose disk is full, or whose directory is gone: the training goes on to its end."""

import csv
import os
import shutil
import subprocess

import pytest
from models import Regression, RegressionData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import raylit as pl

# TensorBoard's own thread dies of what it meets, which Python reports.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

NUM_STEPS = 18


def tensorboard(directory, **arguments):
    return pl.TensorBoardLogger(directory, name="", version="log", max_queue=1, flush_secs=1, **arguments)


def table(directory):
    return pl.CSVLogger(directory, name="", version="log", flush_logs_every_n_steps=1)


class Breaking(Regression):
    """After some steps the logs can no longer be written; after more they can be again."""

    def __init__(self, breaks, mends=lambda: None):
        super().__init__()
        self.breaks, self.mends = breaks, mends

    def training_step(self, batch, batch_idx):
        # More than what is left of the last page of a file on a full disk.
        self.log_dict({f"metric_{number}": 1 / (number + 3) for number in range(100)})
        return super().training_step(batch, batch_idx)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 6:
            for logger in self.loggers:
                logger.save()
            self.breaks()
        if self.global_step == 12:
            self.mends()


def train(model, logger, quiet):
    trainer = pl.Trainer(max_epochs=3, log_every_n_steps=1, num_sanity_val_steps=0, **{**quiet, "logger": logger})
    with pytest.warns(UserWarning, match="has failed") as warned, pytest.raises(pl.LoggingError) as caught:
        trainer.fit(model, RegressionData())
    assert len([one for one in warned if "has failed" in str(one.message)]) == 1
    assert (trainer.global_step, len(model.losses)) == (NUM_STEPS, NUM_STEPS)
    assert trainer.state.finished or trainer.callback_metrics
    return str(caught.value)


def rows_of(logger):
    with open(logger.metrics_file, newline="", encoding="utf-8") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]


def test_a_removed_directory_is_created_again_for_later_rows(quiet, tmp_path):
    logger = table(tmp_path)
    text = train(Breaking(lambda: shutil.rmtree(tmp_path / "log")), logger, quiet)
    assert "metrics.csv has been removed, and with it" in text
    assert rows_of(logger) == list(range(6, NUM_STEPS))


def test_new_event_files_are_written_if_their_directory_is_removed(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr("raylit.loggers.tensorboard._RETRY_S", 0.0)
    logger = tensorboard(tmp_path)
    text = train(Breaking(lambda: shutil.rmtree(tmp_path / "log")), logger, quiet)
    assert "TensorBoardLogger has failed" in text
    assert "No such file or directory" in text
    steps = [event.step for event in EventAccumulator(str(tmp_path / "log")).Reload().Scalars("train_loss")]
    assert steps == sorted(set(steps))
    assert steps[-1] == NUM_STEPS - 1


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a file system takes root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def fill(place):
    with open(place / "filling", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            pass


@pytest.mark.parametrize("kind", [tensorboard, table])
def test_a_full_disk_does_not_end_the_training(kind, quiet, small_disk):
    """Beside the logger that fails another one goes on."""
    logger, other = kind(small_disk), pl.CSVLogger(small_disk.parent / "elsewhere", version=0)
    text = train(Breaking(lambda: fill(small_disk)), [logger, other], quiet)
    assert f"{type(logger).__name__} has failed" in text
    assert "No space left on device" in text
    assert rows_of(other) == list(range(NUM_STEPS))


def test_no_row_is_lost_or_written_twice_when_a_full_disk_has_space_again(quiet, small_disk):
    logger = table(small_disk)
    train(Breaking(lambda: fill(small_disk), lambda: os.unlink(small_disk / "filling")), logger, quiet)
    assert rows_of(logger) == list(range(NUM_STEPS))

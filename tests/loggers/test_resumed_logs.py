"""Logs of a run that breaks off and is continued from a checkpoint: no row is lost or written twice."""

import csv
import os
import signal
import subprocess
import sys
import textwrap
import uuid

import pytest
import torch
from models import Regression, RegressionData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import raylit as pl
from raylit.storage import read_text


class Logged(Regression):
    """Logs on several axes: steps, epochs far beyond them, batches of the validation."""

    breaks_at = -1

    def training_step(self, batch, batch_idx):
        if self.global_step == self.breaks_at:
            raise RuntimeError("as asked")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("each", float(batch[1].mean()), on_step=True, on_epoch=True)

    def on_train_epoch_end(self):
        self.log("num", float(self.global_step))
        for logger in self.loggers:
            logger.log_metrics({"own": float(self.current_epoch)}, step=1000 + self.current_epoch)


def fit(directory, *, breaks_at=-1, save_dir=None, ckpt_path=None, num_workers=0, version=0, saves="every"):
    loggers = [cls(save_dir or directory, name=cls.__name__, version=version) for cls in LOGGERS]
    every = {"every": {"every_n_train_steps": 4}, "validation": {"every_n_epochs": 1, "save_on_train_epoch_end": False}}
    save = pl.ModelCheckpoint(directory / "ck", filename="{step}", save_top_k=-1, **every[saves])
    model = Logged()
    model.breaks_at = breaks_at
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=3,
        log_every_n_steps=1,
        logger=loggers,
        callbacks=[save],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = RegressionData(batch_size=8 // max(1, num_workers))
    if breaks_at < 0:
        trainer.fit(model, data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="as asked"):
            trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer, model, loggers


LOGGERS = (pl.CSVLogger, pl.TensorBoardLogger)


def contents(loggers):
    """Of the table and of the event files: by name the values with their steps, in the order of writing.

    The goodput is left out, which is of one run and not of the runs that it continues.
    """
    of_table, of_events = {}, {}
    for row in csv.DictReader(read_text(loggers[0].metrics_file).splitlines()):
        for name, value in row.items():
            if value and name != "step" and not name.startswith("goodput/"):
                of_table.setdefault(name, []).append((int(row["step"]), pytest.approx(float(value))))
    events = EventAccumulator(loggers[1].log_dir).Reload()
    for tag in [tag for tag in events.Tags()["scalars"] if not tag.startswith("goodput/")]:
        of_events[tag] = [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
    return of_table, of_events


@pytest.mark.parametrize("saves", ["every", "validation"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_that_is_resumed_twice_has_the_log_of_an_uninterrupted_one(num_workers, saves, tmp_path):
    """Save at steps 4, 8, ... or before an epoch's end; each run breaks between two checkpoints.

    The last run begins at the same checkpoint as the one before it.
    """
    torch.manual_seed(3)
    _, _, whole = fit(tmp_path / "whole", num_workers=num_workers, saves=saves)
    directory = tmp_path / "broken"
    first, last = ("step=4", "step=8") if saves == "every" else ("step=6", "step=6")
    torch.manual_seed(3)
    fit(directory, breaks_at=7, num_workers=num_workers, saves=saves)
    for breaks_at, start in ((11, first), (10, last), (-1, last)):
        path = directory / "ck" / f"{start}.ckpt"
        _, _, loggers = fit(directory, breaks_at=breaks_at, ckpt_path=path, num_workers=num_workers, saves=saves)
    for own, expected in zip(contents(loggers), contents(whole), strict=True):
        assert own == expected
        assert {"train_loss", "val_loss", "each_step", "num", "own"} <= own.keys()


def test_logs_at_a_url_drop_entries_after_the_checkpoint_too(tmp_path):
    url = f"memory://{uuid.uuid4().hex}"
    torch.manual_seed(3)
    fit(tmp_path, breaks_at=7, save_dir=url)
    _, _, loggers = fit(tmp_path, save_dir=url, ckpt_path=tmp_path / "ck" / "step=4.ckpt")
    steps = [
        int(row["step"]) for row in csv.DictReader(read_text(loggers[0].metrics_file).splitlines()) if row["train_loss"]
    ]
    assert steps == list(range(18))


def test_test_results_are_kept_when_the_run_is_continued(tmp_path):
    trainer, model, loggers = fit(tmp_path, saves="validation")
    trainer.test(model, RegressionData().loader_for_test(), verbose=False)
    before = contents(loggers)
    switches = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(max_epochs=4, log_every_n_steps=1, logger=loggers, num_sanity_val_steps=0, **switches)
    trainer.fit(model, RegressionData(), ckpt_path=tmp_path / "ck" / "step=18.ckpt")
    for old, new in zip(before, contents(loggers), strict=True):
        assert new["test_loss"] == old["test_loss"]
        assert [step for step, _ in new["train_loss"]] == list(range(24))
        assert [step for step, _ in new["num"]] == [5, 11, 17, 23]


@pytest.mark.cluster
def test_a_driver_that_is_killed_loses_no_row_before_its_checkpoint(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, signal, sys, time
            sys.path[:0] = [TESTS, TESTS + "/loggers"]
            from test_resumed_logs import Logged, fit

            class Killed(Logged):
                def on_train_batch_start(self, batch, batch_idx):
                    if self.global_step == 11:
                        deadline = time.monotonic() + 30
                        while not os.path.exists("ck/step=8.ckpt") and time.monotonic() < deadline:
                            time.sleep(0.01)
                        os.kill(os.getpid(), signal.SIGKILL)

            import test_resumed_logs
            test_resumed_logs.Logged = Killed
            fit(pathlib.Path.cwd())
            """
        ).replace("TESTS", repr(os.path.dirname(os.path.dirname(__file__))))
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    with open(tmp_path / "CSVLogger" / "version_0" / "metrics.csv", newline="", encoding="utf-8") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert steps == list(range(8))
    _, _, loggers = fit(tmp_path, ckpt_path=tmp_path / "ck" / "step=8.ckpt")
    for own in contents(loggers):
        assert [step for step, _ in own["train_loss"]] == list(range(18))

"""A bucket whose server goes away in the middle of a run, and comes back."""

import threading
from typing import Any

import pytest
from buckets import Server
from models import Regression, RegressionData

import raylit as pl
from raylit.checkpoint import files, index
from raylit.driver.loop import checkpoint_queue


class Outage(pl.Callback):
    """The server is away from one step to another, or for a time; not while the save before that is on its way."""

    def __init__(self, server: Server, first: int, *, last: int = 0, duration_s: float = 0.0) -> None:
        self.server, self.first, self.last, self.duration_s = server, first, last, duration_s

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.first:
            for thread in threading.enumerate():
                if thread.name == "raylit-save":
                    thread.join(30)
            self.server.stop()
            if self.duration_s:
                threading.Timer(self.duration_s, self.server.start).start()
        if trainer.global_step == self.last:
            self.server.start()


def trained(saving: pl.ModelCheckpoint, outage: Outage) -> pl.Trainer:
    trainer = pl.Trainer(
        num_workers=0,
        max_epochs=2,
        callbacks=[saving, outage],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Regression(), RegressionData())
    return trainer


def test_a_bucket_that_goes_away_is_told_once_and_written_to_when_it_is_back(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_queue, "_RETRY_AFTER_S", (0.01, 0.01))
    saving = pl.ModelCheckpoint(server.url, "{step}", every_n_train_steps=2)
    told = r"cannot .* the checkpoint s3://.*/step=6\.ckpt: .*next save is tried again.*/step=4\.ckpt"
    with pytest.warns(UserWarning, match=told) as caught:
        trainer = trained(saving, Outage(server, 5, last=9))
    assert len([one for one in caught if "next save" in str(one.message)]) == 1
    assert trainer.global_step == 12
    found = index.find_newest_usable(server.url)
    assert found is not None
    assert found[0] == saving.newest_model_path == f"{server.url}/step=12.ckpt"
    assert found[1]["global_step"] == 12


def test_a_bucket_that_is_soon_back_is_no_news(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_queue, "_RETRY_AFTER_S", (0.1,) * 100)
    saving = pl.ModelCheckpoint(
        server.url, "{step}", every_n_train_steps=4, save_top_k=-1, enable_version_counter=False
    )
    trained(saving, Outage(server, 4, duration_s=0.7))
    assert [entry.step for entry in index.read_index(server.url).entries] == [4, 8, 12]
    assert files.read(f"{server.url}/step=4.ckpt")["global_step"] == 4

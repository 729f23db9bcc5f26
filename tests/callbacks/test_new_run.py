"""One Trainer, several fits: each begins with callbacks that know nothing of the one before."""

import os

import pytest
import torch
from models import Regression, RegressionData, weights_of

import raylit as pl


class Score(Regression):
    """Its validations are worth these, epoch by epoch."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def validation_step(self, batch, batch_idx):
        self.log("score", self.scores[self.current_epoch])

    def test_step(self, batch, batch_idx):
        self.log("weight", self.net[0].weight.sum())


class Mine(pl.Callback):
    def __init__(self):
        self.num_epochs = 0

    def on_train_epoch_end(self, trainer, pl_module):
        self.num_epochs += 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_second_fit_is_stopped_saved_and_tested_by_its_own_scores(num_workers, tmp_path):
    stopping = pl.EarlyStopping("score", patience=2)
    saving = pl.ModelCheckpoint(monitor="score", save_last=True, filename="{epoch}")
    mine, timer = Mine(), pl.Timer("00:01:00:00")
    trainer = pl.Trainer(
        num_workers=num_workers,
        max_epochs=5,
        callbacks=[stopping, saving, mine, timer],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
    )
    data = RegressionData()
    trainer.fit(Score([1.0, 2.0, 3.0]), data)
    assert (trainer.current_epoch, stopping.wait_count, stopping.stopped_epoch) == (3, 2, 2)
    first_files = saving.best_model_path, saving.last_model_path
    timer.load_state_dict({"time_elapsed": {"train": 3600.0}})  # as a continued run would have left it

    second = Score([9.0, 8.0, 7.0, 6.0, 7.0])
    trainer.fit(second, data)
    assert trainer.current_epoch == 5
    assert (stopping.wait_count, stopping.stopped_epoch) == (1, 0)
    assert timer.time_elapsed() < 3600
    assert stopping.stopping_reason is pl.callbacks.EarlyStopping("x").stopping_reason
    assert float(stopping.best_score) == float(saving.best_model_score) == 6.0
    best = torch.load(saving.best_model_path, weights_only=True)
    assert (best["epoch"], best["global_step"]) == (3, 12 if num_workers else 24)
    assert list(saving.best_k_models) == [saving.best_model_path]
    assert not {saving.best_model_path, saving.last_model_path} & set(first_files)
    assert all(os.path.exists(path) for path in (*first_files, saving.best_model_path, saving.last_model_path))
    [tested] = trainer.test(second, RegressionData().loader_for_test(), ckpt_path="best", verbose=False)
    assert tested["weight"] == pytest.approx(best["state_dict"]["net.0.weight"].sum().item())
    assert mine.num_epochs == 8  # a callback of the user's is the user's


def test_a_second_fit_that_continues_the_first_has_its_callbacks_states(tmp_path):
    stopping, saving = pl.EarlyStopping("score", patience=3), pl.ModelCheckpoint(monitor="score", save_last=True)
    trainer = pl.Trainer(
        num_workers=0,
        max_steps=12,
        callbacks=[stopping, saving],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Score([1.0, 2.0]), RegressionData())
    best, last = saving.best_model_path, saving.last_model_path
    more = pl.Trainer(num_workers=0, max_epochs=9, callbacks=[stopping, saving], logger=False)
    more.fit(Score([0.0] * 2 + [3.0] * 7), RegressionData(), ckpt_path=last)
    assert more.current_epoch == 4  # two more checks without a gain
    assert (stopping.wait_count, saving.best_model_path) == (3, best)


class Fails(Regression):
    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            raise ValueError("no more")
        return super().training_step(batch, batch_idx)


def test_an_average_left_by_an_error_is_not_used_by_the_next_fit(quiet):
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    trainer = pl.Trainer(num_workers=0, max_epochs=1, callbacks=averaging, **quiet)
    with pytest.raises(ValueError, match="no more"):
        trainer.fit(Fails(), RegressionData())
    torch.manual_seed(1)
    again = Regression()
    torch.manual_seed(2)
    trainer.fit(again, RegressionData())
    torch.manual_seed(1)
    alone = Regression()
    torch.manual_seed(2)
    averaging = pl.callbacks.EMAWeightAveraging(decay=0.5)
    pl.Trainer(num_workers=0, max_epochs=1, callbacks=averaging, **quiet).fit(alone, RegressionData())
    for name, value in weights_of(alone).items():
        assert torch.equal(value, weights_of(again)[name])

"""Wrong input: a clear error before anything starts; a hook's exception: the user's own."""

import threading
import time

import pytest
import torch
from models import Regression, RegressionData, make_data
from torch.utils.data import DataLoader

import raylit as pl


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_epoch": 3}, "did you mean 'max_epochs'"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_workers": 2, "devices": 3, "accelerator": "cpu"}, "num_workers=2 and 3 devices"),
        ({"accelerator": "npu"}, "accelerator='npu'"),
        ({"accelerator": "cpu", "gpus": 2}, "contradict"),
        ({"strategy": "single", "num_workers": 2}, "strategy='single' with 2 workers"),
        ({"strategy": "zero"}, "strategy='zero'"),
        ({"accumulate_grad_batches": 0}, "accumulate_grad_batches=0"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val"),
        ({"precision": "8"}, "precision='8'"),
        ({"limit_train_batches": 1.5}, "limit_train_batches=1.5"),
        ({"val_check_interval": 0.0}, "val_check_interval"),
        ({"callbacks": [object()]}, "must be a Callback or a DriverCallback"),
        ({"num_workers": 3, "num_nodes": 2}, "cannot be spread evenly"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("arguments", [{"gpus": 1}, {"accelerator": "gpu", "devices": 2}])
def test_gpus_on_a_machine_without_any_are_refused(arguments, monkeypatch):
    monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: False)
    with pytest.raises(pl.ConfigError, match="torch sees none on this machine"):
        pl.Trainer(**arguments)


class Bare(pl.LightningModule):
    pass


class NoOptimizer(pl.LightningModule):
    def training_step(self, batch, batch_idx):
        return batch


@pytest.mark.parametrize(
    ("model", "loader", "message"),
    [
        (Bare(), [1], "Bare has no training_step"),
        (NoOptimizer(), [1], "NoOptimizer has no configure_optimizers"),
        (Regression(), None, "fit has no data"),
        (torch.nn.Linear(1, 1), [1], "model is a Linear"),
        (Regression, [1], "the class Regression was passed"),
    ],
)
def test_a_module_that_cannot_be_trained_is_refused(model, loader, message, quiet):
    with pytest.raises(pl.ModuleError, match=message):
        pl.Trainer(num_workers=2, **quiet).fit(model, loader)


def test_a_module_that_cannot_travel_is_refused(quiet):
    model = Regression()
    model.lock = threading.Lock()
    with pytest.raises(pl.ModuleError, match=r"cannot travel to the workers.*lock"):
        pl.fit(model, RegressionData(), num_workers=1, **quiet)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_without_a_model_says_what_to_do(stage):
    with pytest.raises(pl.ConfigError, match="needs a model"):
        getattr(pl.Trainer(), stage)()


def test_a_missing_checkpoint_is_named(quiet):
    with pytest.raises(pl.CheckpointError, match=r"nothing-here\.ckpt"):
        pl.fit(Regression(), RegressionData(), ckpt_path="nothing-here.ckpt", **quiet)
    with pytest.raises(pl.ConfigError, match="has saved no checkpoint"):
        pl.fit(Regression(), RegressionData(), ckpt_path="best", **quiet)


class Unlucky(Exception):
    def __init__(self, number):
        super().__init__(f"number {number} came up")
        self.number = number


class Fails(Regression):
    def __init__(self, on_rank):
        super().__init__()
        self.on_rank = on_rank

    def training_step(self, batch, batch_idx):
        if batch_idx == 2 and self.global_rank in self.on_rank:
            raise Unlucky(13)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_a_hook_is_raised_as_itself_and_the_trainer_stays_usable(num_workers, quiet):
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=1, **quiet)
    started = time.monotonic()
    with pytest.raises(Unlucky, match="number 13 came up") as caught:
        trainer.fit(Fails([num_workers // 2]), RegressionData(batch_size=4))
    assert caught.value.number == 13
    assert time.monotonic() - started < 60
    if num_workers:
        remote = str(caught.value.__cause__)
        assert "rank 1 of 2 on host" in remote
        assert "raise Unlucky(13)" in remote
    model = Regression()
    trainer.fit(model, RegressionData(batch_size=4))
    assert trainer.global_step > 0


def test_ranks_that_fail_together_are_one_error(quiet):
    with pytest.raises(Unlucky) as caught:
        pl.fit(Fails([0, 1]), RegressionData(batch_size=4), num_workers=2, **quiet)
    assert "ranks 0, 1 of 2" in str(caught.value.__cause__)


class Dies(Regression):
    def training_step(self, batch, batch_idx):
        import os

        if batch_idx == 2 and self.global_rank == 1:
            os._exit(3)
        return super().training_step(batch, batch_idx)


def test_a_worker_that_dies_in_mid_collective_is_reported_within_seconds(quiet):
    trainer = pl.Trainer(num_workers=2, max_epochs=1, **quiet)
    with pytest.raises(pl.WorkerDied, match="rank 1") as caught:
        trainer.fit(Dies(), RegressionData(batch_size=4))
    assert caught.value.rank == 1


def test_more_workers_than_the_cluster_has_resources_for_is_an_error(quiet):
    with pytest.raises(pl.ResourcesError, match=r"2 workers of 2000 CPU each .* this cluster of 1 host"):
        pl.fit(Regression(), RegressionData(), num_workers=2, resources_per_worker={"CPU": 2000}, **quiet)


def test_a_training_step_without_a_loss_says_what_to_return(quiet):
    class NoLoss(Regression):
        def training_step(self, batch, batch_idx):
            return {"los": 1}

    with pytest.raises(pl.ModuleError, match="without a tensor under 'loss'"):
        pl.fit(NoLoss(), DataLoader(make_data()), limit_val_batches=0, **quiet)


class Complains(pl.DriverCallback):
    def on_train_epoch_end(self, run):
        raise Unlucky(7)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_in_the_driver_leaves_an_ordinary_module_behind(num_workers, quiet):
    model = Regression()
    with pytest.raises(Unlucky, match="number 7"):
        pl.fit(model, RegressionData(), num_workers=num_workers, max_epochs=1, callbacks=[Complains()], **quiet)
    with pytest.raises(RuntimeError, match="not inside a run"):
        _ = model.trainer

"""Weights, metrics and predictions are right: compared with a hand-written loop and with a single process."""

import copy

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, make_data, train_by_hand, weights_of
from torch.utils.data import DataLoader

import raylit as pl

ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def trained(model, dm, **arguments):
    pl.fit(model, dm, logger=False, enable_checkpointing=False, enable_progress_bar=False, **arguments)
    return weights_of(model)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_worker_equals_a_hand_written_loop_bit_for_bit(num_workers, optimizer):
    pl.seed_everything(7, verbose=False)
    by_hand = Regression(dropout=0.3, optimizer=optimizer)
    model = copy.deepcopy(by_hand)
    before = torch.get_rng_state()
    losses = train_by_hand(by_hand, make_data(), batch_size=8, num_epochs=3, seed=7)
    torch.set_rng_state(before)
    trained(model, RegressionData(num_val=0), num_workers=num_workers, max_epochs=3, limit_val_batches=0)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert model.losses == losses


@pytest.mark.parametrize("num_workers", [0, 2])
def test_clipping_and_accumulation_equal_a_hand_written_loop(num_workers):
    by_hand = Regression()
    model = copy.deepcopy(by_hand)
    per_worker = 8 // max(1, num_workers)
    train_by_hand(by_hand, make_data(44), batch_size=8, num_epochs=2, seed=0, clip=0.1, accumulate=2)
    trained(
        model,
        RegressionData(batch_size=per_worker, num_train=44),
        num_workers=num_workers,
        max_epochs=2,
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
    )
    assert_same_weights(weights_of(model), weights_of(by_hand), **ROUNDING)


@pytest.mark.parametrize(("num_workers", "batch_size", "num_samples"), [(2, 6, 48), (3, 4, 48), (2, 6, 53), (3, 4, 25)])
def test_several_workers_equal_one_process_with_their_batches_together(num_workers, batch_size, num_samples):
    """53 and 25 leave an incomplete last batch, the latter with workers that have no sample of it."""
    model = Regression(optimizer="adam", lr=0.01)
    together = copy.deepcopy(model)
    trained(model, RegressionData(batch_size, num_samples), num_workers=num_workers, max_epochs=2)
    trained(together, RegressionData(batch_size * num_workers, num_samples), num_workers=0, max_epochs=2)
    assert_same_weights(weights_of(model), weights_of(together), **ROUNDING)


class RankSums(pl.Callback):
    """Collects every rank's weights at the end of training on each rank."""

    def __init__(self):
        self.sums = []

    def on_train_end(self, trainer, pl_module):
        flat = torch.cat([p.detach().reshape(-1) for p in pl_module.parameters()])
        others = [torch.empty_like(flat) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(others, flat)
        self.sums = others


def test_all_ranks_hold_identical_weights_at_the_end():
    collected = RankSums()
    trained(Regression(dropout=0.5), RegressionData(4, 30), num_workers=3, max_epochs=1, callbacks=[collected])
    first, *others = collected.sums
    assert len(others) == 2
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("num_val", [1, 20, 21])
def test_evaluation_counts_every_sample_exactly_once(num_workers, num_val, quiet):
    model = Regression()
    data = make_data(num_val, seed=2)
    x, y = data.tensors
    with torch.no_grad():
        expected = torch.nn.functional.mse_loss(model(x), y)
    trainer = pl.Trainer(num_workers=num_workers, **quiet)
    [result] = trainer.validate(model, DataLoader(data, batch_size=4), verbose=False)
    assert result["val_loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_predictions_come_in_data_set_order(num_workers, quiet):
    model = Regression()
    data = make_data(22)
    batches = pl.Trainer(num_workers=num_workers, **quiet).predict(model, DataLoader(data, batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 4, 4, 4, 2]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(batches), model(data.tensors[0]))


class Samples(pl.LightningModule):
    """Records which samples a rank was given, batch by batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        (x,) = batch
        gathered = [None] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(gathered, x.flatten().tolist())
        else:
            gathered = [x.flatten().tolist()]
        self.seen.append(sorted(value for part in gathered for value in part))
        return self.layer(x).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_the_order_of_samples_does_not_depend_on_the_number_of_workers(quiet):
    data = torch.utils.data.TensorDataset(torch.arange(24.0)[:, None])
    seen = {}
    for num_workers in (0, 2, 3):
        pl.seed_everything(5, verbose=False)
        model = Samples()
        loader = DataLoader(data, batch_size=12 // max(1, num_workers), shuffle=True)
        pl.fit(model, loader, num_workers=num_workers, max_epochs=2, **quiet)
        seen[num_workers] = model.seen
    assert seen[0] == seen[2] == seen[3]
    assert len(seen[0]) == 4
    assert seen[0][0] != seen[0][2]
    assert sorted(seen[0][0] + seen[0][1]) == list(range(24))


class Noisy(Regression):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("noise", torch.rand(()), on_step=False, on_epoch=True)
        return loss


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_in_mid_epoch_is_bit_identical_to_one_that_was_not_interrupted(num_workers, tmp_path):
    arguments = {"num_workers": num_workers, "logger": False, "enable_progress_bar": False, "max_epochs": 3}

    def checkpoints(directory):
        return pl.ModelCheckpoint(
            tmp_path / directory, filename="{step}", every_n_train_steps=4, save_top_k=-1, auto_insert_metric_name=True
        )

    pl.seed_everything(3, verbose=False)
    model = Noisy(dropout=0.4, optimizer="adam")
    fresh = copy.deepcopy(model)
    dm = RegressionData(batch_size=4 if num_workers else 8, num_train=52)
    uninterrupted = pl.fit(model, dm, callbacks=[checkpoints("a")], **arguments)
    # 52 samples in 7 steps an epoch: step 12 is in the middle of the second epoch
    pl.seed_everything(99, verbose=False)
    resumed_from = tmp_path / "a" / "step=12.ckpt"
    with pytest.warns(UserWarning, match="checkpoints go to"):
        resumed = pl.fit(fresh, dm, callbacks=[checkpoints("b")], ckpt_path=resumed_from, **arguments)
    assert_same_weights(weights_of(fresh), weights_of(model))
    assert resumed.global_step == uninterrupted.global_step == 21
    assert resumed.callback_metrics == uninterrupted.callback_metrics
    left, right = (torch.load(tmp_path / d / "step=20.ckpt", weights_only=True) for d in "ab")
    assert_same_weights(left["state_dict"], right["state_dict"])
    for index, state in left["optimizer_states"][0]["state"].items():
        assert_same_weights(state, right["optimizer_states"][0]["state"][index])


def test_resume_with_another_world_size_from_the_end_of_an_epoch(quiet, tmp_path):
    model = Regression(optimizer="adam")
    fresh = copy.deepcopy(model)
    saving = pl.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    arguments = {**quiet, "enable_checkpointing": True, "max_epochs": 2}
    pl.fit(model, RegressionData(8), num_workers=0, callbacks=[saving], **arguments)
    resumed_from = tmp_path / "epoch=0.ckpt"
    pl.fit(fresh, RegressionData(4), num_workers=2, ckpt_path=resumed_from, **{**quiet, "max_epochs": 2})
    assert_same_weights(weights_of(fresh), weights_of(model), **ROUNDING)


def test_fit_rejects_a_checkpoint_with_weights_only(quiet, tmp_path):
    weights = pl.ModelCheckpoint(tmp_path, save_weights_only=True)
    arguments = {**quiet, "enable_checkpointing": True, "max_epochs": 1}
    pl.fit(Regression(), RegressionData(), callbacks=[weights], **arguments)
    with pytest.raises(pl.CheckpointError, match="weights only"):
        pl.fit(Regression(), RegressionData(), ckpt_path=weights.newest_model_path, **quiet)

"""Step 2 of the page, fit with a Trainer, and how it tests: defaults, loaders by both names, best and given weights."""

import pytest
import torch
from models import Regression, RegressionData, assert_same_weights, make_data, weights_of
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tpu_hosts import pretend_slices

import raylit as pl
from raylit import LightningModule, Trainer


def digits(num_samples=256):
    x, y = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(x[:num_samples] / 16, dtype=torch.float32), torch.tensor(y[:num_samples]))


class LitModel(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.l1 = torch.nn.Linear(8 * 8, 10)

    def forward(self, x):
        return torch.relu(self.l1(x.view(x.size(0), -1)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        y_hat = self(x)
        loss = F.cross_entropy(y_hat, y)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.0005)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_most_basic_trainer_uses_good_defaults(num_workers, tmp_path):
    # dataloader
    train_loader = DataLoader(digits(), batch_size=32)

    # init model
    model = LitModel()
    before = weights_of(model)

    # most basic trainer, uses good defaults
    trainer = pl.Trainer(max_epochs=2, num_workers=num_workers)
    trainer.fit(model, train_loader)

    assert not torch.equal(before["l1.weight"], model.l1.weight)
    steps = 16 // max(1, num_workers)
    assert trainer.global_step == steps
    # Automatic checkpoints, automatic TensorBoard.
    directory = tmp_path / "lightning_logs" / "version_0"
    assert [path.name for path in directory.glob("checkpoints/*.ckpt")] == [f"epoch=1-step={steps}.ckpt"]
    assert isinstance(trainer.logger, pl.TensorBoardLogger)
    assert trainer.logger.log_dir == str(directory)
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, steps)


class Validated(LitModel):
    """The page's model with its validation and test loop."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y))


def test_fit_takes_the_validation_loader_as_well(quiet):
    train_dataloader, val_dataloader = DataLoader(digits(), batch_size=32), DataLoader(digits(64), batch_size=32)
    model = Validated()
    trainer = Trainer(max_epochs=1, **quiet)
    trainer.fit(
        model,
        train_dataloader,
        val_dataloader
    )  # fmt: skip
    expected = F.cross_entropy(model(digits(64).tensors[0]), digits(64).tensors[1])
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], expected, check_dtype=False)


def test_loaders_go_by_the_names_of_0_9(quiet):
    train, val = DataLoader(digits(), batch_size=64), DataLoader(digits(64), batch_size=64)
    trainer = Trainer(max_epochs=1, **quiet)
    model = Validated()
    trainer.fit(model, train_dataloader=train, val_dataloaders=val)
    assert trainer.global_step == 4
    [validated] = trainer.validate(model, val_dataloaders=val, verbose=False)
    [tested] = trainer.test(model, test_dataloaders=val, verbose=False)
    assert validated["val_loss"] == tested["test_loss"]


class Worsens(Regression):
    """Its validation loss is best after the first epoch."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_test_after_fit_tests_the_best_weights_and_leaves_them_on_the_model(num_workers):
    model = Worsens()
    trainer = Trainer(max_epochs=3, num_workers=num_workers, enable_progress_bar=False, logger=False)
    trainer.fit(model, RegressionData())
    best, last = (
        Worsens.load_from_checkpoint(path)
        for path in (trainer.checkpoint_callback.best_model_path, trainer.checkpoint_callback.newest_model_path)
    )
    assert_same_weights(weights_of(last), weights_of(model))
    test_dataloader = RegressionData().loader_for_test()
    # OPTION 1: test after fit
    [tested] = trainer.test(test_dataloaders=test_dataloader, verbose=False)
    assert_same_weights(weights_of(best), weights_of(model))
    # A given model is tested as it is.
    [of_best] = Trainer(logger=False, enable_progress_bar=False).test(best, test_dataloader, verbose=False)
    [of_last] = trainer.test(last, test_dataloaders=test_dataloader, verbose=False)
    assert tested == of_best
    assert tested != of_last


def test_without_checkpoints_the_last_weights_are_tested(quiet):
    model = Worsens()
    trainer = Trainer(max_epochs=2, **quiet)
    trainer.fit(model, RegressionData())
    after_fit = weights_of(model)
    [tested] = trainer.test(test_dataloaders=RegressionData().loader_for_test(), verbose=False)
    assert_same_weights(after_fit, weights_of(model))
    [given] = trainer.test(model, test_dataloaders=RegressionData().loader_for_test(), verbose=False)
    assert tested == given


def test_test_after_loading_weights(quiet):
    trainer = Trainer(max_epochs=1, logger=False, enable_progress_bar=False)
    trainer.fit(Regression(), RegressionData())
    # OPTION 2: test after loading weights
    model = Regression.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    trainer = Trainer(**quiet)
    test_dataloader = RegressionData().loader_for_test()
    with pytest.raises(pl.ConfigError, match="test needs a model: pass one, or call fit on this Trainer before"):
        trainer.test(test_dataloaders=test_dataloader)
    [tested] = trainer.test(model, test_dataloaders=test_dataloader, verbose=False)
    x, y = make_data(20, seed=2).tensors
    assert tested["test_loss"] == pytest.approx(F.mse_loss(model(x), y).item())


@pytest.mark.parametrize("switch", ["early_stop_callback", "early_stop_checkpoint", "callbacks"])
def test_the_pages_early_stopping_stops(switch, quiet):
    model = Worsens()
    value = [pl.EarlyStopping("val_loss")] if switch == "callbacks" else True
    trainer = Trainer(max_epochs=20, **{switch: value}, **quiet)
    trainer.fit(model, RegressionData())
    assert trainer.current_epoch == 4  # the best is the first, and three more are the patience
    assert trainer.early_stopping_callback.stopped_epoch == 3


def test_early_stopping_follows_early_stop_on_where_it_is_logged(quiet):
    class Both(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", -float(self.current_epoch))
            self.log("early_stop_on", float(self.current_epoch))

    trainer = Trainer(max_epochs=20, early_stop_callback=True, **quiet)
    trainer.fit(Both(), RegressionData())
    assert trainer.current_epoch == 4


def test_early_stopping_without_a_metric_to_follow_says_what_there_is(quiet):
    class Other(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("accuracy", 1.0)

    with pytest.raises(pl.ConfigError, match=r"monitor='val_loss'\).*there are: accuracy"):
        Trainer(early_stop_callback=True, **quiet).fit(Other(), RegressionData())


def test_a_run_is_resumed_from_the_trainers_argument(quiet):
    first = Trainer(max_epochs=2, logger=False, enable_progress_bar=False)
    first.fit(Regression(), RegressionData())
    path = first.checkpoint_callback.newest_model_path
    trainer = Trainer(resume_from_checkpoint=path, max_epochs=3, **quiet)
    model = Regression()
    trainer.fit(model, RegressionData())
    assert (trainer.current_epoch, trainer.global_step, len(model.losses)) == (3, 18, 6)
    with pytest.raises(pl.ConfigError, match="ckpt_path and resume_from_checkpoint are two names"):
        trainer.fit(model, RegressionData(), ckpt_path="elsewhere.ckpt")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_half_the_data_early_stopping_and_four_validations_an_epoch_in_one_trainer(num_workers, quiet):
    """The page's last example, without its TPU."""

    class LitModel(Validated, LightningModule):
        num_validations = 0

        def on_validation_epoch_end(self):
            self.num_validations += not self.trainer.sanity_checking

    trainer = Trainer(
        num_workers=num_workers,
        precision="bf16",
        early_stop_checkpoint=True,
        limit_train_batches=0.5,
        val_check_interval=0.25,
        max_epochs=1,
        **quiet,
    )
    model = LitModel()
    loader = DataLoader(digits(256), batch_size=16 // max(1, num_workers))
    trainer.fit(model, loader, DataLoader(digits(32), batch_size=16))
    assert trainer.global_step == 8
    assert model.num_validations == 4


def test_the_pages_tpu_example_asks_for_a_slice(monkeypatch):
    pretend_slices(monkeypatch, ("pod", "v6e", "2x4", 2, 4))
    trainer = Trainer(
        tpu_cores=8,
        precision=16,
        early_stop_checkpoint=True,
        limit_train_batches=0.5,
        val_check_interval=0.25
    )  # fmt: skip
    slices = trainer._plan.workers.slices
    assert (slices.topology, slices.num_hosts, trainer.num_nodes) == ("2x4", 2, 2)

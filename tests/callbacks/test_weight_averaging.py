"""WeightAveraging, EMAWeightAveraging and StochasticWeightAveraging, compared with loops written by hand."""

import warnings
from contextlib import contextmanager
from copy import deepcopy

import pytest
import torch
from models import Regression, assert_same_weights, batches, fit, make_data, weights_of
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import SWALR
from torch.utils.data import DataLoader

import raylit as pl


@contextmanager
def printed_by_workers():
    """Workers warn in their own processes, under the filters of this one."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


WORKERS = [0, 2]


def close(num_workers):
    """Two workers add their gradients up in another order than one process."""
    return {"rtol": 1e-4, "atol": 1e-6} if num_workers else {}


class Normed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def step(model, optimizer, batch):
    x, y = batch
    optimizer.zero_grad()
    functional.mse_loss(model.net(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("num_workers", WORKERS)
def test_an_exponential_average_equals_a_plain_loop(num_workers):
    torch.manual_seed(1)
    model = Regression()
    by_hand = deepcopy(model)
    average = weights_of(by_hand)
    optimizer = by_hand.configure_optimizers()
    for index, (_, _, batch) in enumerate(batches(epochs=2)):
        step(by_hand, optimizer, batch)
        if index % 2 == 0 and index >= 3:
            # The first update of all takes the weights as they are.
            is_first = index == 4
            for name, value in by_hand.state_dict().items():
                average[name] = value.clone() if is_first else 0.8 * average[name] + 0.2 * value
    callback = pl.EMAWeightAveraging(decay=0.8, update_every_n_steps=2, update_starting_at_step=3)
    fit(model, num_workers=num_workers, callbacks=callback)
    assert_same_weights(weights_of(model), average, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_the_plain_average_includes_all_steps(num_workers):
    torch.manual_seed(1)
    model = Regression()
    by_hand, seen = deepcopy(model), []
    optimizer = by_hand.configure_optimizers()
    for _, _, batch in batches(epochs=2):
        step(by_hand, optimizer, batch)
        seen.append(weights_of(by_hand))
    fit(model, num_workers=num_workers, callbacks=pl.WeightAveraging())
    mean = {name: torch.stack([weights[name] for weights in seen]).mean(dim=0) for name in seen[0]}
    assert_same_weights(weights_of(model), mean, rtol=1e-4, atol=1e-6)


class Epochs(pl.WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return epoch_idx is not None


class Weighs(Regression):
    """Keeps the weights that validation and training run with."""

    def __init__(self):
        super().__init__()
        self.validated, self.trained = [], []

    def on_train_epoch_end(self):
        self.trained.append(weights_of(self))

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.validated.append(weights_of(self))


def test_validation_runs_with_the_average_and_training_goes_on_without_it(tmp_path):
    model = Weighs()
    data = DataLoader(make_data(20), batch_size=10)
    trainer = pl.Trainer(
        max_epochs=3, callbacks=Epochs(), logger=False, enable_progress_bar=False, num_sanity_val_steps=0
    )
    trainer.fit(model, data, data)
    one, two, three = model.trained
    assert_same_weights(model.validated[1], one, rtol=1e-5, atol=1e-6)
    mean = {name: (one[name] + two[name]) / 2 for name in one}
    assert_same_weights(model.validated[2], mean, rtol=1e-5, atol=1e-6)
    mean = {name: (one[name] + two[name] + three[name]) / 3 for name in one}
    assert_same_weights(weights_of(model), mean, rtol=1e-5, atol=1e-6)
    plain = Weighs()
    assert any(not torch.equal(one[name], weights_of(plain)[name]) for name in one)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_resumed_average_equals_one_that_was_not_interrupted(num_workers, tmp_path):
    torch.manual_seed(1)
    model = Regression()
    first, resumed = deepcopy(model), deepcopy(model)
    settings = {"num_workers": num_workers, "enable_checkpointing": True, "max_epochs": 3}
    fit(model, callbacks=[pl.EMAWeightAveraging(decay=0.5)], **settings)
    saved = pl.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=9)
    fit(first, callbacks=[pl.EMAWeightAveraging(decay=0.5), saved], **{**settings, "max_epochs": 2})
    again = pl.EMAWeightAveraging(decay=0.5)
    fit(resumed, callbacks=again, ckpt_path=saved.best_model_path, **settings)
    assert_same_weights(weights_of(resumed), weights_of(model))


def test_a_checkpoint_has_the_average_as_weights_and_the_current_weights_separately(tmp_path):
    model = Regression()
    saved = pl.ModelCheckpoint(tmp_path)
    fit(model, callbacks=[pl.EMAWeightAveraging(decay=0.5), saved], enable_checkpointing=True)
    checkpoint = torch.load(saved.best_model_path, weights_only=True)
    assert_same_weights(dict(checkpoint["state_dict"]), weights_of(model))
    assert any(
        not torch.equal(checkpoint["current_model_state"][name], weights_of(model)[name]) for name in weights_of(model)
    )
    assert checkpoint["averaging_state"]["n_averaged"] == 12
    loaded = Regression.load_from_checkpoint(saved.best_model_path)
    assert_same_weights(weights_of(loaded), weights_of(model))


@pytest.mark.parametrize("num_workers", WORKERS)
def test_before_the_average_begins_the_current_weights_are_validated_saved_and_kept(num_workers, tmp_path):
    torch.manual_seed(1)
    model = Weighs()
    expected = deepcopy(model)
    settings = {"num_workers": num_workers, "enable_checkpointing": True, "limit_val_batches": 1.0}
    fit(expected, num_workers=num_workers)
    data = DataLoader(make_data(48), batch_size=8 // max(1, num_workers), shuffle=True)
    saved = pl.ModelCheckpoint(tmp_path)
    torch.manual_seed(5)
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[pl.EMAWeightAveraging(update_starting_at_step=100), saved],
        logger=False,
        enable_progress_bar=False,
        **settings,
    )
    message = "EMAWeightAveraging has averaged nothing in the 12 steps and 2 epochs"
    with printed_by_workers() if num_workers else pytest.warns(UserWarning, match=message):
        trainer.fit(model, data, DataLoader(make_data(20), batch_size=10))
    assert_same_weights(weights_of(model), weights_of(expected))
    assert_same_weights(dict(torch.load(saved.best_model_path, weights_only=True)["state_dict"]), weights_of(expected))
    validated, trained = model.validated[-1], model.trained[-1]
    assert_same_weights(validated, trained)
    assert_same_weights(validated, weights_of(expected))


def test_an_average_that_begins_by_epoch_is_validated_from_that_epoch_on():
    class FromTheThirdOn(pl.WeightAveraging):
        def should_update(self, step_idx=None, epoch_idx=None):
            return epoch_idx is not None and epoch_idx >= 2

    model = Weighs()
    loader = DataLoader(make_data(20), batch_size=10)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = pl.Trainer(max_epochs=5, callbacks=FromTheThirdOn(), num_sanity_val_steps=0, **quiet)
    trainer.fit(model, loader, loader)
    # Validation comes before the end of its epoch, at which the average is updated.
    first, second, third, fourth, fifth = model.trained
    mean = {name: (third[name] + fourth[name]) / 2 for name in third}
    for found, expected in zip(model.validated, (first, second, third, third, mean), strict=True):
        assert_same_weights(found, expected, rtol=1e-5, atol=1e-6)
    mean = {name: (third[name] + fourth[name] + fifth[name]) / 3 for name in third}
    assert_same_weights(weights_of(model), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_run_resumed_before_its_average_has_begun_equals_one_that_was_not_interrupted(num_workers, tmp_path):
    torch.manual_seed(1)
    model = Regression()
    first, resumed = deepcopy(model), deepcopy(model)
    settings = {"num_workers": num_workers, "enable_checkpointing": True, "max_epochs": 2}

    def ema():
        return pl.EMAWeightAveraging(decay=0.5, update_starting_at_step=8)

    fit(model, callbacks=[ema()], **settings)
    saved = pl.ModelCheckpoint(tmp_path / "saved", every_n_train_steps=5, save_top_k=-1, monitor="step")
    fit(first, callbacks=[ema(), saved], **settings)
    [path] = (tmp_path / "saved").glob("*step=5.ckpt")
    fit(resumed, callbacks=[ema()], ckpt_path=path, **settings)
    assert_same_weights(weights_of(resumed), weights_of(model))


def test_the_average_of_a_module_with_extra_state_that_is_not_a_tensor_is_saved(tmp_path):
    class Extra(Regression):
        def get_extra_state(self):
            return {"calls": 3}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    saved = pl.ModelCheckpoint(tmp_path)
    fit(Extra(), callbacks=[pl.WeightAveraging(), saved], enable_checkpointing=True)
    assert Extra.load_from_checkpoint(saved.best_model_path).calls == 3


def swa_by_hand(model, *, epochs, start, rate, anneal, strategy):
    """Average as Lightning does: weights at the start of each epoch from `start` on; statistics from one more epoch."""
    optimizer = model.configure_optimizers()
    average, count, scheduler, last = {}, 0, None, -1
    for epoch, _, batch in batches(epochs=epochs):
        if epoch != last:
            if scheduler is not None:
                scheduler.step()
            last = epoch
            if epoch >= start - 1:
                if scheduler is None:
                    for group in optimizer.param_groups:
                        group["initial_lr"] = rate
                    last_epoch = epochs if strategy == "cos" else -1
                    scheduler = SWALR(optimizer, rate, anneal, strategy, last_epoch)
                for name, value in model.named_parameters():
                    value = value.detach().clone()
                    average[name] = average[name] + (value - average[name]) / (count + 1) if count else value
                count += 1
        step(model, optimizer, batch)
    for name, value in model.named_parameters():
        value.data.copy_(average[name])
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    for epoch, _, (x, _) in batches(epochs=epochs + 1):
        if epoch == epochs and norms:
            model.net(x)
    return weights_of(model)


@pytest.mark.parametrize("num_workers", WORKERS)
@pytest.mark.parametrize(("strategy", "kind"), [("cos", Regression), ("linear", Normed)])
def test_stochastic_averaging_equals_a_plain_loop(strategy, kind, num_workers):
    torch.manual_seed(1)
    model = kind()
    expected = swa_by_hand(deepcopy(model), epochs=5, start=2, rate=0.02, anneal=3, strategy=strategy)
    callback = pl.StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=3, annealing_strategy=strategy)
    # With batch norms each worker's step has its own statistics, unless they are synced.
    settings = {"sync_batchnorm": True} if num_workers and kind is Normed else {}
    fit(model, num_workers=num_workers, max_epochs=5, callbacks=callback, **settings)
    assert callback.num_averaged == 4
    assert_same_weights(weights_of(model), expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_over_all_workers_without_synced_batch_norms_too():
    torch.manual_seed(1)
    model = Normed()
    fit(model, num_workers=2, num_samples=46, max_epochs=2, callbacks=pl.StochasticWeightAveraging(0.02, 1))
    found = weights_of(model)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]:
        assert norm.momentum == 0.1
        norm.reset_running_stats()
        norm.momentum = None
    for epoch, _, (x, _) in batches(epochs=3, num_samples=46):
        if epoch == 2:
            model.net(x)
    assert_same_weights(found, weights_of(model), rtol=1e-4, atol=1e-5)


class Scheduled(Regression):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)]


class Rates(pl.Callback):
    def __init__(self):
        self.rates = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rates.append(round(trainer.optimizers[0].param_groups[0]["lr"], 6))


def test_the_users_scheduler_is_replaced():
    rates = Rates()
    swa = pl.StochasticWeightAveraging(0.01, swa_epoch_start=0.5, annealing_epochs=1, annealing_strategy="linear")
    fit(Scheduled(), max_epochs=4, callbacks=[rates, swa])
    assert rates.rates == [0.1, 0.05, 0.01, 0.01]


@pytest.mark.parametrize("num_workers", WORKERS)
def test_stochastic_averaging_continues_in_a_resumed_run(num_workers, tmp_path):
    def swa():
        return pl.StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2)

    torch.manual_seed(1)
    model = Scheduled()
    first, resumed = deepcopy(model), deepcopy(model)
    settings = {"num_workers": num_workers, "max_epochs": 4}
    fit(model, callbacks=swa(), **settings)
    saved = pl.ModelCheckpoint(tmp_path, every_n_train_steps=14)
    fit(first, callbacks=[swa(), saved], enable_checkpointing=True, **settings)
    callback = swa()
    fit(resumed, callbacks=callback, ckpt_path=saved.best_model_path, **settings)
    assert callback.num_averaged == 3
    assert_same_weights(weights_of(resumed), weights_of(model))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"swa_lrs": 0.0}, "swa_lrs=0.0"),
        ({"swa_lrs": [0.1, -1.0]}, "swa_lrs="),
        ({"swa_lrs": 0.1, "swa_epoch_start": 0}, "swa_epoch_start=0"),
        ({"swa_lrs": 0.1, "swa_epoch_start": 1.5}, "swa_epoch_start=1.5"),
        ({"swa_lrs": 0.1, "annealing_strategy": "steep"}, "annealing_strategy='steep'"),
        ({"swa_lrs": 0.1, "avg_fn": 3}, "avg_fn=3"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.StochasticWeightAveraging(**arguments)


def test_the_weights_are_unchanged_if_the_stochastic_average_does_not_begin():
    torch.manual_seed(1)
    model = Normed()
    expected = deepcopy(model)
    fit(expected)
    fit(model, callbacks=pl.StochasticWeightAveraging(0.01, swa_epoch_start=100))
    assert_same_weights(weights_of(model), weights_of(expected))


def test_avg_fn_computes_the_average():
    model = Regression()
    seen = []

    def latest(average, weights, num_averaged):
        seen.append(int(num_averaged))
        return weights

    fit(model, max_epochs=3, callbacks=pl.StochasticWeightAveraging(0.01, 1, avg_fn=latest))
    assert seen == [1] * 4 + [2] * 4


def test_an_endless_run_cannot_be_averaged_at_its_end():
    with pytest.raises(pl.ConfigError, match="needs max_epochs"):
        pl.Trainer(max_epochs=-1, callbacks=pl.StochasticWeightAveraging(0.01))


def test_several_optimizers_cannot_be_averaged():
    class Two(Regression):
        def training_step(self, batch, batch_idx, optimizer_idx):
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), lr=0.1), torch.optim.SGD(self.parameters(), lr=0.1)]

    with pytest.raises(pl.ConfigError, match="one optimizer"):
        fit(Two(), callbacks=pl.StochasticWeightAveraging(0.01))


def test_a_decay_beyond_one_is_refused():
    with pytest.raises(pl.ConfigError, match=r"decay=1\.5"):
        pl.EMAWeightAveraging(decay=1.5)

"""The loops on XLA: what they compile, ragged batches, evaluation, prediction, random numbers, callbacks."""

import warnings

import pytest
import torch
from models import make_data
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from xla.xla_models import QUIET, Regression, fit, max_difference, require_xla, train_by_hand

import raylit as pl

require_xla()

from raylit.accelerators.xla import XLAAccelerator, count_compilations  # noqa: E402
from raylit.worker.collectives import require_reachable  # noqa: E402


class Counted(Regression):
    """Notes how many graphs had been compiled after each batch and at the end of each epoch."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.after_batches, self.after_epochs = [], []

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.after_batches.append(count_compilations())

    def on_train_epoch_end(self):
        self.after_epochs.append(count_compilations())


def test_nothing_is_compiled_after_the_first_epoch():
    """With dropout, clipping, a schedule, logging at each step and a validation set whose last batch is smaller."""
    model = Counted(dropout=0.2)
    val = DataLoader(make_data(20, seed=2), batch_size=8)
    fit(model, val=val, max_epochs=4, gradient_clip_val=1.0, log_every_n_steps=1)
    assert len(model.after_batches) == 24
    assert len(set(model.after_batches[6:])) == 1 + (model.after_batches[6] != model.after_batches[7])
    assert len(set(model.after_epochs[1:])) == 1


class OfTwoShapes(torch.utils.data.IterableDataset):
    def __iter__(self):
        for index in range(12):
            yield torch.full((8 if index != 9 else 6, 8), 0.1), torch.zeros(8 if index != 9 else 6, 3)


def test_a_warning_names_the_shapes_that_were_compiled_late():
    trainer = pl.Trainer(**QUIET, max_epochs=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"step 10 was compiled anew.*\(6, 8\), \(6, 3\), which no batch before had"):
        trainer.fit(Regression(), DataLoader(OfTwoShapes(), batch_size=None))


def test_training_leaves_the_smaller_last_batch_out_and_says_so():
    model = Counted()
    with pytest.warns(UserWarning, match="leaves out the 2 samples of its last, smaller batch") as caught:
        trainer = fit(model, num_samples=50)
    assert len([one for one in caught if "leaves out" in str(one.message)]) == 1
    assert trainer.num_training_batches == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Regression(), num_samples=48)
        # A data set of less than one batch is a batch of its own.
        assert fit(Regression(), num_samples=5).num_training_batches == 1


class Evaluated(Regression):
    def validation_step(self, batch, batch_idx):
        loss = functional.mse_loss(self(batch[0]), batch[1])
        self.log("val_loss", loss)
        self.log("val_sum", loss.detach() * len(batch[0]), reduce_fx="sum")
        return {"rows": self(batch[0])}

    test_step = validation_step

    def validation_epoch_end(self, outputs):
        self.rows = torch.cat([one["rows"] for one in outputs]).cpu()


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.timeout(300))])
def test_a_ragged_set_is_evaluated_exactly(num_workers):
    model = Evaluated()
    data = make_data(21, seed=2)
    trainer = pl.Trainer(**QUIET, num_workers=num_workers)
    (result,) = trainer.test(model, DataLoader(data, batch_size=4))
    x, y = data.tensors
    with torch.no_grad():
        expected = functional.mse_loss(model(x), y).item()
        assert result["val_loss"] == pytest.approx(expected, abs=1e-6)
        assert result["val_sum"] == pytest.approx(expected * 21, abs=1e-5)
        trainer.validate(model, DataLoader(data, batch_size=4))
        torch.testing.assert_close(model.rows, model(x), atol=1e-6, rtol=0)
        predictions = trainer.predict(model, DataLoader(data, batch_size=4))
        assert [len(one) for one in predictions] == [4, 4, 4, 4, 4, 1]
        assert {one.device.type for one in predictions} == {"cpu"}
        torch.testing.assert_close(torch.cat(predictions), model(x), atol=1e-6, rtol=0)


class OneGraph(XLAAccelerator):
    """As on the hosts of a slice, whose graph spans all workers: here each worker computes all of it."""

    is_one_graph = True


@pytest.mark.timeout(300)
def test_workers_of_one_graph_evaluate_every_batch_together():
    model = Evaluated()
    data = make_data(21, seed=2)
    loader = DataLoader(data, batch_size=4)
    trainer = pl.Trainer(**{**QUIET, "accelerator": OneGraph()}, num_workers=2)
    x, y = data.tensors
    with torch.no_grad():
        expected = functional.mse_loss(model(x), y).item()
    (result,) = trainer.test(model, loader)
    assert result["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert result["val_sum"] == pytest.approx(expected * 21, abs=1e-5)
    trainer.validate(model, loader)
    assert len(model.rows) == 21
    assert [len(one) for one in trainer.predict(model, loader)] == [4, 4, 4, 4, 4, 1]


def test_runs_with_one_seed_are_equal_and_with_another_are_not():
    first, second, other = Regression(dropout=0.5), Regression(dropout=0.5), Regression(dropout=0.5)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(first.state_dict())
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        # One batch is an epoch: the order of the samples plays no part.
        fit(model, num_samples=8, seed=seed)
    assert max_difference(first, second) == 0
    assert max_difference(first, other) > 0


def test_batch_norms_train_on_the_statistics_of_all_devices():
    class Normed(Regression):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3))

    model = Normed()
    expected = train_by_hand(model)
    fit(model)
    for norms in (model.net[1], expected.net[1]):
        assert (norms.running_var != 1).all()
        norms.running_var.fill_(1.0)  # torch_xla keeps the biased variance
    assert max_difference(model, expected) < 1e-6


def test_averaged_weights_are_those_of_a_plain_average():
    model = Regression()
    seen = []

    class Keeping(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append([parameter.detach().cpu().clone() for parameter in module.parameters()])

    decay = 0.5
    fit(model, callbacks=[pl.EMAWeightAveraging(decay=decay), Keeping()])
    average = seen[0]
    for weights in seen[1:]:
        average = [decay * old + (1 - decay) * new for old, new in zip(average, weights, strict=True)]
    for parameter, expected in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-5, rtol=1e-5)


def test_stochastic_weight_averaging_runs():
    model = Regression()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, max_epochs=4, callbacks=[pl.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)])
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in model.state_dict().values())
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_early_stopping_ends_a_fit():
    model = Regression()
    val = DataLoader(make_data(20, seed=2), batch_size=8)
    stopping = pl.EarlyStopping("val_loss", patience=1, min_delta=1e6)
    trainer = fit(model, val=val, max_epochs=9, callbacks=[stopping])
    assert trainer.current_epoch == 2


class Collecting(pl.Callback):
    def __init__(self):
        self.outputs = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.outputs.append({"loss": [outputs["loss"]]})


@pytest.mark.timeout(300)
def test_tensors_that_callbacks_keep_come_back_from_actors_on_the_cpu():
    callback = Collecting()
    model = Regression()
    trainer = fit(model, num_workers=2, callbacks=[callback])
    assert len(callback.outputs) == 12
    assert {one["loss"][0].device.type for one in callback.outputs} == {"cpu"}
    assert {value.device.type for value in trainer.callback_metrics.values()} == {"cpu"}


class Gathering(Regression):
    def on_train_end(self):
        share = torch.full((2,), float(self.global_rank), device=self.device)
        gathered = self.all_gather(share)
        self.gathered, self.where = gathered.cpu(), gathered.device.type
        try:
            self.refusal = ""
            require_reachable(share)
        except pl.ModuleError as error:
            self.refusal = str(error)


@pytest.mark.timeout(300)
def test_all_gather_works_and_collectives_refuse_tensors_on_xla():
    model = Gathering()
    fit(model, num_workers=2, max_epochs=1)
    assert model.gathered.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert model.where == "xla"
    assert "with a tensor on XLA" in model.refusal

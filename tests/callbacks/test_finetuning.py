"""BackboneFinetuning and BaseFinetuning, compared with a loop written by hand."""

from copy import deepcopy

import pytest
import torch
from models import assert_same_weights, batches, fit, weights_of
from torch import nn
from torch.nn import functional

import raylit as pl
from raylit.callbacks import BackboneFinetuning, BaseFinetuning

WORKERS = [0, 2]


class Transfer(pl.LightningModule):
    """A frozen backbone gets no gradient, so its parameters are left out of the optimizer until they are thawed."""

    def __init__(self, by_hand=False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 6), nn.Tanh()))
        self.head = nn.Linear(6, 3)
        self.automatic_optimization = not by_hand

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self.head(self.backbone(x)), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return None

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=0.02)


def train_by_hand(model, *, epochs, thaw):
    """The backbone at a tenth of the head's rate, doubled with each epoch, at most the head's."""
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.02)
    rate, last = None, -1
    for epoch, _, (x, y) in batches(epochs=epochs):
        if epoch != last:
            last = epoch
            if epoch == thaw:
                rate = 0.002
                optimizer.add_param_group({"params": model.backbone.parameters(), "lr": rate})
            elif epoch > thaw:
                rate = min(2 * rate, 0.02)
                optimizer.param_groups[-1]["lr"] = rate
        optimizer.zero_grad()
        functional.mse_loss(model.head(model.backbone(x)), y).backward()
        optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_thawed_backbone_is_trained_as_in_a_loop_by_hand(num_workers, by_hand):
    torch.manual_seed(1)
    model = Transfer(by_hand)
    expected = train_by_hand(deepcopy(model), epochs=6, thaw=1)
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if num_workers else {}
    fit(model, num_workers=num_workers, max_epochs=6, callbacks=BackboneFinetuning(unfreeze_backbone_at_epoch=1))
    assert_same_weights(weights_of(model), expected, **tolerance)


class Watch(pl.Callback):
    """What stands in the optimizer, and the backbone, at each epoch's end, of every rank."""

    def __init__(self):
        self.rates, self.backbones, self.spread = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.rates.append([round(group["lr"], 9) for group in trainer.optimizers[0].param_groups])
        weight = pl_module.backbone[0].weight.detach().clone()
        self.backbones.append(weight)
        gathered = trainer.all_gather(weight)
        self.spread.append(0.0 if gathered is weight else (gathered[0] - gathered[-1]).abs().max().item())


@pytest.mark.parametrize("num_workers", WORKERS)
def test_the_backbone_stands_still_until_its_epoch_and_is_alike_on_all_ranks_after_it(num_workers):
    watch = Watch()
    model = Transfer()
    before = model.backbone[0].weight.detach().clone()
    callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=2), watch]
    fit(model, num_workers=num_workers, max_epochs=4, callbacks=callbacks)
    assert watch.rates == [[0.02], [0.02], [0.02, 0.002], [0.02, 0.004]]
    assert torch.equal(watch.backbones[1], before)
    assert not torch.equal(watch.backbones[2], before)
    assert watch.spread == [0.0] * 4


@pytest.mark.parametrize("at_step", [9, 15])
@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_resumed_run_has_the_groups_and_trains_what_was_trained(num_workers, at_step, tmp_path):
    torch.manual_seed(1)
    model = Transfer()
    first, resumed = deepcopy(model), deepcopy(model)
    settings = {"num_workers": num_workers, "max_epochs": 4}
    fit(model, callbacks=BackboneFinetuning(1), **settings)
    saved = pl.ModelCheckpoint(tmp_path, every_n_train_steps=at_step)
    fit(first, callbacks=[BackboneFinetuning(1), saved], enable_checkpointing=True, **settings)
    watch = Watch()
    fit(resumed, callbacks=[BackboneFinetuning(1), watch], ckpt_path=saved.best_model_path, **settings)
    assert_same_weights(weights_of(resumed), weights_of(model))
    assert watch.rates[-1] == [0.02, 0.008]


@pytest.mark.parametrize(
    ("arguments", "rates"),
    [
        ({"backbone_initial_lr": 0.005, "lambda_func": lambda epoch: 1.5}, [0.005, 0.0075, 0.01125]),
        ({"backbone_initial_ratio_lr": 0.5}, [0.01, 0.02, 0.02]),
        ({"backbone_initial_ratio_lr": 0.5, "should_align": False}, [0.01, 0.02, 0.04]),
        ({"lambda_func": lambda epoch: float(epoch)}, [0.002, 0.004, 0.012]),
    ],
)
def test_the_backbones_rate_follows_its_arguments(arguments, rates):
    watch = Watch()
    fit(Transfer(), max_epochs=3, callbacks=[BackboneFinetuning(0, **arguments), watch])
    assert [found[1] for found in watch.rates] == pytest.approx(rates)


def test_verbose_prints_both_rates(capsys):
    callback = BackboneFinetuning(1, verbose=True, rounding=3)
    fit(Transfer(), max_epochs=2, callbacks=callback, enable_model_summary=False)
    assert capsys.readouterr().out == "epoch 1: lr 0.02, backbone 0.002\n"


def test_a_module_without_a_backbone_is_an_error():
    class Headless(Transfer):
        def __init__(self):
            super().__init__()
            self.body, self.backbone = self.backbone, None

    with pytest.raises(pl.ModuleError, match=r"Headless has no `backbone`"):
        fit(Headless(), callbacks=BackboneFinetuning())


class OneByOne(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze([pl_module.backbone[0], {"rest": pl_module.backbone[2]}.values()])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone[2], optimizer)
        if epoch == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[0], optimizer, lr=0.5)


def test_an_own_schedule_adds_group_after_group():
    watch = Watch()
    fit(Transfer(), max_epochs=3, callbacks=[OneByOne(), watch])
    assert watch.rates == [[0.02], [0.02, 0.002], [0.02, 0.002, 0.5]]


def test_what_the_optimizer_has_already_gets_no_second_group():
    model = Transfer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(UserWarning, match="4 of the parameters"):
        BaseFinetuning.unfreeze_and_add_param_group(model.backbone, optimizer)
    assert len(optimizer.param_groups) == 1


def test_batch_norms_stay_trained_unless_told_otherwise():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    BaseFinetuning.freeze(net)
    assert [parameter.requires_grad for parameter in net.parameters()] == [False, False, True, True]
    assert list(BaseFinetuning.filter_params(net, train_bn=False)) == []
    BaseFinetuning.freeze(net, train_bn=False)
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not net[1].track_running_stats
    BaseFinetuning.make_trainable(net)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert net[1].track_running_stats


def test_modules_are_flattened_to_leaves_and_parents_with_parameters():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.child = nn.Linear(1, 1)

    parent = Parent()
    net = nn.ModuleDict({"one": nn.Sequential(parent), "two": nn.ModuleList([nn.ReLU()])})
    assert BaseFinetuning.flatten_modules(net) == [parent, parent.child, net["two"][0]]


def test_an_epoch_before_the_first_is_refused():
    with pytest.raises(pl.ConfigError, match="unfreeze_backbone_at_epoch=-1"):
        BackboneFinetuning(-1)

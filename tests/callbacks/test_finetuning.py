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
    """Train the backbone at a tenth of the head's rate, doubled with each epoch, at most the head's."""
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
def test_an_unfrozen_backbone_is_trained_as_in_a_plain_loop(num_workers, by_hand):
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
def test_the_backbone_is_frozen_until_its_epoch_and_equal_on_all_ranks_afterwards(num_workers):
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
def test_a_resumed_run_restores_groups_and_trained_parameters(num_workers, at_step, tmp_path):
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


class Wide(pl.LightningModule):
    """A backbone with batch norms, one of them without parameters, and dropout."""

    def __init__(self):
        super().__init__()
        parts = (nn.Linear(8, 6), nn.BatchNorm1d(6), nn.BatchNorm1d(6, affine=False), nn.Dropout(0.5), nn.Linear(6, 6))
        self.backbone = nn.Sequential(*parts)
        self.head = nn.Linear(6, 3)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.mse_loss(self.head(self.backbone(x)), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.head.parameters(), lr=0.02)


class PartByPart(BaseFinetuning):
    """Biases from the second epoch on; the last layer's weight, in their group, and the batch norms from the third."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone, train_bn=False)
        pl_module.backbone.eval()

    def finetune_function(self, pl_module, epoch, optimizer):
        first, norm, plain_norm, _, last = pl_module.backbone
        if epoch == 1:
            biases = [first.bias, norm.bias, last.bias]
            for bias in biases:
                bias.requires_grad_(True)
            optimizer.add_param_group({"params": biases, "lr": 0.01})
            pl_module.head.weight.requires_grad_(False)
        if epoch == 2:
            last.weight.requires_grad_(True)
            optimizer.param_groups[1]["params"].append(last.weight)
            self.make_trainable(plain_norm)
            pl_module.backbone.train()


class Flags(pl.Callback):
    """Of each epoch: what is trained, tracks statistics, is in train mode, and what the optimizer has."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        [optimizer] = trainer.optimizers
        self.seen[trainer.current_epoch] = (
            [name for name, parameter in pl_module.named_parameters() if parameter.requires_grad],
            [name for name, module in pl_module.named_modules() if getattr(module, "track_running_stats", False)],
            [name for name, module in pl_module.named_modules() if module.training],
            [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups],
        )


@pytest.mark.parametrize("at_step", [9, 12, 20])
@pytest.mark.parametrize("num_workers", WORKERS)
def test_a_resumed_run_trains_the_single_parameters_that_were_trained(num_workers, at_step, tmp_path):
    torch.manual_seed(1)
    model = Wide()
    first, resumed = deepcopy(model), deepcopy(model)
    settings = {"num_workers": num_workers, "max_epochs": 4}
    expected, found = Flags(), Flags()
    fit(model, callbacks=[PartByPart(), expected], **settings)
    saved = pl.ModelCheckpoint(tmp_path, every_n_train_steps=at_step, save_top_k=-1, monitor="step")
    fit(first, callbacks=[PartByPart(), saved], enable_checkpointing=True, **settings)
    [path] = tmp_path.glob(f"*step={at_step}.ckpt")
    fit(resumed, callbacks=[PartByPart(), found], ckpt_path=path, **settings)
    trained, tracking, in_train_mode, groups = expected.seen[2]
    biases = ["backbone.0.bias", "backbone.1.bias", "backbone.4.bias"]
    assert trained == [*biases[:2], "backbone.4.weight", biases[2], "head.bias"]
    assert tracking == ["backbone.2"]
    assert "backbone.3" in in_train_mode
    assert groups == [["head.weight", "head.bias"], [*biases, "backbone.4.weight"]]
    assert found.seen
    assert found.seen == {epoch: expected.seen[epoch] for epoch in found.seen}
    assert_same_weights(weights_of(resumed), weights_of(model))


@pytest.mark.parametrize("num_workers", WORKERS)
def test_after_a_fit_requires_grad_is_as_in_training(num_workers):
    model = Wide()
    fit(model, num_workers=num_workers, callbacks=PartByPart())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == ["backbone.0.bias", "backbone.1.bias", "backbone.4.bias", "head.bias"]


class InMidEpoch(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        pass

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            self.unfreeze_and_add_param_group(pl_module.backbone[2], trainer.optimizers[0])


def test_parameters_unfrozen_inside_an_epoch_are_restored(tmp_path):
    torch.manual_seed(1)
    model = Transfer()
    first, resumed = deepcopy(model), deepcopy(model)
    fit(model, callbacks=InMidEpoch())
    saved = pl.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, monitor="step")
    fit(first, callbacks=[InMidEpoch(), saved], enable_checkpointing=True)
    watch = Watch()
    [path] = tmp_path.glob("*step=4.ckpt")
    fit(resumed, callbacks=[InMidEpoch(), watch], ckpt_path=path)
    assert watch.rates == [[0.02, 0.002]] * 2
    assert_same_weights(weights_of(resumed), weights_of(model))


def test_a_checkpoint_of_another_modules_parameters_is_an_error(tmp_path):
    saved = pl.ModelCheckpoint(tmp_path, every_n_train_steps=9)
    fit(Transfer(), callbacks=[BackboneFinetuning(1), saved], enable_checkpointing=True)
    checkpoint = torch.load(saved.best_model_path, weights_only=True)
    state = checkpoint["callbacks"]["BackboneFinetuning"]["internal_optimizer_metadata"]
    state[0][1]["params"][0] = "backbone.9.weight"
    torch.save(checkpoint, tmp_path / "changed.ckpt")
    with pytest.raises(pl.CheckpointError, match=r"parameters that this module does not have: backbone\.9\.weight"):
        fit(Transfer(), callbacks=BackboneFinetuning(1), ckpt_path=tmp_path / "changed.ckpt", max_epochs=3)


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


def test_a_custom_schedule_adds_one_group_after_another():
    watch = Watch()
    fit(Transfer(), max_epochs=3, callbacks=[OneByOne(), watch])
    assert watch.rates == [[0.02], [0.02, 0.002], [0.02, 0.002, 0.5]]


def test_parameters_already_in_the_optimizer_get_no_second_group():
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

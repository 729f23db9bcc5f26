"""FSDP on two workers in steps that are more than one loss: the numbers are those of plain loops in one process."""

import copy

import pytest
import torch
from models import assert_same_weights, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

WIDTH = 72
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
OFF = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
NUM_EPOCHS = 2


class Block(nn.Module):
    """With a scale that is a single number."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x + self.scale * self.down(torch.relu(self.up(x)))


def network(num_in=8, num_out=3):
    return nn.Sequential(nn.Linear(num_in, WIDTH), Block(), Block(), nn.Linear(WIDTH, num_out))


def data(num_samples):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 8, generator=generator)
    return TensorDataset(x, x[:, :3].sin())


class Net(pl.LightningModule):
    def __init__(self, **hparams):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(7)
        self.net = network()
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.temperature * self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        self.is_gathered = not hasattr(self.net[0].weight, "full_tensor")
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", functional.mse_loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(model, *, num_samples=48, ckpt_path=None, **arguments):
    off = {name: value for name, value in OFF.items() if name != "enable_checkpointing" or "callbacks" not in arguments}
    arguments = {"strategy": "fsdp", "max_epochs": NUM_EPOCHS, **off, **arguments}
    trainer = pl.Trainer(num_workers=2, **arguments)
    trainer.fit(
        model,
        DataLoader(data(num_samples), batch_size=8),
        DataLoader(data(8), batch_size=4) if isinstance(model, Net) else None,
        ckpt_path=ckpt_path,
    )
    return trainer


def global_batches(num_samples=48):
    """The workers' batches together, of all epochs."""
    return NUM_EPOCHS * list(zip(*(tensor.split(16) for tensor in data(num_samples).tensors), strict=True))


def by_hand(model, *, num_samples=48, is_run=lambda number, rank: True, clip=None, after_step=lambda: None):
    """`is_run`: whether a rank has a loss in that global batch; sample i belongs to rank i modulo 2."""
    optimizer = model.configure_optimizers()
    for number, (x, y) in enumerate(global_batches(num_samples)):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for rank in range(2):
            if is_run(number, rank) and len(x[rank::2]) > 0:
                loss = functional.mse_loss(model(x[rank::2]), y[rank::2])
                (loss * len(x[rank::2]) / len(x)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        after_step()
    return weights_of(model)


def test_a_rank_may_have_no_share_of_a_batch_and_parameters_may_be_single_numbers():
    model = Net()
    fit(model, num_samples=33, gradient_clip_val=0.2)
    assert_same_weights(weights_of(model), by_hand(Net(), num_samples=33, clip=0.2), **TOLERANCE)
    assert model.is_gathered, "self(x) ends no forward pass inside of a step"


# Skipped batches


def is_run(number, rank):
    """Rank 0 skips the first batch, rank 1 a later one and both another."""
    return number != 4 and number != (0 if rank == 0 else 2)


class Skipping(Net):
    """As the model has run, in part, or has not run."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        is_skipped = not is_run(3 * self.trainer.current_epoch + batch_idx, self.trainer.global_rank)
        if is_skipped and self.hparams.num_parts == 0:
            return None
        hidden = self.net[:2](x)
        if is_skipped and self.hparams.num_parts == 1:
            return None
        loss = functional.mse_loss(self.temperature * self.net[2:](hidden), y)
        return None if is_skipped else loss


@pytest.mark.parametrize("num_parts", [0, 1, 2])
def test_a_rank_that_skips_its_batch_keeps_step_with_the_others(num_parts):
    model = Skipping(num_parts=num_parts)
    fit(model)
    assert_same_weights(weights_of(model), by_hand(Net(), is_run=is_run), **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "atol"),
    [
        ({"accumulate_grad_batches": 2}, 1e-6),
        ({"precision": "16-mixed"}, 0.03),
        ({"num_samples": 33}, 1e-6),
        ({"compile": True}, 1e-6),
    ],
)
@pytest.mark.parametrize("num_parts", [0, 2])
def test_a_skipped_batch_has_the_same_result_as_under_ddp(num_parts, arguments, atol):
    expected, model = Skipping(num_parts=num_parts), Skipping(num_parts=num_parts)
    fit(expected, strategy="ddp", **arguments)
    strategy = pl.FSDPStrategy(activation_checkpointing_policy={Block})
    fit(model, strategy=strategy, **arguments)
    assert_same_weights(weights_of(model), weights_of(expected), rtol=1e-5, atol=atol)


class Tied(pl.LightningModule):
    """One matrix at both ends, a block that is used twice, another whose output goes nowhere, frozen weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[1].up.weight.requires_grad_(False)
        self.register_buffer("shift", torch.ones(WIDTH))

    def training_step(self, batch, batch_idx):
        if self.trainer.global_rank == 1 and batch_idx != 1:
            return None
        letters = (batch[0][:, 0] * 5).long() + 10
        x = self.embedding(letters) + self.shift
        self.blocks[0](x).detach()
        for block in (*self.blocks, self.blocks[0]):
            x = block(x)
        return functional.cross_entropy(self.head(x), letters)

    def configure_optimizers(self):
        return torch.optim.SGD([one for one in self.parameters() if one.requires_grad], lr=0.1, momentum=0.5)


def test_tied_frozen_repeated_and_unused_weights_train_as_in_one_process():
    expected, model = Tied(), Tied()
    fit(expected, strategy="ddp")
    fit(model)
    assert_same_weights(weights_of(model), weights_of(expected), **TOLERANCE)
    assert model.head.weight is model.embedding.weight


# Manual optimization and several optimizers


class Adversarial(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.generator, self.critic = network(), network(3, 1)
        self.gain = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.gain * self.generator(x)

    def loss(self, x, y, index):
        if index == 0:
            made = self(x)
            return functional.mse_loss(made, y) - 0.1 * self.critic(made).mean()
        seen = self.critic(y)
        return self.critic(self(x).detach()).mean() - seen.mean() + seen.square().mean()

    def configure_optimizers(self):
        generating = [*self.generator.parameters(), self.gain]
        return torch.optim.SGD(generating, lr=0.05, momentum=0.9), torch.optim.SGD(self.critic.parameters(), lr=0.05)


class ByHand(Adversarial):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            with optimizer.toggle_model():
                self.manual_backward(self.loss(*batch, index))
                self.clip_gradients(optimizer, gradient_clip_val=0.5)
                optimizer.step()
                optimizer.zero_grad()


class InTurn(Adversarial):
    def training_step(self, batch, batch_idx, optimizer_idx):
        return self.loss(*batch, optimizer_idx)


@pytest.mark.parametrize(("kind", "arguments"), [(ByHand, {}), (InTurn, {"gradient_clip_val": 0.5})])
def test_several_optimizers_step_manually_or_in_turn(kind, arguments):
    expected, model = Adversarial(), kind()
    optimizers = expected.configure_optimizers()
    for x, y in global_batches(33):
        for index, optimizer in enumerate(optimizers):
            expected.zero_grad()
            expected.loss(x, y, index).backward()
            nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
            optimizer.step()
    fit(model, num_samples=33, **arguments)
    assert_same_weights(weights_of(model), weights_of(expected), **TOLERANCE)


class Sums(Net):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        with optimizer.toggle_model(sync_grad=batch_idx == 2):
            self.manual_backward(functional.mse_loss(self(x), y))
        if batch_idx == 2:
            optimizer.step()
            optimizer.zero_grad()


def test_toggle_model_without_sync_grad_delays_the_gradient_sync():
    expected, model = Net(), Sums()
    optimizer = expected.configure_optimizers()
    for number, (x, y) in enumerate(global_batches()):
        functional.mse_loss(expected(x), y).backward()
        if number % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    fit(model)
    assert_same_weights(weights_of(model), weights_of(expected), **TOLERANCE)


class ReachingInside(Sums):
    def training_step(self, batch, batch_idx):
        return functional.linear(batch[0], self.net[0].weight)


def test_use_of_a_weight_that_is_not_gathered_raises_a_plain_error():
    with pytest.raises(pl.ModuleError, match=r"had not gathered it.*call the part"):
        fit(ReachingInside())


class Thawing(Net):
    def on_train_epoch_start(self):
        for parameter in self.net[1].parameters():
            parameter.requires_grad_(self.current_epoch > 0)


def test_weights_may_be_thawed_during_training():
    expected, model = Thawing(), Thawing()
    fit(expected, strategy="ddp")
    fit(model)
    assert_same_weights(weights_of(model), weights_of(expected), **TOLERANCE)


class Biases(pl.callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.net[1])

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            biases = [pl_module.net[1].up.bias, pl_module.net[1].down.bias]
            for bias in biases:
                bias.requires_grad_(True)
            optimizer.add_param_group({"params": biases, "lr": 0.02})


class Partly(Net):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


@pytest.mark.slow
def test_biases_that_were_thawed_are_trained_in_a_resumed_run(tmp_path):
    expected, resumed = Partly(), Partly()
    saving = pl.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit(expected, callbacks=[Biases(), saving], max_epochs=3)
    [path] = tmp_path.glob("*step=4.ckpt")
    fit(resumed, callbacks=[Biases()], max_epochs=3, ckpt_path=path, enable_checkpointing=False)
    assert not torch.equal(expected.net[1].up.bias, Partly().net[1].up.bias)
    assert torch.equal(expected.net[1].up.weight, Partly().net[1].up.weight)
    assert_same_weights(weights_of(resumed), weights_of(expected))


# Averages of weights


def test_an_average_of_the_weights_is_kept_saved_and_resumed_in_shards(tmp_path):
    by_hand_model = Net()
    average = copy.deepcopy(by_hand_model)
    num_seen = 0

    def update():
        nonlocal num_seen
        share = 0.0 if num_seen == 0 else 0.8
        for mean, current in zip(average.parameters(), by_hand_model.parameters(), strict=True):
            mean.data = share * mean.data + (1 - share) * current.data
        num_seen += 1

    by_hand(by_hand_model, after_step=update)
    model = Net()
    saving = pl.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer = fit(model, callbacks=[pl.EMAWeightAveraging(decay=0.8), saving])
    assert_same_weights(weights_of(model), weights_of(average), **TOLERANCE)
    x, y = data(8).tensors
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(functional.mse_loss(average(x), y).item(), 1e-5)
    [path] = tmp_path.glob("*step=4.ckpt")
    resumed = Net()
    fit(resumed, callbacks=[pl.EMAWeightAveraging(decay=0.8)], ckpt_path=path, enable_checkpointing=False)
    assert_same_weights(weights_of(resumed), weights_of(average), **TOLERANCE)
    [path] = tmp_path.glob("*step=6.ckpt")
    assert_same_weights(weights_of(Net.load_from_checkpoint(path)), weights_of(average), **TOLERANCE)


@pytest.mark.filterwarnings("ignore:EMAWeightAveraging has averaged nothing")
def test_shards_of_an_average_that_has_not_begun_are_not_used(tmp_path):
    expected, model, resumed = Net(), Net(), Net()
    fit(expected)
    late = {"decay": 0.8, "update_starting_at_step": 100}
    saving = pl.ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit(model, callbacks=[pl.EMAWeightAveraging(**late), saving])
    assert_same_weights(weights_of(model), weights_of(expected), **TOLERANCE)
    [last], [path] = tmp_path.glob("*step=6.ckpt"), tmp_path.glob("*step=4.ckpt")
    assert_same_weights(weights_of(Net.load_from_checkpoint(last)), weights_of(expected), **TOLERANCE)
    fit(resumed, callbacks=[pl.EMAWeightAveraging(**late)], ckpt_path=path, enable_checkpointing=False)
    assert_same_weights(weights_of(resumed), weights_of(expected), **TOLERANCE)


# Images


class Pictures(pl.LightningModule):
    """Built in `configure_model`; its batch norms have shares of other sizes in the last batch."""

    def configure_model(self):
        parts = (nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16))
        self.net = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.mse_loss(self.net(x[:, None, :, None].expand(-1, 1, 8, 8) * x[:, None, None, :]), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_batch_norms_are_synced_and_images_laid_out_as_in_ddp(precision):
    weights = []
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(2)
        model = Pictures()
        arguments = {"strategy": strategy, "sync_batchnorm": True, "channels_last": True, "precision": precision}
        fit(model, num_samples=37, **arguments)
        weights.append(weights_of(model))
        assert type(model.net[1]) is nn.BatchNorm2d
    assert_same_weights(weights[1], weights[0], rtol=0, atol=1e-5 if precision == "32-true" else 0.03)

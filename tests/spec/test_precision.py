"""Precision on the CPU, as far as torch's autocast goes: each against the loop that a user would write."""

import copy

import pytest
import torch
from models import Regression, assert_same_weights, batches, fit, make_data, weights_of
from torch import nn
from torch.nn import functional

import raylit as pl


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        self.seen = set()

    def training_step(self, batch, batch_idx):
        x, y = batch
        out = self.net(x)
        self.seen.add((x.dtype, out.dtype, self.net[0].weight.dtype, torch.zeros(1).dtype))
        return functional.mse_loss(out, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class ManualNet(Net):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def mixed_by_hand(model, dtype, *, scaler=None, clip=None, accumulate=1, factor_of=lambda batch: 1.0):
    optimizer = model.configure_optimizers()
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    for number, (_, _, (x, y)) in enumerate(batches()):
        if number % accumulate == 0:
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = functional.mse_loss(model.net(x), y)
        scaler.scale(loss * factor_of(number) / accumulate).backward()
        if (number + 1) % accumulate:
            continue
        scaler.unscale_(optimizer)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return model


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("precision", ["bf16", "bf16-mixed"])
def test_bf16_mixed_is_autocast(kind, precision):
    model = kind()
    by_hand = mixed_by_hand(copy.deepcopy(model), torch.bfloat16)
    fit(model, precision=precision)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert model.seen == {(torch.float32, torch.bfloat16, torch.float32, torch.float32)}


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("precision", [16, "16", "16-mixed"])
def test_16_mixed_is_autocast_with_a_gradient_scaler(kind, precision):
    model = kind()
    by_hand = mixed_by_hand(copy.deepcopy(model), torch.float16, scaler=torch.amp.GradScaler("cpu"))
    fit(model, precision=precision)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert model.seen == {(torch.float32, torch.float16, torch.float32, torch.float32)}


def test_gradients_are_unscaled_before_they_are_clipped():
    model = Net()
    by_hand = mixed_by_hand(copy.deepcopy(model), torch.float16, scaler=torch.amp.GradScaler("cpu"), clip=0.05)
    fit(model, precision=16, gradient_clip_val=0.05)
    assert_same_weights(weights_of(model), weights_of(by_hand))


def overflow_at(number):
    """A factor of the loss that makes its gradients infinite in one batch."""
    return lambda batch: 1e38 if batch == number else 1.0


class Fused(Net):
    """An optimizer in one kernel, which unscales by itself where nobody else does; its first step overflows."""

    num_seen = 0

    def training_step(self, batch, batch_idx):
        self.num_seen += 1
        return super().training_step(batch, batch_idx) * overflow_at(0)(self.num_seen - 1)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, fused=True)


class FusedAsLoop(Fused):
    training_step = Net.training_step


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_fused_optimizer_may_be_clipped_and_scaled(clip):
    model = Fused()
    scaler = torch.amp.GradScaler("cpu")
    by_hand = mixed_by_hand(FusedAsLoop(), torch.float16, scaler=scaler, clip=clip, factor_of=overflow_at(0))
    fit(model, precision=16, gradient_clip_val=clip)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert scaler.get_scale() == 2.0**15


def test_accumulated_gradients_are_unscaled_once():
    model = Net()
    by_hand = mixed_by_hand(
        copy.deepcopy(model), torch.float16, scaler=torch.amp.GradScaler("cpu"), clip=0.05, accumulate=3
    )
    fit(model, precision=16, gradient_clip_val=0.05, accumulate_grad_batches=3)
    assert_same_weights(weights_of(model), weights_of(by_hand))


@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_a_hook_before_the_step_sees_unscaled_gradients(kind):
    norms = []

    class Looks(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            norms.append(max(float(parameter.grad.abs().max()) for parameter in pl_module.parameters()))

    fit(kind(), precision=16, callbacks=[Looks()], max_epochs=1)
    finite = [norm for norm in norms if norm < float("inf")]
    assert (len(norms), len(finite)) == (6, 5)
    assert 0 < min(finite) <= max(finite) < 10  # scaled ones are 65536 times as large


def test_manual_optimization_clips_unscaled_gradients():
    class Clips(Net):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
            optimizer.step()

    model = Clips()
    by_hand = mixed_by_hand(Net(), torch.float16, scaler=torch.amp.GradScaler("cpu"), clip=0.05)
    fit(model, precision=16)
    assert_same_weights(weights_of(model), weights_of(by_hand))


class TwoNets(pl.LightningModule):
    """Both losses' backward passes, then both steps; the first loss overflows in one batch."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(8, 3), nn.Linear(8, 3)
        self.num_seen = 0

    def losses(self, x, y):
        self.num_seen += 1
        first, second = (functional.mse_loss(net(x), y) for net in (self.first, self.second))
        is_half = torch.get_autocast_dtype("cpu") == torch.float16
        return first * (overflow_at(2)(self.num_seen - 1) if is_half else 1.0), second

    def training_step(self, batch, batch_idx):
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        for loss in self.losses(*batch):
            self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.05) for net in (self.first, self.second)]


class OneAfterTheOther(TwoNets):
    """A step right after each backward pass, two of the second network's."""

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for index, optimizer in enumerate((second, second, first)):
            optimizer.zero_grad()
            self.manual_backward(self.losses(*batch)[index // 2 == 0])
            optimizer.step()


def test_gradients_that_wait_while_another_optimizer_steps_are_unscaled_by_their_own_factor():
    model, by_hand = TwoNets(), TwoNets()
    fit(model, precision=16)
    optimizers, scaler = by_hand.configure_optimizers(), torch.amp.GradScaler("cpu")
    for _, _, (x, y) in batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = by_hand.losses(x, y)
        for loss in losses:
            scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    assert_same_weights(weights_of(model), weights_of(by_hand))


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_an_optimizer_may_step_several_times_in_a_batch(precision):
    """Each forward pass takes the weights as they are then, not as autocast has converted them before."""
    is_half = precision == "16-mixed"
    model, by_hand = OneAfterTheOther(), OneAfterTheOther()
    fit(model, precision=precision)
    (first, second), scaler = by_hand.configure_optimizers(), torch.amp.GradScaler("cpu", enabled=is_half)
    for _, _, (x, y) in batches():
        for index, optimizer in enumerate((second, second, first)):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16 if is_half else torch.bfloat16):
                loss = by_hand.losses(x, y)[index // 2 == 0]
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_same_weights(weights_of(model), weights_of(by_hand))


def test_a_schedule_goes_on_through_steps_that_the_scaler_skips():
    """As in Lightning: it follows the steps that are counted. torch's warning of a wrong order would be mistaken."""

    class Scheduled(Net):
        rates = ()

        def training_step(self, batch, batch_idx):
            self.rates = (*self.rates, self.trainer.optimizers[0].param_groups[0]["lr"])
            return super().training_step(batch, batch_idx) * overflow_at(0)(len(self.rates) - 1)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.08)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    model = Scheduled()
    trainer = fit(model, precision=16, max_epochs=1)
    assert model.rates == (0.08, 0.04, 0.02, 0.01, 0.005, 0.0025)
    assert trainer.global_step == 6


class OverflowsOnOneRank(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * 1e38 if self.global_rank == 1 and batch_idx == 2 else loss

    def on_train_end(self):
        rows = [torch.zeros_like(self.net[0].weight) for _ in range(2)]
        torch.distributed.all_gather(rows, self.net[0].weight.detach())
        self.is_alike = torch.equal(*rows)


class OverflowsByHand(OverflowsOnOneRank):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


@pytest.mark.parametrize("kind", [OverflowsOnOneRank, OverflowsByHand])
def test_all_ranks_skip_a_step_in_which_one_of_them_overflows(kind):
    model = kind()
    fit(model, precision=16, num_workers=2)
    assert model.is_alike
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore:checkpoints go to")
def test_a_resumed_run_has_the_scale_that_it_had(tmp_path):
    class Overflows(Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * 1e38 if self.trainer.global_step in (1, 3) else loss

    whole, again = Overflows(), Overflows()
    saving = {"enable_checkpointing": True, "precision": 16}
    half = pl.ModelCheckpoint(dirpath=tmp_path / "half", every_n_train_steps=4, save_top_k=-1)
    fit(whole, callbacks=[half, pl.ModelCheckpoint(dirpath=tmp_path / "end")], **saving)
    middle = next((tmp_path / "half").glob("*step=4.ckpt"))
    end = pl.ModelCheckpoint(dirpath=tmp_path / "again")
    fit(again, callbacks=[end], ckpt_path=middle, **saving)
    assert_same_weights(weights_of(again), weights_of(whole))
    saved = torch.load(end.best_model_path, weights_only=True)
    assert saved["MixedPrecision"]["scale"] == 2.0**14


@pytest.mark.parametrize("factor", [1.0, 1e38])
def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_halved(factor, tmp_path):
    class Overflowing(Net):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                self.before = self.net[0].weight.detach().clone()
            elif self.trainer.global_step == 4:
                self.is_unmoved = torch.equal(self.net[0].weight, self.before)
            loss = super().training_step(batch, batch_idx) * 0.01
            return loss * (factor if self.trainer.global_step == 3 else 1.0)

    model = Overflowing()
    checkpointing = pl.ModelCheckpoint(dirpath=tmp_path)
    fit(model, precision=16, enable_checkpointing=True, callbacks=[checkpointing])
    assert model.is_unmoved == (factor > 1)
    saved = torch.load(checkpointing.best_model_path, weights_only=True)
    assert saved["MixedPrecision"]["scale"] == (2.0**15 if factor > 1 else 2.0**16)


@pytest.mark.parametrize(
    ("precision", "dtype"), [(64, torch.float64), ("64-true", torch.float64), ("bf16-true", torch.bfloat16)]
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_true_precision_holds_for_weights_batches_and_new_tensors(precision, dtype, num_workers):
    model = Net()
    by_hand = copy.deepcopy(model).to(dtype)
    optimizer = by_hand.configure_optimizers()
    for _, _, (x, y) in batches():
        optimizer.zero_grad()
        functional.mse_loss(by_hand.net(x.to(dtype)), y.to(dtype)).backward()
        optimizer.step()
    fit(model, precision=precision, num_workers=num_workers)
    exact = num_workers == 0
    tolerance = {} if exact else {"rtol": 1e-6, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.02}
    assert_same_weights(weights_of(model), weights_of(by_hand), **tolerance)
    assert model.seen == {(dtype, dtype, dtype, dtype)}
    assert torch.get_default_dtype() == torch.float32


def test_16_true_trains_in_half_precision():
    model = Net()
    fit(model, precision="16-true", max_epochs=1)
    assert model.seen == {(torch.float16,) * 4}
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_32_is_what_it_is_without_the_argument():
    model, other = Net(), Net()
    fit(model, precision="32-true")
    fit(other)
    assert_same_weights(weights_of(model), weights_of(other))


def test_evaluation_runs_in_the_same_precision(quiet):
    class Types(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("bits", float(torch.finfo(self(batch[0]).dtype).bits))

    (result,) = pl.validate(
        Types(), torch.utils.data.DataLoader(make_data(), batch_size=8), precision="bf16-mixed", num_workers=0, **quiet
    )
    assert result == {"bits": 16.0}


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("64-true", torch.float64),
        ("16-mixed", torch.float16),
        ("bf16-mixed", torch.bfloat16),
        ("16-true", torch.float16),
        ("bf16-true", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 2])
def test_predictions_come_in_the_runs_precision(precision, dtype, num_workers, quiet):
    loader = torch.utils.data.DataLoader(make_data(8), batch_size=4)
    outputs = pl.predict(Regression(), loader, precision=precision, num_workers=num_workers, **quiet)
    assert [output.dtype for output in outputs] == [dtype, dtype]


def test_an_unknown_precision_names_the_known_ones():
    with pytest.raises(pl.ConfigError, match="precision='fp8': must be one of 32, 64, 16, bf16"):
        pl.Trainer(precision="fp8")


def test_lbfgs_with_a_gradient_scaler_is_refused():
    class Module(Net):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(pl.ConfigError, match="gradient scaler"):
        fit(Module(), precision=16)

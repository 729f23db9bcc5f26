"""Optimization as the quick-start page and its details have it: each kind against the loop that a user would write."""

import copy
import math

import pytest
import torch
from models import Regression, assert_same_weights, batches, fit, make_data, train_by_hand, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


# What configure_optimizers may return


FORMS = {
    "an optimizer": lambda optimizer, scheduler: optimizer,
    "a list": lambda optimizer, scheduler: [optimizer],
    "a tuple": lambda optimizer, scheduler: (optimizer,),
    "two lists": lambda optimizer, scheduler: ([optimizer], [scheduler]),
    "two lists with a dict": lambda optimizer, scheduler: ([optimizer], [{"scheduler": scheduler, "interval": "step"}]),
    "a dict": lambda optimizer, scheduler: {"optimizer": optimizer},
    "a dict with a scheduler": lambda optimizer, scheduler: {"optimizer": optimizer, "lr_scheduler": scheduler},
    "a dict with a dict": lambda optimizer, scheduler: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 2},
    },
}
NUM_SCHEDULER_STEPS = {
    "two lists": 2,
    "two lists with a dict": 12,
    "a dict with a scheduler": 2,
    "a dict with a dict": 6,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_one_optimizer_trains_the_same(form):
    class Module(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            # A factor of 1 leaves the numbers alone; how often it steps is counted.
            self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
            return FORMS[form](optimizer, self.schedule)

        def on_train_end(self):
            self.num_scheduler_steps = self.schedule.last_epoch

    model, by_hand = Module(), Regression()
    by_hand.load_state_dict(model.state_dict())
    trainer = fit(model)
    train_by_hand(by_hand, make_data(48), batch_size=8, num_epochs=2, seed=5)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert trainer.global_step == 12
    assert model.num_scheduler_steps == NUM_SCHEDULER_STEPS.get(form, 0)


def test_a_scheduler_changes_the_rate_as_by_hand():
    class Module(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)]

    model = Module()
    by_hand = copy.deepcopy(model)
    fit(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for epoch, _, (x, y) in batches():
        optimizer.param_groups[0]["lr"] = 0.1 * 0.1**epoch
        optimizer.zero_grad()
        functional.mse_loss(by_hand(x), y).backward()
        optimizer.step()
    # The scheduler multiplies, this loop raises to a power: equal to rounding.
    assert_same_weights(weights_of(model), weights_of(by_hand), rtol=1e-6, atol=1e-8)


def test_no_optimizer_runs_the_loop_and_says_so():
    class Module(Regression):
        def configure_optimizers(self):
            return None

    model = Module()
    before = weights_of(model)
    with pytest.warns(UserWarning, match="nothing optimizes"):
        fit(model)
    assert len(model.losses) == 12
    assert_same_weights(weights_of(model), before)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda own: "adam", "returned str"),
        (lambda own: [own.parameters()], "return an optimizer"),
        (lambda own: {"optimiser": None}, "must have 'optimizer'"),
        (lambda own: ([torch.optim.SGD(own.parameters(), 0.1)], [{"schedule": 1}]), "must have 'scheduler'"),
        (
            lambda own: {
                "optimizer": (optimizer := torch.optim.SGD(own.parameters(), 0.1)),
                "lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
            },
            "needs a metric",
        ),
    ],
)
def test_a_wrong_answer_of_configure_optimizers_names_the_right_ones(answer, words):
    class Module(Regression):
        def configure_optimizers(self):
            return answer(self)

    with pytest.raises((pl.ModuleError, pl.ConfigError), match=words):
        fit(Module())


def test_a_plateau_scheduler_follows_the_validation():
    class Module(Regression):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", float(self.current_epoch))  # ever worse

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": plateau, "monitor": "val_loss"}

        def on_train_epoch_start(self):
            self.losses.append(self.optimizers().param_groups[0]["lr"])

        def training_step(self, batch, batch_idx):
            return None

    model = Module()
    data = make_data()
    trainer = pl.Trainer(
        num_workers=0, max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(data, batch_size=8), DataLoader(data, batch_size=8))
    assert model.losses == [1.0, 1.0, 0.5, 0.25]


def test_a_plateau_scheduler_without_its_metric_is_an_error_that_lists_those_there_are():
    class Module(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_los"}}

    with pytest.raises(pl.ConfigError, match=r"'val_los', which is not logged; there are: \['train_loss'\]"):
        fit(Module())


def test_lr_scheduler_step_may_be_overridden():
    class Module(Regression):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)]

        def lr_scheduler_step(self, scheduler, metric):
            self.losses.append((type(scheduler).__name__, metric))
            scheduler.step()

    model = Module()
    fit(model)
    assert [entry for entry in model.losses if isinstance(entry, tuple)] == [("StepLR", None)] * 2


# Several optimizers


class Pair(pl.LightningModule):
    """Two networks against each other, each with an optimizer of its own, in the way of a GAN."""

    frequencies = (None, None)

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(3, 3)
        self.seen = []

    def loss(self, batch, optimizer_idx):
        x, y = batch
        out = self.right(torch.tanh(self.left(x)))
        return functional.mse_loss(out, y) if optimizer_idx == 0 else (out - 0.5).pow(2).mean()

    def training_step(self, batch, batch_idx, optimizer_idx):
        trained = [name for name, parameter in self.named_parameters() if parameter.requires_grad]
        self.seen.append((batch_idx, optimizer_idx, sorted({name.split(".")[0] for name in trained})))
        return self.loss(batch, optimizer_idx)

    def configure_optimizers(self):
        left = torch.optim.SGD(self.left.parameters(), lr=0.1)
        right = torch.optim.Adam(self.right.parameters(), lr=0.01)
        if self.frequencies == (None, None):
            return [left, right]
        return (
            {"optimizer": left, "frequency": self.frequencies[0]},
            {"optimizer": right, "frequency": self.frequencies[1]},
        )


def pair_by_hand(model, turns, *, accumulate=1, **shape):
    """`turns(index of the batch in all)`: the optimizers that are used for it."""
    optimizers = model.configure_optimizers()
    if isinstance(optimizers, tuple):
        optimizers = [entry["optimizer"] for entry in optimizers]
    networks = [model.left, model.right]
    for count, (_, batch_idx, batch) in enumerate(batches(**shape)):
        for index in turns(count):
            networks[1 - index].requires_grad_(False)
            (model.loss(batch, index) / accumulate).backward()
            networks[1 - index].requires_grad_(True)
            if (batch_idx + 1) % accumulate == 0:
                optimizers[index].step()
                optimizers[index].zero_grad()
    return model


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_several_optimizers_take_turns_on_each_batch(num_workers):
    model = Pair()
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0, 1))
    trainer = fit(model, num_workers=num_workers)
    assert_same_weights(weights_of(model), weights_of(by_hand), **(TOLERANCE if num_workers == 2 else {}))
    assert model.seen[:2] == [(0, 0, ["left"]), (0, 1, ["right"])]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert trainer.global_step == 24  # of all optimizers


def test_several_optimizers_accumulate_each_for_itself():
    model = Pair()
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0, 1), accumulate=3)
    trainer = fit(model, accumulate_grad_batches=3)
    assert_same_weights(weights_of(model), weights_of(by_hand), rtol=1e-6, atol=1e-8)
    assert trainer.global_step == 8


def test_a_frequency_gives_each_optimizer_some_batches_in_turn():
    model = Pair()
    model.frequencies = (3, 1)
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0,) if count % 4 < 3 else (1,))
    trainer = fit(model)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert [entry[1] for entry in model.seen] == [0, 0, 0, 1] * 3  # counted across epochs
    assert trainer.global_step == 12


def test_a_frequency_counts_on_where_a_resumed_run_was(tmp_path):
    whole, part = Pair(), Pair()
    whole.frequencies = part.frequencies = (3, 2)
    fit(whole, max_epochs=3)
    checkpointing = pl.ModelCheckpoint(dirpath=tmp_path, save_top_k=-1)
    fit(part, max_epochs=2, enable_checkpointing=True, callbacks=[checkpointing])
    resumed = Pair()
    resumed.frequencies = (3, 2)
    loader = DataLoader(make_data(48), batch_size=8, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(num_workers=0, max_epochs=3, **quiet)
    trainer.fit(resumed, loader, ckpt_path=checkpointing.best_model_path)
    assert_same_weights(weights_of(resumed), weights_of(whole))


def test_schedulers_of_several_optimizers_step_with_their_own():
    class Module(Pair):
        def configure_optimizers(self):
            optimizers = super().configure_optimizers()
            self.schedulers = [
                torch.optim.lr_scheduler.LambdaLR(entry["optimizer"], lambda epoch: 1.0) for entry in optimizers
            ]
            return tuple(
                {**entry, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
                for entry, scheduler in zip(optimizers, self.schedulers, strict=True)
            )

        def on_train_end(self):
            self.counts = [scheduler.last_epoch for scheduler in self.schedulers]

    model = Module()
    model.frequencies = (2, 1)
    fit(model)
    assert model.counts == [8, 4]


def test_several_optimizers_need_a_step_that_takes_the_index():
    class Module(Pair):
        def training_step(self, batch, batch_idx):
            return self.loss(batch, 0)

    with pytest.raises(pl.ModuleError, match=r"must take \(batch, batch_idx, optimizer_idx\)"):
        fit(Module())


# Manual optimization


class ManualPair(Pair):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        self.log("train_loss", loss)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_manual_optimization_is_the_users_own_loop(num_workers):
    model = ManualPair()
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0, 1))
    trainer = fit(model, num_workers=num_workers)
    assert_same_weights(weights_of(model), weights_of(by_hand), **(TOLERANCE if num_workers == 2 else {}))
    assert trainer.global_step == 24


def test_a_with_block_toggles_like_the_two_calls():
    class Block(ManualPair):
        def training_step(self, batch, batch_idx):
            for index, optimizer in enumerate(self.optimizers()):
                with self.toggled_optimizer(optimizer):
                    self.frozen = [name for name, weight in self.named_parameters() if not weight.requires_grad]
                    self.manual_backward(self.loss(batch, index))
                    optimizer.step()
                    optimizer.zero_grad()

    model = Block()
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0, 1))
    fit(model)
    assert_same_weights(weights_of(model), weights_of(by_hand))
    assert model.frozen != []
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("num_samples", [50, 49])
@pytest.mark.parametrize("kind", [Pair, ManualPair])
def test_an_uneven_last_batch_counts_every_sample_alike(kind, num_samples):
    """Of 49 samples one is left for two workers: a rank without a batch follows the steps of the other."""
    model = kind()
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0, 1), num_samples=num_samples)
    trainer = fit(model, num_workers=2, num_samples=num_samples)
    assert_same_weights(weights_of(model), weights_of(by_hand), **TOLERANCE)
    assert trainer.global_step == 28


def test_in_manual_optimization_gradients_are_whole_before_the_module_clips_them():
    class Clipping(ManualPair):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[0]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, 0))
            if batch_idx % 2:
                self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")
            else:
                nn.utils.clip_grad_norm_(self.left.parameters(), 0.01)
            optimizer.step()

    model = Clipping()
    by_hand = copy.deepcopy(model)
    optimizer = by_hand.configure_optimizers()[0]
    for _, _, batch in batches():
        by_hand.right.requires_grad_(False)
        optimizer.zero_grad()
        by_hand.loss(batch, 0).backward()
        nn.utils.clip_grad_norm_(by_hand.left.parameters(), 0.01)
        optimizer.step()
    by_hand.right.requires_grad_(True)
    fit(model, num_workers=2)
    assert_same_weights(weights_of(model), weights_of(by_hand), **TOLERANCE)


def test_manual_accumulation_under_toggle_model_without_sync():
    class Accumulating(ManualPair):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[0]
            is_last = batch_idx % 2 == 1
            with optimizer.toggle_model(sync_grad=is_last):
                self.manual_backward(self.loss(batch, 0) / 2)
                if is_last:
                    optimizer.step()
                    optimizer.zero_grad()

    model = Accumulating()
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0,), accumulate=2)
    trainer = fit(model, num_workers=2)
    assert_same_weights(weights_of(model), weights_of(by_hand), **TOLERANCE)
    assert trainer.global_step == 6


def test_backward_passes_that_bypass_manual_backward_are_averaged_by_the_step():
    class Direct(ManualPair):
        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()[0]
            optimizer.zero_grad()
            self.loss(batch, 0).backward()
            optimizer.step()

    model = Direct()
    by_hand = pair_by_hand(copy.deepcopy(model), lambda count: (0,))
    fit(model, num_workers=2)
    assert_same_weights(weights_of(model), weights_of(by_hand), **TOLERANCE)


def test_the_handle_of_an_optimizer_is_that_optimizer_for_everybody_else():
    class Module(ManualPair):
        def training_step(self, batch, batch_idx):
            handle = self.optimizers()[1]
            raw = self.optimizers(use_pl_optimizer=False)[1]
            self.facts = [
                isinstance(handle, torch.optim.Adam),
                isinstance(handle, torch.optim.Optimizer),
                handle.optimizer is raw,
                handle.param_groups is raw.param_groups,
                list(handle.state_dict()) == list(raw.state_dict()),
            ]

    model = Module()
    fit(model, limit_train_batches=1, max_epochs=1)
    assert model.facts == [True] * 5


def test_schedulers_of_a_manual_module_are_its_own_to_step():
    class Module(ManualPair):
        def configure_optimizers(self):
            left, right = super().configure_optimizers()
            return [left, right], [torch.optim.lr_scheduler.StepLR(left, step_size=1)]

        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            if self.trainer.num_training_batches == batch_idx + 1:
                self.seen.append(self.lr_schedulers().last_epoch)
                self.lr_schedulers().step()

    model = Module()
    fit(model)
    assert model.seen == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"accumulate_grad_batches": 2}, "accumulate"), ({"gradient_clip_val": 1.0}, "clip_gradients")],
)
def test_what_only_automatic_optimization_can_do_is_refused_before_a_worker_starts(arguments, words):
    with pytest.raises(pl.ConfigError, match=words):
        fit(ManualPair(), num_workers=2, **arguments)


def test_manual_backward_in_automatic_optimization_is_an_error():
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

    with pytest.raises(pl.ConfigError, match="automatic_optimization = False"):
        fit(Module())


# Hooks of the optimization


def test_overridden_hooks_are_called_in_order_with_what_lightning_gives_them():
    class Module(Regression):
        def __init__(self):
            super().__init__()
            self.calls = []

        def training_step(self, batch, batch_idx):
            self.calls.append("training_step")
            return super().training_step(batch, batch_idx)

        def backward(self, loss):
            self.calls.append("backward")
            super().backward(loss)

        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            self.calls.append(("optimizer_step", epoch, batch_idx, isinstance(optimizer, torch.optim.SGD)))
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            self.calls.append(("optimizer_zero_grad", epoch, batch_idx))
            optimizer.zero_grad(set_to_none=False)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.calls.append(("configure_gradient_clipping", gradient_clip_val, gradient_clip_algorithm))
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

        def on_before_zero_grad(self, optimizer):
            self.calls.append("on_before_zero_grad")

        def on_before_backward(self, loss):
            self.calls.append("on_before_backward")

        def on_after_backward(self):
            self.calls.append("on_after_backward")

        def on_before_optimizer_step(self, optimizer):
            self.calls.append("on_before_optimizer_step")

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.calls.append(("on_train_batch_end", sorted(outputs)))

    model = Module()
    fit(model, limit_train_batches=2, max_epochs=1, gradient_clip_val=0.5)
    assert model.calls == [
        call
        for batch_idx in range(2)
        for call in [
            ("optimizer_step", 0, batch_idx, True),
            "training_step",
            "on_before_zero_grad",
            ("optimizer_zero_grad", 0, batch_idx),
            "on_before_backward",
            "backward",
            "on_after_backward",
            ("configure_gradient_clipping", 0.5, "norm"),
            "on_before_optimizer_step",
            ("on_train_batch_end", ["loss"]),
        ]
    ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_overridden_optimizer_step_gives_the_same_numbers(num_workers):
    class WarmUp(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * min(1.0, (self.trainer.global_step + 1) / 5)
            optimizer.step(closure=optimizer_closure)

    model = WarmUp()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for count, (_, _, (x, y)) in enumerate(batches(num_samples=49)):
        optimizer.param_groups[0]["lr"] = 0.05 * min(1.0, (count + 1) / 5)
        optimizer.zero_grad()
        functional.mse_loss(by_hand(x), y).backward()
        optimizer.step()
    trainer = fit(model, num_workers=num_workers, num_samples=49)
    assert_same_weights(weights_of(model), weights_of(by_hand), **(TOLERANCE if num_workers else {}))
    assert trainer.global_step == 14


def test_a_step_may_be_left_out_by_the_module():
    class EverySecond(Regression):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            if batch_idx % 2:
                optimizer.step(closure=optimizer_closure)
            else:
                optimizer_closure()

    model = EverySecond()
    trainer = fit(model)
    assert trainer.global_step == 6
    assert len(model.losses) == 12


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_optimizer_that_needs_a_closure_gets_one(num_workers):
    """In float64: a line search multiplies what rounding makes of two workers' losses."""

    class Module(Regression):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")

    model = Module()
    by_hand = copy.deepcopy(model).double()
    optimizer = by_hand.configure_optimizers()
    for _, _, batch in batches(num_samples=49):
        x, y = (tensor.double() for tensor in batch)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = functional.mse_loss(by_hand(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    trainer = fit(model, num_workers=num_workers, num_samples=49, precision=64)
    assert_same_weights(weights_of(model), weights_of(by_hand), rtol=1e-5, atol=1e-7)
    assert trainer.global_step == 14


def test_an_optimizer_of_the_users_own_may_use_the_closure():
    class Twice(torch.optim.SGD):
        """Evaluates the loss before and after its step."""

        def step(self, closure=None):
            first = closure()
            super().step()
            assert closure() < first
            return first

    class Module(Regression):
        def configure_optimizers(self):
            return Twice(self.parameters(), lr=0.01)

    model = Module()
    fit(model)
    assert len(model.losses) == 24


def test_accumulating_for_an_optimizer_that_evaluates_the_loss_is_refused():
    class Module(Regression):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(pl.ConfigError, match="accumulate_grad_batches=2 with LBFGS"):
        fit(Module(), accumulate_grad_batches=2)


# Accumulation, clipping, norms


@pytest.mark.parametrize("num_workers", [0, 2])
def test_accumulation_follows_its_schedule(num_workers):
    model = Regression()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    windows = {0: 1, 1: 4, 2: 2}
    num_steps = 0
    for epoch, batch_idx, (x, y) in batches(epochs=3):
        (functional.mse_loss(by_hand(x), y) / windows[epoch]).backward()
        if (batch_idx + 1) % windows[epoch] == 0 or batch_idx == 5:
            optimizer.step()
            optimizer.zero_grad()
            num_steps += 1
    trainer = fit(model, num_workers=num_workers, max_epochs=3, accumulate_grad_batches={1: 4, 2: 2})
    assert_same_weights(
        weights_of(model), weights_of(by_hand), **(TOLERANCE if num_workers else {"rtol": 1e-6, "atol": 1e-8})
    )
    assert trainer.global_step == num_steps == 6 + 2 + 3


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_gradients_are_clipped_as_by_hand(num_workers, algorithm):
    model = Regression()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    clip = nn.utils.clip_grad_norm_ if algorithm == "norm" else nn.utils.clip_grad_value_
    for _, _, (x, y) in batches():
        optimizer.zero_grad()
        functional.mse_loss(by_hand(x), y).backward()
        clip(by_hand.parameters(), 0.02)
        optimizer.step()
    fit(model, num_workers=num_workers, gradient_clip_val=0.02, gradient_clip_algorithm=algorithm)
    assert_same_weights(weights_of(model), weights_of(by_hand), **(TOLERANCE if num_workers else {}))


@pytest.mark.parametrize("order", [1, 2, "inf"])
def test_gradient_norms_are_logged_per_layer_and_in_total(order, tmp_path):
    class Module(Regression):
        def on_before_optimizer_step(self, optimizer):
            self.gradients = {name: p.grad.clone() for name, p in self.named_parameters()}

    model = Module()
    trainer = fit(
        model,
        track_grad_norm=order,
        log_every_n_steps=1,
        max_epochs=1,
        limit_train_batches=1,
        logger=pl.CSVLogger(tmp_path),
    )
    norm = float(order)
    total = torch.linalg.vector_norm(torch.cat([g.flatten() for g in model.gradients.values()]), norm)
    assert trainer.logged_metrics[f"grad_{norm}_norm_total"].item() == pytest.approx(total.item())
    for name, gradient in model.gradients.items():
        expected = torch.linalg.vector_norm(gradient, norm).item()
        assert trainer.logged_metrics[f"grad_{norm}_norm/{name}"].item() == pytest.approx(expected)


# Truncated back-propagation


class Recurrent(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.cell, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 1)
        self.lengths = []

    def training_step(self, batch, batch_idx, hiddens):
        x, y = batch
        self.lengths.append(x.shape[1])
        out, hiddens = self.cell(x, hiddens)
        loss = functional.mse_loss(self.head(out), y)
        return {"loss": loss, "hiddens": hiddens}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def sequences(num_samples=16, num_steps=10):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, num_steps, 2, generator=generator)
    return TensorDataset(x, x.cumsum(1).sum(2, keepdim=True))


def recurrent_by_hand(model, data, *, length, epochs=2):
    optimizer = model.configure_optimizers()
    for _, _, (x, y) in batches(data=data, epochs=epochs):
        hiddens = None
        for start in range(0, x.shape[1], length):
            steps = slice(start, start + length)
            out, hiddens = model.cell(x[:, steps], hiddens)
            loss = functional.mse_loss(model.head(out), y[:, steps])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hiddens = tuple(hidden.detach() for hidden in hiddens)
    return model


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("num_samples", [16, 17])
def test_sequences_are_trained_in_pieces_that_hand_their_state_on(num_workers, num_samples):
    model, data = Recurrent(), sequences(num_samples)
    by_hand = recurrent_by_hand(copy.deepcopy(model), data, length=4)
    trainer = fit(model, num_workers=num_workers, data=data, truncated_bptt_steps=4)
    assert_same_weights(weights_of(model), weights_of(by_hand), **(TOLERANCE if num_workers else {}))
    num_batches = math.ceil(num_samples / 8)
    assert trainer.global_step == 2 * 3 * num_batches
    assert model.lengths[:3] == [4, 4, 2]


def test_the_length_of_the_pieces_may_stand_in_the_module():
    model = Recurrent()
    model.truncated_bptt_steps = 5
    trainer = fit(model, data=sequences())
    assert trainer.global_step == 2 * 2 * 2


def test_workers_whose_sequences_differ_in_length_wait_for_nobody():
    """Batches are padded to their longest: one worker may have more pieces than the other."""

    class Ragged(torch.utils.data.Dataset):
        lengths = (12, 3, 4, 12, 8, 8, 2, 11)

        def __len__(self):
            return len(self.lengths)

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            x = torch.randn(self.lengths[index], 2, generator=generator)
            return x, x.cumsum(0).sum(1, keepdim=True)

    model = Recurrent()
    trainer = fit(model, num_workers=2, batch_size=2, data=Ragged(), truncated_bptt_steps=4, max_epochs=1)
    assert trainer.global_step > 4
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_split_of_the_modules_own_replaces_that_along_time():
    class Module(Recurrent):
        def tbptt_split_batch(self, batch, split_size):
            x, y = batch
            return [(x[:, :7], y[:, :7]), (x[:, 7:], y[:, 7:])]

    model = Module()
    fit(model, data=sequences(), truncated_bptt_steps=4, max_epochs=1)
    assert model.lengths == [7, 3] * 2


def test_truncation_of_a_batch_without_time_says_what_to_override():
    with pytest.raises(pl.ModuleError, match="override tbptt_split_batch"):
        fit(
            Recurrent(),
            data=TensorDataset(torch.zeros(8), torch.zeros(8)),
            truncated_bptt_steps=4,
        )


def test_truncation_needs_a_step_that_takes_the_hiddens():
    with pytest.raises(pl.ModuleError, match=r"must take \(batch, batch_idx, hiddens\)"):
        fit(Regression(), truncated_bptt_steps=4)


# Skipped batches, unused parameters, frozen parts


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_that_the_step_skips_moves_no_weight(num_workers):
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    model = Module()
    by_hand = copy.deepcopy(model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for _, batch_idx, (x, y) in batches():
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
            functional.mse_loss(by_hand(x), y).backward()
            optimizer.step()
    fit(model, num_workers=num_workers)
    assert_same_weights(weights_of(model), weights_of(by_hand), **(TOLERANCE if num_workers else {}))


def test_a_batch_that_one_worker_skips_hangs_nobody():
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.global_rank == 1 and batch_idx == 2 else loss

    model = Module()
    trainer = fit(model, num_workers=2)
    assert trainer.global_step == 12


class WithUnused(Regression):
    def __init__(self, only_rank=None):
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.only_rank = only_rank

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.only_rank is not None and self.global_rank != self.only_rank:
            loss = loss + 0.0 * self.spare(torch.ones(1, 2)).sum()
        return loss


@pytest.mark.parametrize("only_rank", [None, 0, 1])
def test_a_parameter_that_the_loss_does_not_depend_on_is_named_with_the_switch(only_rank):
    with pytest.raises(pl.ModuleError, match=r"spare\.weight, spare\.bias.*ddp_find_unused_parameters_true"):
        fit(WithUnused(only_rank), num_workers=2, max_epochs=1, strategy="ddp")


@pytest.mark.parametrize("result", ["tensor", "dict", "TrainResult"])
def test_with_the_switch_unused_parameters_are_left_alone(result):
    class Module(WithUnused):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return {"tensor": loss, "dict": {"loss": loss}, "TrainResult": None}[result] or pl.TrainResult(loss)

    model = Module()
    by_hand = Regression()
    by_hand.load_state_dict({k: v for k, v in model.state_dict().items() if "spare" not in k})
    spare = model.spare.weight.detach().clone()
    fit(model, num_workers=2, strategy="ddp_find_unused_parameters_true")
    train_by_hand(by_hand, make_data(48), batch_size=8, num_epochs=2, seed=5)
    trained = {k: v for k, v in weights_of(model).items() if "spare" not in k}
    assert_same_weights(trained, weights_of(by_hand), **TOLERANCE)
    assert torch.equal(model.spare.weight, spare)


def test_what_is_thawed_between_epochs_is_synced_from_then_on():
    class Module(Regression):
        def setup(self, stage):
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch > 0)

        def on_train_end(self):
            rows = [torch.zeros_like(self.net[0].weight) for _ in range(2)]
            torch.distributed.all_gather(rows, self.net[0].weight.detach())
            self.is_alike = torch.equal(*rows)

    model = Module()
    before = model.net[0].weight.detach().clone()
    fit(model, num_workers=2)
    assert model.is_alike
    assert not torch.equal(model.net[0].weight, before)


# Losses that are not finite


def test_terminate_on_nan_names_the_batch():
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 2 else loss

    with pytest.raises(pl.NotFiniteError, match="nan in batch 2"):
        fit(Module(), terminate_on_nan=True)


def test_terminate_on_nan_looks_at_the_weights_too():
    class Module(Regression):
        def on_after_backward(self):
            self.net[3].bias.grad.fill_(math.inf)

    with pytest.raises(pl.NotFiniteError, match=r"net\.3\.bias is not finite after step 1"):
        fit(Module(), terminate_on_nan=True)


def test_detect_anomaly_shows_the_forward_pass_of_a_bad_gradient():
    class Module(Regression):
        def training_step(self, batch, batch_idx):
            return (self(batch[0]) * 0.0).sqrt().sum()

    with (
        pytest.raises(RuntimeError, match="returned nan values"),
        pytest.warns(UserWarning, match="Traceback of forward call"),
    ):
        fit(Module(), detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


# Batch norm over all workers


class Normed(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch, batch_idx):
        return functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


@pytest.mark.parametrize("num_samples", [48, 50, 51])
def test_synced_batch_norm_equals_one_process_with_the_whole_batch(num_samples):
    """Of 51 samples three are left for two workers."""
    model = Normed()
    by_hand = copy.deepcopy(model)
    optimizer = by_hand.configure_optimizers()
    for _, _, (x, y) in batches(num_samples=num_samples):
        optimizer.zero_grad()
        functional.mse_loss(by_hand.net(x), y).backward()
        optimizer.step()
    fit(model, num_workers=2, num_samples=num_samples, sync_batchnorm=True)
    assert_same_weights(weights_of(model), weights_of(by_hand), rtol=1e-3, atol=1e-5)
    assert type(model.net[1]) is nn.BatchNorm1d

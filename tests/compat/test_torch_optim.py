"""Steps without the profiler's annotation do what torch's own do, for whoever listens too."""

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _use_grad_for_differentiable,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.profiler import profile

from raylit.compat.torch_optim import build_step, build_zero_grad


def network_and_optimizer(kind=torch.optim.Adam):
    torch.manual_seed(0)
    network = torch.nn.Linear(3, 1)
    return network, kind(network.parameters(), lr=0.1)


def backward(network):
    network(torch.ones(2, 3)).square().mean().backward()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_weights_are_those_of_the_ordinary_calls(kind):
    ordinary, its_optimizer = network_and_optimizer(kind)
    network, optimizer = network_and_optimizer(kind)
    step, zero_grad = build_step(optimizer), build_zero_grad(optimizer)
    for _ in range(3):
        its_optimizer.zero_grad()
        zero_grad()
        assert network.weight.grad is None
        backward(ordinary)
        backward(network)
        its_optimizer.step()
        step()
    assert torch.equal(network.weight, ordinary.weight)


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
        lambda optimizer, hook: optimizer.register_step_post_hook(hook),
        lambda optimizer, hook: register_optimizer_step_pre_hook(hook),
        lambda optimizer, hook: register_optimizer_step_post_hook(hook),
    ],
    ids=["before", "after", "before any", "after any"],
)
def test_a_hook_that_is_registered_in_the_middle_is_called_until_it_is_removed(register):
    network, optimizer = network_and_optimizer()
    step = build_step(optimizer)
    backward(network)
    step()
    calls = []
    handle = register(optimizer, lambda *_: calls.append(1))
    step()
    step()
    handle.remove()
    step()
    assert len(calls) == 2


def test_a_scheduler_that_comes_later_counts_the_steps():
    network, optimizer = network_and_optimizer()
    step = build_step(optimizer)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backward(network)
    step()
    assert optimizer._opt_called


def test_a_profiler_sees_the_annotations():
    network, optimizer = network_and_optimizer()
    step, zero_grad = build_step(optimizer), build_zero_grad(optimizer)
    with profile() as profiler:
        backward(network)
        step()
        zero_grad()
    names = {event.key for event in profiler.key_averages()}
    assert {"Optimizer.step#Adam.step", "Optimizer.zero_grad#Adam.zero_grad"} <= names


def test_the_annotation_is_left_out():
    network, optimizer = network_and_optimizer()
    step, zero_grad = build_step(optimizer), build_zero_grad(optimizer)
    backward(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.profiler, "record_function", None)
        step()
        zero_grad()
        with pytest.raises(TypeError):
            optimizer.step()


class Watching(torch.optim.SGD):
    """Notes whether gradients are on in its step."""

    seen: list[bool]

    @_use_grad_for_differentiable
    def step(self, closure=None):
        self.seen = [*getattr(self, "seen", []), torch.is_grad_enabled()]


class Halving(Optimizer):
    """A user's own, with its own zero_grad."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.num_zeroed = 0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.5)

    def zero_grad(self, set_to_none=True):
        self.num_zeroed += 1
        super().zero_grad(set_to_none)


def test_a_fit_and_its_checkpoint_leave_the_compiler_out_until_it_is_asked_for(run_script):
    script = """
        import sys
        import torch
        import raylit as pl

        class Model(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(2, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).square().mean()

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters())

        loader = torch.utils.data.DataLoader(torch.ones(4, 2))
        for ckpt_path in (None, "last"):
            saving = pl.ModelCheckpoint(save_last=True)
            trainer = pl.Trainer(num_workers=0, max_epochs=2, logger=False, callbacks=[saving])
            trainer.fit(Model(), loader, ckpt_path=ckpt_path)
        print("compiler:", "torch._dynamo" in sys.modules)
        torch.optim.SGD(torch.nn.Linear(1, 1).parameters()).state_dict()
        print("asked for:", "torch._dynamo" in sys.modules)
    """
    printed = run_script(script)
    assert "compiler: False" in printed
    assert "asked for: True" in printed


def test_gradients_are_off_in_a_step_and_as_before_after_it():
    network, optimizer = network_and_optimizer(Watching)
    step = build_step(optimizer)
    backward(network)
    step()
    with torch.no_grad():
        step()
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert optimizer.seen == [False, False]


def test_a_users_own_optimizer_is_asked_itself():
    network, optimizer = network_and_optimizer(Halving)
    before = network.weight.detach().clone()
    build_step(optimizer)()
    build_zero_grad(optimizer)()
    assert torch.equal(network.weight, before / 2)
    assert optimizer.num_zeroed == 1

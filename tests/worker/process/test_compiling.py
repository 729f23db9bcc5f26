"""Trainer(compile=...): what is compiled, the numbers it gives, and what is said where it does not go well.

With backends that need no C++ compiler; the default one is in a slow test.
"""

import copy
import textwrap

import pytest
import torch
from models import Regression, assert_same_weights, fit, make_data, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


class Counts(Regression):
    """The graphs that its process has compiled since a run's start."""

    def on_train_start(self):
        self.num_before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def on_train_epoch_end(self):
        self.num_graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - self.num_before


class CallsLayers(Counts):
    """Its step calls a layer and not `forward`."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.mse_loss(self.net(x), y)


class HasNoForward(pl.LightningModule):
    on_train_start, on_train_epoch_end = Counts.on_train_start, Counts.on_train_epoch_end

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 3)])
        self.loss = nn.MSELoss()

    def training_step(self, batch, batch_idx):
        x, y = batch
        for layer in self.layers:
            x = layer(x)
        return self.loss(x, y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


# torch's own, of what comes from one compiled part and goes into the next.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("kind", "num_graphs"), [(Counts, 1), (CallsLayers, 1), (HasNoForward, 2)])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_the_step_calls_is_compiled_and_trains_to_the_same_numbers(kind, num_graphs, num_workers):
    model = kind()
    plain = copy.deepcopy(model)
    fit(model, num_workers=num_workers, compile={"backend": "aot_eager"})
    fit(plain, num_workers=num_workers)
    assert model.num_graphs == num_graphs
    assert_same_weights(weights_of(model), weights_of(plain), rtol=1e-5, atol=1e-6)
    assert all(part._compiled_call_impl is None for part in model.modules())


def test_layers_of_the_users_script_find_its_globals():
    """As they arrive on a worker: their scope says that it is `__main__`, which there is another program."""
    scope = {"__name__": "__main__", "nn": nn, "functional": functional}
    source = """
        class Block(nn.Module):
            def forward(self, x):
                return functional.relu(x)
    """
    exec(textwrap.dedent(source), scope)
    model = CallsLayers()
    model.net.append(scope["Block"]())
    plain = copy.deepcopy(model)
    fit(model, compile={"backend": "eager"})
    fit(plain)
    assert model.num_graphs == 1
    assert_same_weights(weights_of(model), weights_of(plain))


def test_what_one_run_has_compiled_does_not_count_in_the_next():
    for _ in range(2):
        model = Counts()
        fit(model, num_workers=2, compile={"backend": "eager"}, max_epochs=1)
        assert model.num_graphs == 1


def test_what_the_user_has_compiled_stays_as_it_is():
    model, seen = Counts(), []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    model.compile(backend=backend)
    call = model._compiled_call_impl
    fit(model, compile={"backend": "aot_eager"}, max_epochs=1)
    assert len(seen) == 1
    assert model._compiled_call_impl is call


def test_evaluation_and_precision_go_through_what_is_compiled(quiet):
    model, loader = Regression(), DataLoader(make_data(20), batch_size=10)
    arguments = {"num_workers": 0, "precision": "bf16-mixed", **quiet}
    (expected,) = pl.test(model, loader, **arguments)
    (compiled,) = pl.test(model, loader, compile={"backend": "aot_eager"}, **arguments)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-3)


class ChangesEachTime(Regression):
    num_calls = 0

    def forward(self, x):
        self.num_calls += 1
        return super().forward(x) * self.num_calls


def test_compiling_again_and_again_is_reported_with_its_reason():
    with pytest.warns(UserWarning, match=r"compiled forward .* again and again, 3 times because of: .*num_calls == 3"):
        fit(ChangesEachTime(), compile={"backend": "eager"}, max_epochs=1)


class CallsWeights(Regression):
    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.mse_loss(functional.linear(x, self.net[0].weight[:3]), y)


def test_a_step_that_calls_nothing_compiled_is_reported():
    with pytest.warns(UserWarning, match=r"compiled nothing: no step calls the module itself \(self\(...\)\)"):
        fit(CallsWeights(), compile={"backend": "eager"}, max_epochs=1)


def test_a_last_batch_of_another_size_is_no_reason_for_a_report():
    fit(Regression(), num_samples=44, compile={"backend": "eager"}, max_epochs=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "compile='yes': must be True, False or a dict"),
        ({"speed": 2}, "torch.compile has no speed; it takes backend, mode"),
        ({"mode": "max-autotune", "options": {}}, None),
        ({"mode": "max-autotune", "options": {"trace.enabled": True}}, "takes a mode or options, not both"),
    ],
)
def test_what_torch_compile_does_not_take_is_refused(given, message):
    if message is None:
        given = {**given, "options": None}
        assert pl.Trainer(compile=given)._plan.optimization.compile_options == given
        return
    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(compile=given)


def test_an_unknown_backend_names_the_known_ones():
    with pytest.raises(pl.ConfigError, match=r"torch has no backend 'turbo' here; it has .*aot_eager"):
        fit(Regression(), compile={"backend": "turbo"})


def test_a_host_without_a_compiler_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(pl.ConfigError, match=r"no 'g\+\+': install one .*aot_eager"):
        fit(Regression(), compile=True)
    fit(Regression(), compile={"backend": "eager"}, max_epochs=1)


@pytest.mark.slow
def test_the_default_backend_compiles_to_the_same_numbers():
    model = Counts()
    plain = copy.deepcopy(model)
    fit(model, compile=True, num_workers=2)
    fit(plain, num_workers=2)
    assert model.num_graphs == 1
    assert_same_weights(weights_of(model), weights_of(plain), rtol=1e-4, atol=1e-5)

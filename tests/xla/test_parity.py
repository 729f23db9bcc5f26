"""Training on XLA gives the weights of a plain loop on the CPU."""

import os
import subprocess
import sys

import pytest
import torch
from xla.xla_models import Alternating, Manual, Regression, fit, max_difference, require_xla, train_by_hand

require_xla()

import torch_xla.runtime as runtime  # noqa: E402

from raylit.compat.xla import is_sharded  # noqa: E402

TOLERANCE = 1e-6


@pytest.mark.parametrize(
    ("optimizer", "arguments", "by_hand"),
    [
        ("adam", {}, {}),
        ("sgd", {"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ("sgd", {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"clip_value": 0.01}),
        ("adam", {"accumulate_grad_batches": 3}, {"accumulate": 3}),
        ("adam", {"strategy": "fsdp"}, {}),
    ],
    ids=["adam", "clip_norm", "clip_value", "accumulate", "fsdp"],
)
def test_four_devices_train_as_a_plain_loop(optimizer, arguments, by_hand):
    torch.manual_seed(1)
    model = Regression(optimizer=optimizer)
    expected = train_by_hand(model, **by_hand)
    fit(model, **arguments)
    assert runtime.global_runtime_device_count() == 4
    assert max_difference(model, expected) < TOLERANCE


@pytest.mark.parametrize("kind", [Alternating, Manual])
def test_several_optimizers_train_as_a_plain_loop(kind):
    model = kind()
    expected = train_by_hand(model)
    fit(model)
    assert max_difference(model, expected) < TOLERANCE


def test_the_users_own_parameters_are_trained_and_stay_tied():
    model = Regression()
    model.net[0] = torch.nn.Linear(8, 8)
    model.net[3] = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    model.net[3][0].weight = model.net[0].weight
    weight, before = model.net[0].weight, model.net[0].weight.detach().clone()
    expected = train_by_hand(model)
    fit(model)
    assert model.net[0].weight is weight is model.net[3][0].weight
    assert weight.device.type == "cpu"
    assert not torch.equal(weight, before)
    assert max_difference(model, expected) < TOLERANCE


class Watched(Regression):
    def on_train_end(self):
        optimizer = self.optimizers()
        self.are_sharded = [is_sharded(parameter) for parameter in self.parameters()]
        self.are_states_sharded = [
            is_sharded(value)
            for state in optimizer.state.values()
            for value in state.values()
            if value.device.type == "xla"
        ]


@pytest.mark.parametrize(("strategy", "are_sharded"), [("auto", []), ("fsdp", [True, True, True, False])])
def test_fsdp_divides_parameters_and_optimizer_states(strategy, are_sharded):
    model = Watched()
    fit(model, strategy=strategy)
    assert [one for one in model.are_sharded if one or are_sharded] == are_sharded
    assert any(model.are_states_sharded) == bool(are_sharded)


def test_bf16_computes_in_bfloat16_and_trains():
    seen = []

    class Mixed(Regression):
        def training_step(self, batch, batch_idx):
            seen.append(self(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

    model = Mixed()
    expected = train_by_hand(model)
    fit(model, precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert TOLERANCE < max_difference(model, expected) < 0.05


@pytest.mark.timeout(300)
def test_two_actors_of_four_devices_train_as_a_plain_loop():
    for kind in (Regression, Manual):
        model = kind()
        expected = train_by_hand(model)
        trainer = fit(model, num_workers=2)
        assert max_difference(model, expected) < TOLERANCE
    assert trainer.world_size == 2


ON_ONE_DEVICE = """
import torch_xla.runtime as runtime
from raylit.accelerators import get_accelerator
from xla.xla_models import Regression, fit, max_difference, train_by_hand
get_accelerator("xla").device()
model = Regression()
expected = train_by_hand(model)
fit(model)
print(runtime.global_runtime_device_count(), max_difference(model, expected))
"""


@pytest.mark.timeout(300)
def test_one_device_trains_as_a_plain_loop():
    tests = os.path.join(os.path.dirname(__file__), os.pardir)
    paths = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "CPU_NUM_DEVICES": "1", "PYTHONPATH": paths}
    environment.pop("XLA_USE_SPMD", None)  # XLA has set it in this process
    done = subprocess.run(
        [sys.executable, "-c", ON_ONE_DEVICE], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    num_devices, difference = done.stdout.split()
    assert num_devices == "1"
    assert float(difference) < TOLERANCE

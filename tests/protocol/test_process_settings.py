"""torch's process-wide switches: those of the driver and of the Trainer hold for a run's length, wherever it runs."""

import pytest
import torch
from models import Regression, fit

from raylit.protocol.process_settings import TorchSettings


class Asks(Regression):
    def on_train_start(self):
        self.settings = TorchSettings.current()


@pytest.fixture(autouse=True)
def as_before():
    before = TorchSettings.current()
    yield
    before.apply()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_has_the_drivers_switches(num_workers):
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = True
    model = Asks()
    fit(model, num_workers=num_workers, max_epochs=1)
    assert model.settings == TorchSettings.current()
    assert model.settings.matmul_precision == "medium"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_trainers_switches_end_with_the_run(num_workers):
    before, asking, later = TorchSettings.current(), Asks(), Asks()
    arguments = {"float32_matmul_precision": "high", "benchmark": True, "deterministic": "warn"}
    fit(asking, num_workers=num_workers, max_epochs=1, **arguments)
    assert (asking.settings.matmul_precision, asking.settings.deterministic, asking.settings.benchmark) == (
        "high",
        "warn",
        True,
    )
    assert TorchSettings.current() == before
    fit(later, num_workers=num_workers, max_epochs=1)
    assert later.settings == before


def test_they_end_with_a_run_that_fails_too():
    class Fails(Asks):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("as planned")

    before = TorchSettings.current()
    with pytest.raises(RuntimeError, match="as planned"):
        fit(Fails(), float32_matmul_precision="high")
    assert TorchSettings.current() == before

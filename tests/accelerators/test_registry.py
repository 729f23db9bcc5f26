"""A third party's accelerator and strategy: registered by name, they train on workers without a change in raylit."""

import pytest
import torch
from models import Regression, assert_same_weights, make_data, weights_of
from torch.utils.data import DataLoader

import raylit as pl
from raylit.accelerators import CPUAccelerator
from raylit.strategies import DDP


class DisguisedCPU(pl.Accelerator):
    """The CPU as a third party would drive a device of its own. Keeps in each process how often it was called."""

    name = "disguise"
    collective_backend = "gloo"

    def __init__(self):
        self.calls = {"set_up": 0, "seed": 0, "after_step": 0}

    def is_available(self):
        return True

    def num_devices(self):
        return 2

    def device(self):
        return torch.device("cpu")

    def set_up(self, *, num_threads):
        super().set_up(num_threads=num_threads)
        self.calls["set_up"] += 1

    def seed(self, seed):
        self.calls["seed"] += 1

    def after_step(self):
        self.calls["after_step"] += 1


class Missing(DisguisedCPU):
    name = "missing"

    def is_available(self):
        return False


class Counted(Regression):
    """Brings back from rank 0 what was called of its accelerator, and the accelerator's class."""

    def on_train_end(self):
        accelerator = self.trainer.accelerator
        self.calls = dict(getattr(accelerator, "calls", {}))
        self.accelerator = type(accelerator).__name__
        self.strategy = type(self.trainer.strategy).__name__


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch):
    monkeypatch.setattr("raylit.accelerators.registry._REGISTERED", {})
    monkeypatch.setattr("raylit.strategies._REGISTERED", {})


@pytest.fixture
def disguise():
    pl.register_accelerator("disguise", DisguisedCPU)
    return "disguise"


def fitted(quiet, *, optimizer="adam", **arguments):
    torch.manual_seed(5)
    model = Counted(optimizer=optimizer)
    loader = DataLoader(make_data(32), batch_size=8, shuffle=True)
    pl.Trainer(max_epochs=2, limit_val_batches=0, **{"num_workers": 2, **quiet, **arguments}).fit(model, loader)
    return model


@pytest.mark.timeout(300)  # two groups of workers start
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_registered_accelerator_trains_to_the_cpus_numbers(num_workers, disguise, quiet):
    model = fitted(quiet, accelerator=disguise, num_workers=num_workers)
    on_cpu = fitted(quiet, accelerator="cpu", num_workers=num_workers)
    assert (model.accelerator, on_cpu.accelerator) == ("DisguisedCPU", "CPUAccelerator")
    assert model.losses == on_cpu.losses
    assert_same_weights(weights_of(model), weights_of(on_cpu))
    num_steps = 2 * 32 // 8 // max(1, num_workers)
    assert (model.calls["set_up"], model.calls["after_step"]) == (1, num_steps)


def test_an_accelerator_may_be_given_itself(quiet):
    assert fitted(quiet, accelerator=DisguisedCPU(), num_workers=0).accelerator == "DisguisedCPU"


def test_nothing_is_called_after_a_step_where_there_is_nothing_to_do(quiet):
    class Watched(Counted):
        def on_train_end(self):
            self.num_hooks = len(self.optimizers()._optimizer_step_post_hooks)

    model = Watched()
    loader = DataLoader(make_data(32), batch_size=8)
    pl.Trainer(num_workers=0, accelerator="cpu", max_epochs=1, limit_val_batches=0, **quiet).fit(model, loader)
    assert model.num_hooks == 0


@pytest.mark.slow
def test_a_script_registers_an_accelerator_of_its_own(run_script):
    printed = run_script(
        """
        import torch
        import raylit as pl
        from raylit.accelerators import CPUAccelerator

        class Own(CPUAccelerator):
            name = "own"

        class Model(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(1, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).mean()

            def on_train_end(self):
                self.found = type(self.trainer.accelerator).__name__

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        if __name__ == "__main__":
            pl.register_accelerator("own", Own)
            model = Model()
            trainer = pl.Trainer(accelerator="own", num_workers=2, max_epochs=1, logger=False,
                                 enable_checkpointing=False, enable_progress_bar=False)
            trainer.fit(model, torch.utils.data.DataLoader(torch.ones(4, 1)))
            print(model.found)
        """
    )
    assert printed.splitlines()[-1] == "Own"


def test_its_resources_are_asked_of_ray(disguise, quiet):
    class Chip(DisguisedCPU):
        resources = {"chip": 1.0}  # noqa: RUF012

    with pytest.raises(pl.ResourcesError, match="chip"):
        fitted(quiet, accelerator=Chip())
    with pytest.raises(pl.ConfigError, match="leaves workers without the chip that they are to use"):
        pl.Trainer(accelerator=Chip(), num_workers=2, resources_per_worker={"chip": 0})


def test_its_devices_are_counted(disguise):
    assert pl.Trainer(accelerator=disguise).num_devices == 2
    assert pl.Trainer(accelerator=disguise, devices=-1).num_devices == 2
    assert pl.Trainer(accelerator=disguise, num_workers=0).num_devices == 1


def test_accelerators_of_the_same_values_are_equal():
    """So that their workers are used again."""
    assert DisguisedCPU() == DisguisedCPU()
    assert Missing() != DisguisedCPU()
    assert CPUAccelerator() != DisguisedCPU()


def test_an_unknown_accelerator_is_an_error_that_lists_what_there_is(disguise):
    with pytest.raises(pl.ConfigError, match=r"accelerator='npu': must be 'auto', 'cpu', 'gpu', 'cuda'.* 'disguise'"):
        pl.Trainer(accelerator="npu")


def test_an_accelerator_that_is_not_there_is_an_error():
    pl.register_accelerator("missing", Missing)
    with pytest.raises(pl.ConfigError, match="accelerator='missing' is asked for, but this machine has no such device"):
        pl.Trainer(accelerator="missing", num_workers=0)


def test_auto_takes_a_registered_accelerator_that_says_so(monkeypatch):
    pl.register_accelerator("disguise", DisguisedCPU)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert pl.Trainer(num_workers=0).accelerator.name == "cpu"
    monkeypatch.setattr(DisguisedCPU, "is_automatic", True)
    assert pl.Trainer(num_workers=0).accelerator.name == "disguise"
    assert pl.Trainer(num_workers=0, accelerator="cpu").accelerator.name == "cpu"


def test_a_factory_that_makes_something_else_is_an_error():
    pl.register_accelerator("wrong", lambda: "cpu")  # type: ignore[arg-type,return-value]
    with pytest.raises(pl.ConfigError, match="accelerator='wrong': its factory returned 'cpu'"):
        pl.Trainer(accelerator="wrong")


@pytest.mark.parametrize("name", ["auto", "cpu", "gpu"])
def test_the_names_of_raylits_own_accelerators_are_taken(name):
    with pytest.raises(pl.ConfigError, match=f"register_accelerator\\('{name}'\\): the name is raylit's own"):
        pl.register_accelerator(name, DisguisedCPU)


def test_gpus_and_another_accelerator_contradict_each_other(disguise):
    with pytest.raises(pl.ConfigError, match="accelerator='disguise' and gpus=2 contradict each other"):
        pl.Trainer(accelerator=disguise, gpus=2)


class OwnDDP(DDP):
    """A third party's strategy."""


def build_own_ddp(plan):
    return OwnDDP(pl.DDPStrategy(), is_syncing_batch_norm=plan.is_syncing_batchnorm)


def test_a_registered_strategy_trains_to_the_numbers_of_the_one_it_derives_from(quiet):
    pl.register_strategy("own_ddp", build_own_ddp)
    own = fitted(quiet, accelerator="cpu", strategy="own_ddp")
    ddp = fitted(quiet, accelerator="cpu", strategy="ddp")
    assert (own.strategy, ddp.strategy) == ("OwnDDP", "DDP")
    assert_same_weights(weights_of(own), weights_of(ddp))


def test_an_unknown_strategy_is_an_error_that_lists_what_there_is():
    pl.register_strategy("own_ddp", build_own_ddp)
    with pytest.raises(pl.ConfigError, match=r"strategy='zero': must be one of 'auto', .*'own_ddp'"):
        pl.Trainer(strategy="zero", num_workers=2)


def test_the_names_of_raylits_own_strategies_are_taken():
    with pytest.raises(pl.ConfigError, match=r"register_strategy\('ddp'\): the name is raylit's own"):
        pl.register_strategy("ddp", build_own_ddp)

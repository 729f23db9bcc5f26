"""The page's "profile your speed and memory": what costs how much, on which rank."""

import time

import pytest
import torch
from models import Regression, RegressionData, fit, make_data
from torch.utils.data import DataLoader

import raylit as pl


def actions_of(profile):
    return {action.name: action for action in profile.actions}


class Hooked(Regression):
    def on_train_batch_start(self, batch, batch_idx):
        time.sleep(0.002)

    def on_validation_end(self): ...

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch


class Seen(pl.Callback):
    def on_train_epoch_end(self, trainer, pl_module): ...


def test_every_part_of_a_run_is_counted_exactly(quiet):
    arguments = {**quiet, "enable_checkpointing": True}
    trainer = pl.Trainer(
        num_workers=0,
        max_epochs=2,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[Seen()],
        profiler="simple",
        checkpoint_async=False,
        **arguments,
    )
    began_s = time.perf_counter()
    trainer.fit(Hooked(), datamodule=RegressionData())
    took_s = time.perf_counter() - began_s
    [worker, driver] = trainer.profiler.profiles
    # 2 epochs of 6 batches; validations of 3, and a sanity check of 2.
    assert {name: action.num_calls for name, action in actions_of(worker).items() if name != "wait for the driver"} == {
        "Hooked.on_train_batch_start": 12,
        "Hooked.on_validation_end": 3,
        "Hooked.prepare_data": 1,
        "Hooked.setup": 1,
        "RegressionData.prepare_data": 1,
        "RegressionData.setup": 1,
        "Seen.on_train_epoch_end": 2,
        "backward": 12,
        "checkpoint: gather state": 2,
        "configure_gradient_clipping": 6,
        "end of epoch": 2,
        "evaluation loop": 3,
        "finish": 1,
        "optimizer_step": 6,
        "optimizer_zero_grad": 6,
        "start": 1,
        "train_dataloader_next": 12,
        "training loop": 2,
        "training_step": 12,
        "transfer_batch_to_device": 20,
        "val_dataloader_next": 8,
        "validation_step": 8,
    }
    for profile in (worker, driver):
        assert sum(action.total_s for action in profile.actions) == pytest.approx(profile.elapsed_s, rel=1e-3)
        assert 12 * 0.002 <= profile.elapsed_s <= took_s
    assert actions_of(worker)["Hooked.on_train_batch_start"].total_s >= 12 * 0.002
    assert actions_of(driver)["write checkpoint"].num_calls == 2
    assert actions_of(driver)["ModelCheckpoint"].total_s > 0


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(torch.nn.functional.mse_loss(self(batch[0]), batch[1]))
        optimizer.step()


class Evaluating(Regression):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), max_iter=2)


class Overridden(Regression):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)


@pytest.mark.parametrize("kind", [Manual, Evaluating, Overridden])
def test_every_kind_of_optimization_is_measured(kind):
    [worker, _] = fit(kind(), profiler="simple", max_epochs=1).profiler.profiles
    counts = {name: action.num_calls for name, action in actions_of(worker).items()}
    assert counts["optimizer_step"] == 6
    assert counts["backward"] == counts["training_step"] >= 6
    assert sum(action.total_s for action in worker.actions) == pytest.approx(worker.elapsed_s, rel=1e-3)


class Uneven(Regression):
    """Its rank 1 has something to do that the others have not."""

    def training_step(self, batch, batch_idx):
        with self.trainer.profiler.profile("my part"):
            time.sleep(0.2 * self.global_rank)
        return super().training_step(batch, batch_idx)


def test_the_slowest_and_the_fastest_rank_are_told_apart(quiet, capsys):
    loader = DataLoader(make_data(48), batch_size=4, shuffle=True)
    trainer = pl.Trainer(num_workers=2, max_epochs=1, limit_val_batches=0, profiler="simple", **quiet)
    trainer.fit(Uneven(), loader)
    slowest, fastest, driver = trainer.profiler.profiles
    assert (slowest.rank, fastest.rank, driver.rank) == (1, 0, None)
    slow, fast = actions_of(slowest), actions_of(fastest)
    assert slow["my part"].num_calls == fast["my part"].num_calls == 6
    assert slow["my part"].total_s > 6 * 0.2
    # The fast one spends that time in the backward pass, where gradients are averaged.
    assert fast["backward"].total_s > slow["backward"].total_s
    for profile in (slowest, fastest, driver):
        assert sum(action.total_s for action in profile.actions) == pytest.approx(profile.elapsed_s, rel=1e-3)
    out = capsys.readouterr().out
    assert "Slowest rank: 1 of 2" in out
    assert "Fastest rank: 0 of 2" in out


def test_traces_of_workers_arrive_in_the_log_directory(quiet, tmp_path):
    loader = DataLoader(make_data(48), batch_size=4, shuffle=True)
    arguments = {**quiet, "default_root_dir": tmp_path}
    trainer = pl.Trainer(num_workers=2, max_epochs=1, limit_val_batches=0, profiler="pytorch", **arguments)
    trainer.fit(Uneven(), loader)
    names = sorted(path.name for path in tmp_path.glob("*.pt.trace.json"))
    assert names == ["fit-profile-rank0.pt.trace.json", "fit-profile-rank1.pt.trace.json"]


@pytest.mark.parametrize("profiler", ["quick", 3, pl.SimpleProfiler])
def test_an_unknown_profiler_is_an_error_that_names_those_there_are(profiler):
    with pytest.raises(pl.ConfigError, match="'simple', 'advanced', 'pytorch'"):
        pl.Trainer(profiler=profiler)


@pytest.mark.parametrize(
    ("profiler", "kind"),
    [
        (True, pl.SimpleProfiler),
        ("simple", pl.SimpleProfiler),
        ("advanced", pl.AdvancedProfiler),
        ("pytorch", pl.PyTorchProfiler),
    ],
)
def test_profilers_have_short_names(profiler, kind):
    assert type(pl.Trainer(profiler=profiler).profiler) is kind


class FailingOnce(Uneven):
    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.global_rank == 1:
            raise KeyError("on purpose")
        return super().training_step(batch, batch_idx)


@pytest.mark.slow
def test_a_failure_on_a_worker_leaves_profilers_usable(quiet):
    loader = DataLoader(make_data(48), batch_size=4, shuffle=True)
    arguments = {"num_workers": 2, "max_epochs": 1, "limit_val_batches": 0, "profiler": "advanced", **quiet}
    failed = pl.Trainer(**arguments)
    with pytest.raises(KeyError, match="on purpose"):
        failed.fit(FailingOnce(), loader)
    assert failed.profiler.profiles == ()
    trainer = pl.Trainer(**arguments)
    trainer.fit(Uneven(), loader)
    assert "training_step" in trainer.profiler.profiles[0].text

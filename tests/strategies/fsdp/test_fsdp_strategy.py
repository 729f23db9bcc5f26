"""FSDP on two workers: the numbers of a plain loop, of shards that each worker holds and writes by itself."""

import os
import shutil
import signal
import threading

import pytest
import torch
from models import assert_same_weights, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylit as pl
from raylit.checkpoint import files
from raylit.checkpoint.index import find_newest_usable
from raylit.strategies.fsdp.strategy import FSDP
from raylit.worker.process import result_sync

WIDTH = 72
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class Block(nn.Module):
    """A little more than what a block needs to be found as one."""

    def __init__(self, width=WIDTH, num_channels=None):
        super().__init__()
        self.norm = nn.LayerNorm(width) if num_channels is None else nn.BatchNorm1d(num_channels)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deep(pl.LightningModule):
    """Blocks between two layers of the root's own; built in `configure_model` unless `is_built`."""

    def __init__(self, *, is_built=False, optimizer="SGD", num_channels=None, path=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = None
        if is_built:
            self.configure_model()

    def configure_model(self):
        if self.net is None:
            blocks = [Block(num_channels=self.hparams.num_channels) for _ in range(3)]
            self.net = nn.Sequential(nn.Linear(8, WIDTH), nn.ReLU(), *blocks, nn.Linear(WIDTH, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", functional.mse_loss(self.net(x), y))

    def predict_step(self, batch):
        return self(batch[0])

    def configure_optimizers(self):
        return optimizer_of(self)


def optimizer_of(model):
    if model.hparams.optimizer == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def data(num_samples=42):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_samples, 8, generator=generator)
    return TensorDataset(x, x[:, :3].sin())


def loader(num_samples=42):
    return DataLoader(data(num_samples), batch_size=8)


def fit(model, *, num_workers=2, strategy="fsdp", loaders=None, ckpt_path=None, **arguments):
    """Two epochs from the seed that a plain build has; nothing is written unless a callback is given."""
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    if "callbacks" in arguments:
        del off["enable_checkpointing"]
    trainer = pl.Trainer(num_workers=num_workers, strategy=strategy, **{"max_epochs": 2, **off, **arguments})
    torch.manual_seed(7)
    trainer.fit(model, *(loaders or (loader(), loader(20))), ckpt_path=ckpt_path)
    return trainer


def built(**arguments):
    """A plain build from the same seed."""
    torch.manual_seed(7)
    return Deep(is_built=True, **arguments)


def by_hand(model, *, num_workers=2, num_epochs=2, accumulate=1, clip=None):
    """What one process makes of the workers' batches together."""
    optimizer = optimizer_of(model)
    x, y = data().tensors
    size = 8 * num_workers
    for _ in range(num_epochs):
        starts = list(range(0, len(x), size))
        for index, start in enumerate(starts):
            if index % accumulate == 0:
                optimizer.zero_grad()
            loss = functional.mse_loss(model.net(x[start : start + size]), y[start : start + size])
            (loss / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(starts):
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
    return weights_of(model), optimizer


# Numbers


@pytest.mark.parametrize("is_built", [True, False])
def test_fsdp_has_the_result_of_one_process_wherever_the_model_is_built(is_built):
    expected, _ = by_hand(built())
    model = built() if is_built else Deep()
    trainer = fit(model)
    assert_same_weights(weights_of(model), expected, **TOLERANCE)
    assert type(model) is Deep
    assert type(model.net[2]) is Block
    with torch.no_grad():
        assert trainer.callback_metrics["val_loss"].item() == pytest.approx(
            functional.mse_loss(model.net(data(20).tensors[0]), data(20).tensors[1]).item(), rel=1e-5
        )


def test_gradients_are_added_up_and_clipped_over_the_shards():
    expected, _ = by_hand(built(), accumulate=2, clip=0.05)
    model = Deep()
    fit(model, accumulate_grad_batches=2, gradient_clip_val=0.05)
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


class Endless(IterableDataset):
    """Its end comes unforeseen."""

    def __iter__(self):
        return iter([(x, y) for x, y in zip(*data(80).tensors, strict=True)])


def test_an_unfinished_window_at_the_end_of_the_data_makes_a_step():
    expected, model = Deep(), Deep()
    arguments = {"loaders": (DataLoader(Endless(), batch_size=8), loader(20)), "accumulate_grad_batches": 3}
    fit(expected, strategy="ddp", **arguments)
    fit(model, **arguments)
    assert_same_weights(weights_of(model), weights_of(expected), **TOLERANCE)


class Returning(Deep):
    """torch finds no tensors in what it returns."""

    def training_step(self, batch, batch_idx):
        return pl.TrainResult(minimize=super().training_step(batch, batch_idx))


def test_a_model_without_blocks_is_one_unit_whatever_its_step_returns():
    expected, _ = by_hand(built())
    model = Returning()
    fit(model, strategy=pl.FSDPStrategy(auto_wrap_policy={nn.ReLU}))
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


class Norms(Deep):
    def on_before_optimizer_step(self, optimizer):
        self.log("largest", max(parameter.grad.full_tensor().abs().max() for parameter in self.parameters()))


def test_gradients_are_clipped_by_value_and_their_norms_tracked():
    model = Norms()
    trainer = fit(
        model, gradient_clip_val=0.001, gradient_clip_algorithm="value", track_grad_norm=2, log_every_n_steps=1
    )
    metrics = trainer.callback_metrics
    assert metrics["largest"].item() == pytest.approx(0.001)
    squares = [value.item() ** 2 for name, value in metrics.items() if name.startswith("grad_2.0_norm/")]
    assert metrics["grad_2.0_norm_total"].item() == pytest.approx(sum(squares) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(("precision", "atol"), [("bf16-mixed", 0.03), ("bf16-true", 1e-2), ("16-mixed", 0.03)])
def test_half_precision_gives_nearly_the_result_of_ddp(precision, atol):
    expected, model = Deep(num_channels=WIDTH), Deep(num_channels=WIDTH)
    fit(expected, strategy="ddp", precision=precision)
    fit(model, precision=precision)
    assert_same_weights(weights_of(model), weights_of(expected), rtol=0, atol=atol)


def test_activation_checkpointing_recomputes_activations():
    expected, _ = by_hand(built())
    model = Counting()
    fit(model, strategy=pl.FSDPStrategy(activation_checkpointing_policy={CountingBlock}, cpu_offload=True))
    assert_same_weights(weights_of(model), expected, **TOLERANCE)
    num_steps, num_validations = 6, 6
    assert model.net[2].num_forwards == 2 * num_steps + num_validations


class CountingBlock(Block):
    num_forwards = 0

    def forward(self, x):
        self.num_forwards += 1
        return super().forward(x)


class Counting(Deep):
    def configure_model(self):
        super().configure_model()
        for index in (2, 3, 4):
            self.net[index].__class__ = CountingBlock


# What a worker holds


class Shares(Deep):
    def on_train_end(self):
        self.shares = [None] * self.trainer.world_size
        own = sum(parameter.to_local().numel() for parameter in self.parameters())
        values = [value for state in self.optimizers().state.values() for value in state.values() if value.ndim]
        states = sum(value.to_local().numel() for value in values)
        torch.distributed.all_gather_object(self.shares, (own, states))


def test_each_worker_holds_its_share_of_weights_and_optimizer_states():
    model = Shares(optimizer="AdamW")
    fit(model, max_epochs=1)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(own for own, _ in model.shares) == num_parameters
    assert max(own for own, _ in model.shares) < 0.52 * num_parameters
    assert all(states == 2 * own for own, states in model.shares)


def test_the_drivers_model_stays_on_the_meta_device_with_gather_weights_false(tmp_path):
    model = Deep()
    callback = pl.ModelCheckpoint(dirpath=tmp_path)
    trainer = fit(model, strategy=pl.FSDPStrategy(gather_weights=False), callbacks=[callback])
    assert all(parameter.is_meta for parameter in model.parameters())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(pl.ConfigError, match="meta device"):
        trainer.validate(model, loader(20))
    [metrics] = trainer.validate(model, loader(20), ckpt_path="best", verbose=False)
    assert metrics["val_loss"] == pytest.approx(trainer.callback_metrics["val_loss"].item(), rel=1e-6)
    assert_same_weights(weights_of(Deep.load_from_checkpoint(tmp_path / "one.ckpt")), by_hand(built())[0], **TOLERANCE)


def private_mb():
    with open("/proc/self/smaps_rollup", encoding="utf-8") as rollup:
        return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024


class Large(Deep):
    """12 layers of 16 MB; measures what rank 0 needs beside them between the last hook and the end."""

    def configure_model(self):
        self.net = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(12)))

    def training_step(self, batch, batch_idx):
        return self.net(batch[0].new_ones(1, 2048)).square().mean()

    def on_fit_end(self):
        self._is_over, self._most = threading.Event(), [private_mb()]
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()

    def _sample(self):
        while not self._is_over.wait(0.002):
            self._most.append(private_mb())

    def teardown(self, stage):
        self._is_over.set()
        self._sampler.join()
        del self._is_over, self._sampler
        self.sums = [layer.weight.full_tensor().sum().item() for layer in self.net]


@pytest.mark.slow
def test_rank_0_sends_the_weights_to_the_driver_in_pieces():
    model = Large()
    fit(model, max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    assert max(model._most) - model._most[0] < 96, "of 192 MB"
    assert [layer.weight.sum().item() for layer in model.net] == pytest.approx(model.sums, abs=1e-3)


# Evaluation


def test_every_sample_is_evaluated_once_although_ranks_have_different_numbers_of_batches():
    model = built()
    trainer = pl.Trainer(num_workers=2, strategy="fsdp", logger=False, enable_progress_bar=False)
    outputs = trainer.predict(model, loader(20))
    assert [len(output) for output in outputs] == [8, 8, 4]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(outputs), model(data(20).tensors[0]), **TOLERANCE)


# Checkpoints


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Checkpoints of every second step, of a run of 6 steps, and the weights it has ended with."""
    directory = tmp_path_factory.mktemp("checkpoints")
    model = Deep(optimizer="AdamW")
    fit(
        model, callbacks=[pl.ModelCheckpoint(dirpath=directory, every_n_train_steps=2, save_top_k=-1, save_last="link")]
    )
    return directory, weights_of(model)


def saved_at(directory, step):
    [name] = [name for name in os.listdir(directory) if f"step={step}." in name]
    return directory / name


def test_a_checkpoint_is_a_directory_with_a_part_of_each_worker(interrupted):
    directory, _ = interrupted
    names = sorted(os.listdir(saved_at(directory, 4)))
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "index.ckpt"]
    assert not [name for name in os.listdir(directory) if name.endswith(".tmp")]
    assert os.path.realpath(directory / "last.ckpt") == str(saved_at(directory, 6))


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_sharded_checkpoint_is_resumed_by_fsdp_or_another_strategy(interrupted, strategy):
    directory, expected = interrupted
    model = Deep(optimizer="AdamW")
    fit(model, strategy=strategy, ckpt_path=saved_at(directory, 4))
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


def rest_by_hand(path, *, num_workers, num_done):
    """What one process makes of the run that another number of workers has left after `num_done` samples of its first
    epoch, with its optimizer's state."""
    checkpoint = files.read(path)
    model = built(optimizer="AdamW")
    optimizer = optimizer_of(model)
    model.load_state_dict(checkpoint["state_dict"])
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    x, y = data().tensors
    size = 8 * num_workers
    for epoch in range(2):
        for start in range(num_done if epoch == 0 else 0, len(x), size):
            optimizer.zero_grad()
            functional.mse_loss(model.net(x[start : start + size]), y[start : start + size]).backward()
            optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("num_workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_another_number_of_workers_resumes_within_the_epoch(interrupted, num_workers):
    directory, _ = interrupted
    path = saved_at(directory, 2)
    model = Deep(optimizer="AdamW")
    trainer = fit(model, num_workers=num_workers, ckpt_path=path)
    assert_same_weights(weights_of(model), rest_by_hand(path, num_workers=num_workers, num_done=32), **TOLERANCE)
    assert trainer.current_epoch == 2


@pytest.mark.slow
def test_fewer_workers_resume_a_sharded_checkpoint(tmp_path):
    callback = pl.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(Deep(optimizer="AdamW"), num_workers=3, max_epochs=1, callbacks=[callback])
    path = saved_at(tmp_path, 1)
    model = Deep(optimizer="AdamW")
    fit(model, num_workers=2, ckpt_path=path)
    assert_same_weights(weights_of(model), rest_by_hand(path, num_workers=2, num_done=24), **TOLERANCE)


@pytest.mark.slow
def test_a_sharded_checkpoint_is_read_by_another_number_of_workers(interrupted):
    directory, expected = interrupted
    [name] = [name for name in os.listdir(directory) if "step=6" in name]
    trainer = pl.Trainer(num_workers=3, strategy="fsdp", logger=False, enable_progress_bar=False)
    model = Deep()
    trainer.validate(model, loader(20), ckpt_path=directory / name, verbose=False)
    assert_same_weights(weights_of(model), expected, rtol=0, atol=0)


def test_fsdp_resumes_a_checkpoint_file_of_ddp(tmp_path):
    expected, model = Deep(optimizer="AdamW"), Deep(optimizer="AdamW")
    callback = pl.ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit(expected, strategy="ddp", callbacks=[callback])
    fit(model, ckpt_path=saved_at(tmp_path, 4))
    assert_same_weights(weights_of(model), weights_of(expected), **TOLERANCE)


def test_state_dict_type_full_writes_a_single_file(tmp_path):
    model = Deep()
    strategy = pl.FSDPStrategy(state_dict_type="full")
    fit(model, strategy=strategy, callbacks=[pl.ModelCheckpoint(dirpath=tmp_path)])
    [path] = tmp_path.glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert_same_weights(checkpoint["state_dict"], weights_of(model), rtol=0, atol=0)
    _, optimizer = by_hand(built())
    for index, state in optimizer.state_dict()["state"].items():
        torch.testing.assert_close(checkpoint["optimizer_states"][0]["state"][index], state, **TOLERANCE)


def test_consolidation_makes_an_ordinary_checkpoint_file(interrupted, tmp_path, capsys):
    from raylit.cli import main

    directory, expected = interrupted
    path = tmp_path / "one.ckpt"
    assert main(["checkpoint", "consolidate", str(saved_at(directory, 6)), str(path)]) == 0
    checkpoint = torch.load(path, weights_only=True)
    assert_same_weights(checkpoint["state_dict"], expected, rtol=0, atol=0)
    assert set(checkpoint) >= {"epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "callbacks"}
    assert_same_weights(weights_of(Deep.load_from_checkpoint(path)), expected, rtol=0, atol=0)
    assert main(["checkpoint", "consolidate", str(path), str(tmp_path / "two.ckpt")]) == 1
    assert "is one file already" in capsys.readouterr().err


def test_only_the_best_directories_are_kept(tmp_path):
    callback = pl.ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_top_k=1, save_last=True)
    fit(Deep(), max_epochs=3, callbacks=[callback])
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    assert files.read(callback.best_model_path)["global_step"] > 0


class Interrupting(Deep):
    """Its second worker sends Ctrl-C to the driver in the middle of a step."""

    def __init__(self, driver, **arguments):
        super().__init__(**arguments)
        self.driver = driver

    def training_step(self, batch, batch_idx):
        if self.global_step == 4 and self.trainer.global_rank == 1:
            os.kill(self.driver, signal.SIGINT)
        return super().training_step(batch, batch_idx)


def test_ctrl_c_in_the_middle_of_a_step_saves_the_parts_of_a_later_one(tmp_path):
    saving = pl.ModelCheckpoint(tmp_path, every_n_epochs=1000)
    model = Interrupting(os.getpid(), optimizer="AdamW")
    with pytest.raises(KeyboardInterrupt):
        fit(model, max_epochs=1000, callbacks=[saving])
    [path] = tmp_path.glob("*.ckpt")
    checkpoint = files.read(path)
    assert 5 <= checkpoint["global_step"] < 3000
    assert_same_weights(checkpoint["state_dict"], weights_of(model), rtol=0, atol=0)


class Looking(Deep):
    def on_load_checkpoint(self, checkpoint):
        self.looked_at = {name: value.clone() for name, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_on_load_checkpoint_gets_whole_tensors_without_fsdp(interrupted, num_workers):
    directory, expected = interrupted
    trainer = pl.Trainer(num_workers=num_workers, logger=False, enable_progress_bar=False)
    for model in (Deep(), Looking()):
        trainer.validate(model, loader(20), ckpt_path=saved_at(directory, 6), verbose=False)
        assert_same_weights(weights_of(model), expected, rtol=0, atol=0)
    assert_same_weights(model.looked_at, expected, rtol=0, atol=0)


class EndedAtOnce(pl.DriverCallback):
    def on_start(self, run):
        raise ZeroDivisionError


class Counted:
    """The most that the driver has held beyond what it had before."""

    def __enter__(self):
        self._is_over, self._most, self._before = threading.Event(), [], private_mb()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def _sample(self):
        while not self._is_over.wait(0.002):
            self._most.append(private_mb())

    def __exit__(self, *error):
        self._is_over.set()
        self._sampler.join()
        self.num_mb = max(self._most) - self._before


class Wide(Large):
    """Measures nothing in its worker."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", batch[0].sum())

    def on_fit_end(self): ...

    def teardown(self, stage): ...


@pytest.mark.slow
def test_the_driver_has_at_most_one_copy_of_the_model_in_memory(tmp_path):
    arguments = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    fit(Wide(), **arguments)
    model, saving = Wide(optimizer="AdamW"), pl.ModelCheckpoint(tmp_path)
    with Counted() as counted:
        fit(model, callbacks=[saving], **arguments)
    assert counted.num_mb < 192 + 80
    arguments["max_epochs"] = 2
    with Counted() as counted, pytest.raises(ZeroDivisionError):
        fit(
            Wide(optimizer="AdamW"),
            strategy="ddp",
            ckpt_path=saving.best_model_path,
            callbacks=[EndedAtOnce()],
            **arguments,
        )
    assert counted.num_mb < 80, "of 576 MB in the checkpoint"


@pytest.mark.parametrize("has_grown", [False, True])
def test_gathered_weights_are_written_into_existing_memory(has_grown):
    module, trained = nn.Linear(3, 2), {name: value + 1 for name, value in nn.Linear(3, 2).state_dict().items()}
    places = [parameter.data_ptr() for parameter in module.parameters()]
    returned = result_sync.GatheredWeights(module)
    for name, value in trained.items():
        returned.take({name: value})
    if has_grown:
        module.weight, module.bias = nn.Parameter(module.weight.to("meta")), nn.Parameter(module.bias.to("meta"))
    result_sync.apply_weights(returned.state_dict, module, is_adopting=True)
    assert_same_weights(module.state_dict(), trained, rtol=0, atol=0)
    assert [parameter.data_ptr() for parameter in module.parameters()] == places


class SavingItself(Deep):
    def on_train_epoch_end(self):
        if self.current_epoch == 0:
            self.trainer.save_checkpoint(self.hparams.path)


def test_a_hook_saves_the_parts_too(tmp_path):
    model = SavingItself(path=str(tmp_path / "mine.ckpt"))
    fit(model, max_epochs=1)
    assert_same_weights(files.read(tmp_path / "mine.ckpt")["state_dict"], weights_of(model), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:the checkpoint directory")
def test_the_newest_undamaged_checkpoint_is_resumed_without_the_driver_reading_its_parts(interrupted, tmp_path):
    directory, expected = interrupted
    for step in (4, 6):
        shutil.copytree(saved_at(directory, step), tmp_path / f"step={step}.ckpt")
    os.truncate(tmp_path / "step=6.ckpt" / "__1_0.distcp", 1000)
    with pytest.warns(UserWarning, match="step=6.ckpt is damaged: __1_0.distcp"):
        _, checkpoint = find_newest_usable(tmp_path, is_whole=False)
    assert all(value.is_meta for value in checkpoint["state_dict"].values())
    model = Deep(optimizer="AdamW")
    with pytest.warns(UserWarning, match="step=6.ckpt is damaged: __1_0.distcp"):
        fit(model, resume="auto", callbacks=[pl.ModelCheckpoint(dirpath=tmp_path, every_n_epochs=9)])
    assert_same_weights(weights_of(model), expected, **TOLERANCE)


class OutOfSight(Deep):
    def setup(self, stage):
        shutil.rmtree(self.hparams.path, ignore_errors=True)


@pytest.mark.slow
def test_a_worker_that_cannot_see_the_parts_says_so(interrupted, tmp_path):
    path = shutil.copytree(saved_at(interrupted[0], 6), tmp_path / "one.ckpt")
    with pytest.raises(pl.CheckpointError, match=r"cannot see .*one.ckpt, .*consolidate"):
        fit(OutOfSight(optimizer="AdamW", path=str(path)), ckpt_path=path)


@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_part_is_named(interrupted, tmp_path, harm):
    directory, _ = interrupted
    copy_of = tmp_path / "copy.ckpt"
    shutil.copytree(saved_at(directory, 6), copy_of)
    part = copy_of / "__1_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flip": lambda: part.write_bytes(content),
        "cut": lambda: part.write_bytes(content[:-10]),
        "remove": part.unlink,
    }[harm]()
    with pytest.raises(pl.CheckpointError, match=r"copy.ckpt is damaged: __1_0.distcp"):
        files.read(copy_of)


# Refusals


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (pl.StochasticWeightAveraging(swa_lrs=0.1), "StochasticWeightAveraging"),
        (pl.ModelCheckpoint(save_on_exception=True), "save_on_exception"),
    ],
)
def test_callbacks_that_need_whole_weights_are_refused_before_workers_start(callback, message):
    with pytest.raises(pl.ConfigError, match=rf"strategy='fsdp' does not go together with .*{message}"):
        fit(Deep(), callbacks=[callback])


def test_an_optimizer_that_needs_whole_gradients_is_refused():
    strategy = FSDP(pl.FSDPStrategy(), precision="32-true")
    with pytest.raises(pl.ConfigError, match=r"LBFGS.*use 'ddp'"):
        strategy.check_optimizers([torch.optim.LBFGS(nn.Linear(2, 2).parameters())])

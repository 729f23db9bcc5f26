"""Some more cool features of the page, a test by the name of each, and the Trainers of its last example."""

import copy
import warnings

import pytest
import torch
from matplotlib.figure import Figure
from models import Regression, RegressionData, assert_same_weights, make_data, weights_of
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from tpu_hosts import pretend_slices

import raylit as pl
from raylit import LightningModule, Trainer
from raylit.checkpoint import files


def test_automatic_checkpointing(tmp_path):
    model = Regression()
    trainer = Trainer(max_epochs=2, enable_progress_bar=False)
    trainer.fit(model, RegressionData())
    saved = trainer.checkpoint_callback
    assert saved.best_model_path.startswith(str(tmp_path / "lightning_logs" / "version_0" / "checkpoints"))
    assert_same_weights(weights_of(Regression.load_from_checkpoint(saved.newest_model_path)), weights_of(model))


class Worsens(Regression):
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", float(self.current_epoch))


@pytest.mark.parametrize("switch", ["early_stop_callback", "early_stop_checkpoint"])
def test_automatic_early_stopping(switch, quiet):
    trainer = Trainer(max_epochs=20, **{switch: True}, **quiet)
    trainer.fit(Worsens(), RegressionData())
    assert trainer.current_epoch == 4


def test_automatically_overfit_your_model_for_a_sanity_test(quiet):
    class Small(Regression):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    model = Small(width=64)
    trainer = Trainer(overfit_batches=1, max_epochs=150, **quiet)
    with pytest.warns(UserWarning, match="overfit_batches: the training loader shuffles"):
        trainer.fit(model, RegressionData())
    assert trainer.global_step == 150
    # Eight samples are learned by heart, and validation looks at the same ones.
    assert model.losses[-1] < 0.01 * model.losses[0]
    assert trainer.callback_metrics["val_loss"] < 0.01 * model.losses[0]


def test_automatic_truncated_back_propagation_through_time(quiet):
    class Sequences(LightningModule):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTM(2, 4, batch_first=True)
            self.lengths = []
            self.is_state_detached = []

        def training_step(self, batch, batch_idx, hiddens):
            self.lengths.append(batch.size(1))
            if hiddens is not None:
                self.is_state_detached.append(not hiddens[0].requires_grad)
            out, hiddens = self.cell(batch, hiddens)
            return {"loss": out.square().mean(), "hiddens": hiddens}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Sequences()
    trainer = Trainer(truncated_bptt_steps=4, max_epochs=1, **quiet)
    trainer.fit(model, DataLoader(torch.randn(3, 10, 2), batch_size=3))
    assert (model.lengths, model.is_state_detached, trainer.global_step) == ([4, 4, 2], [True, True], 3)


class OutOfMemoryAbove(RegressionData):
    """Its batches fit into memory up to a size."""

    def __init__(self, limit, num_train=256, error=MemoryError):
        super().__init__(batch_size=1, num_train=num_train)
        self.limit = limit
        self.error = error

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if len(batch[0]) > self.limit:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return batch


@pytest.mark.parametrize(("given", "size"), [(True, 32), ("power", 32), ("binsearch", 45)])
@pytest.mark.parametrize("error", [MemoryError, RuntimeError, torch.OutOfMemoryError])
def test_automatically_scale_your_batch_size(given, size, error, quiet):
    model, data = Regression(), OutOfMemoryAbove(48, error=error)
    before, random_state = weights_of(model), torch.get_rng_state()
    trainer = Trainer(auto_scale_batch_size=given, max_epochs=1, **quiet)
    assert trainer.tune(model, data) == {"scale_batch_size": size}
    assert data.batch_size == size
    assert_same_weights(weights_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.losses == []
    trainer.fit(model, data)
    assert trainer.global_step == -(-256 // size)


@pytest.mark.slow
def test_automatically_scale_your_batch_size_on_two_workers_in_fit(quiet):
    model, data = Regression(), OutOfMemoryAbove(16)
    trainer = Trainer(auto_scale_batch_size="power", max_epochs=1, num_workers=2, **quiet)
    trainer.fit(model, data)
    assert (data.batch_size, trainer.global_step) == (16, 8)


def test_automatically_scale_your_batch_size_ends_at_the_data_or_the_last_trial(quiet):
    data = RegressionData(num_train=48)
    Trainer(auto_scale_batch_size=True, **quiet).tune(Regression(), data)
    assert data.batch_size == 64
    tuner = Trainer(**quiet).tuner
    assert tuner.scale_batch_size(Regression(), datamodule=data, init_val=3, max_trials=2) == 6
    with pytest.raises(MemoryError):
        Trainer(auto_scale_batch_size=True, **quiet).tune(Regression(), OutOfMemoryAbove(0))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_automatically_attempt_to_find_a_good_learning_rate(num_workers, quiet):
    model, data = Regression(lr=1e-9), RegressionData()
    before, random_state = weights_of(model), torch.get_rng_state()
    trainer = Trainer(auto_lr_find=True, num_workers=num_workers, max_epochs=1, **quiet)
    found = trainer.tune(model, data)["lr_find"]
    rate = found.suggestion()
    assert 0.01 < rate < 1.0  # with the starting rate nothing would be learned
    assert model.hparams.lr == rate
    assert len(found.results["lr"]) == len(found.results["loss"]) == 100
    assert_same_weights(weights_of(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (trainer.global_step, trainer.callback_metrics) == (0, {})
    trainer.fit(model, data)  # does not search again
    assert model.hparams.lr == rate


def test_automatically_attempt_to_find_a_good_learning_rate_is_a_range_test(quiet):
    """The losses are those of a loop by hand whose rate rises."""
    data = make_data(24)
    model = Regression()
    copied = copy.deepcopy(model)
    loader = DataLoader(data, batch_size=8)
    tuner = Trainer(limit_val_batches=0, **quiet).tuner
    found = tuner.lr_find(model, loader, min_lr=1e-3, max_lr=10.0, num_training=9, update_attr=False)
    assert found.results["lr"] == pytest.approx([10 ** (-3 + index / 2) for index in range(9)])
    optimizer, average, smoothed = copied.configure_optimizers(), 0.0, []
    batches = [batch for _ in range(3) for batch in loader]
    for index, (lr, (x, y)) in enumerate(zip(found.results["lr"], batches, strict=True)):
        optimizer.param_groups[0]["lr"] = lr
        loss = F.mse_loss(copied(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average = 0.98 * average + 0.02 * loss.item()
        smoothed.append(average / (1 - 0.98 ** (index + 1)))
    assert found.results["loss"] == pytest.approx(smoothed, rel=1e-5)


def test_automatically_attempt_to_find_a_good_learning_rate_gives_up_where_it_diverges(quiet):
    model = Regression()
    tuner = Trainer(**quiet).tuner
    found = tuner.lr_find(model, datamodule=RegressionData(), max_lr=1e6, num_training=100)
    assert len(found.results["loss"]) < 100
    assert isinstance(found.plot(suggest=True), Figure)


@pytest.mark.parametrize("given", [True, "rate"])
def test_automatically_attempt_to_find_a_good_learning_rate_needs_the_attribute(given, quiet):
    class Fixed(Regression):
        def __init__(self):
            super().__init__()
            del self._hparams["lr"]
            self.speed = 0.1

    message = r"lr_find: there is no attribute or hyper-parameter .*numbers that there are: .*Fixed\.speed"
    with pytest.raises(pl.ConfigError, match=message):
        Trainer(auto_lr_find=given, **quiet).fit(Fixed(), RegressionData())
    with pytest.raises(pl.ConfigError, match="with a loader, whose batch size is fixed"):
        Trainer(auto_scale_batch_size=True, limit_val_batches=0, **quiet).fit(Sized(), DataLoader(make_data()))
    with pytest.raises(pl.ConfigError, match="auto_scale_batch_size='twice': must be True or 'power'"):
        Trainer(auto_scale_batch_size="twice")
    with pytest.raises(pl.ConfigError, match="nothing to tune: say auto_lr_find=True"):
        Trainer(**quiet).tune(Regression(), RegressionData())


class Sized(Regression):
    batch_size = 4

    def __init__(self):
        super().__init__()
        self.batch_size = 4


class Counts(pl.Callback):
    def __init__(self):
        self.num_batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.num_batches += 1


class Watches(pl.DriverCallback):
    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, run):
        self.epochs.append(run.state.progress.epoch)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_add_arbitrary_callbacks(num_workers, quiet):
    counts, watches = Counts(), Watches()
    trainer = Trainer(callbacks=[counts, watches], max_epochs=2, num_workers=num_workers, **quiet)
    trainer.fit(Regression(), RegressionData())
    assert (counts.num_batches, watches.epochs) == (12 // max(1, num_workers), [0, 1])


def test_hit_every_line_of_your_code_once_to_see_if_you_have_bugs(tmp_path):
    class Bug(Regression):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError("after hours")

    with pytest.raises(ZeroDivisionError):
        Trainer(fast_dev_run=True).fit(Bug(), RegressionData())
    model = Regression()
    Trainer(fast_dev_run=True).fit(model, RegressionData())
    assert len(model.losses) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def s3(monkeypatch):
    """A bucket of a server on loopback that speaks S3."""
    for package in ("s3fs", "boto3"):
        pytest.importorskip(package)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server_module = pytest.importorskip("moto.server")
    import s3fs

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "S3_ENDPOINT": url,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.filterwarnings("ignore")
def test_load_checkpoints_directly_from_s3(s3):
    model = Regression()
    trainer = Trainer(max_epochs=2, default_root_dir=f"{s3}/runs", enable_progress_bar=False)
    trainer.fit(model, RegressionData())
    path = trainer.checkpoint_callback.newest_model_path
    assert path == f"{s3}/runs/lightning_logs/version_0/checkpoints/epoch=1-step=12.ckpt"
    assert_same_weights(weights_of(Regression.load_from_checkpoint(path)), weights_of(model))
    again = Trainer(max_epochs=3, default_root_dir=f"{s3}/runs", enable_progress_bar=False)
    again.fit(model, RegressionData(), ckpt_path=path)
    assert again.global_step == 18
    import s3fs

    names = [name.rsplit("/", 1)[-1] for name in s3fs.S3FileSystem().find("bucket/runs/lightning_logs/version_0")]
    best = trainer.checkpoint_callback.best_model_path.rsplit("/", 1)[-1]
    # The best and the newest stay, as on a disk, and nothing half-written.
    kept = sorted({best, "epoch=1-step=12.ckpt"})
    assert [name for name in names if not name.startswith("events")] == [".index.json", *kept, "hparams.yaml"]
    assert len(names) == len(kept) + 3
    with pytest.raises(pl.CheckpointError, match=r"cannot read the checkpoint s3://bucket/none.ckpt: FileNotFound"):
        Regression.load_from_checkpoint(f"{s3}/none.ckpt")
    with pytest.raises(pl.CheckpointError, match=r"cannot write the checkpoint s3://nobodys/"):
        files.write({"state_dict": {}}, "s3://nobodys/model.ckpt")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("logger", [True, pl.CSVLogger()], ids=["tensorboard", "csv"])
def test_checkpoints_and_logs_go_to_urls(num_workers, logger):
    fsspec = pytest.importorskip("fsspec")
    root = f"memory://cool/{num_workers}-{type(logger).__name__}"
    model = Regression()
    trainer = Trainer(
        max_epochs=2,
        default_root_dir=root,
        logger=logger if logger is True else pl.CSVLogger(),
        enable_progress_bar=False,
        num_workers=num_workers,
    )
    trainer.fit(model, RegressionData())
    assert trainer.log_dir == f"{root}/lightning_logs/version_0"
    path = trainer.checkpoint_callback.newest_model_path
    assert_same_weights(weights_of(Regression.load_from_checkpoint(path)), weights_of(model))
    store, place = fsspec.url_to_fs(trainer.log_dir)
    names = [name.rsplit("/", 1)[-1] for name in store.find(place)]
    # The best and the newest, and nothing half-written.
    assert [name for name in names if ".ckpt" in name] == [
        path.rsplit("/", 1)[-1] for path in sorted({trainer.checkpoint_callback.best_model_path, path})
    ]
    if logger is True:
        [events] = [name for name in store.find(place) if "tfevents" in name]
        assert b"val_loss" in store.cat_file(events)
    else:
        lines = store.cat_file(f"{place}/metrics.csv").decode().splitlines()
        assert (lines[0].split(",")[:4], len(lines)) == (["step", "val_loss", "epoch", "goodput/fraction"], 4)


def test_move_from_cpus_to_gpus_or_tpus_without_code_changes(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: False)
        with pytest.raises(pl.ConfigError, match="GPUs are asked for, but torch sees none on this machine"):
            Trainer(gpus=2)
    # As on a driver without a GPU that is connected to a cluster with them.
    monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: True)
    plan = Trainer(gpus=2, precision=16, logger=False)._plan
    assert (plan.workers.num_workers, plan.workers.accelerator.name, plan.strategy) == (
        2,
        "cuda",
        pl.DDPStrategy(find_unused_parameters="auto"),
    )
    pretend_slices(monkeypatch, ("", "v6e", "2x4", 1, 8))
    workers = Trainer(tpu_cores=8, logger=False)._plan.workers
    assert (workers.num_workers, workers.accelerator.is_on_tpu) == (8, True)


def test_profile_your_code_for_speed_and_memory_bottlenecks(quiet, capsys):
    """`tests/spec/test_profiling.py` and `tests/profilers` have the numbers."""
    pl.fit(Regression(), RegressionData(), num_workers=0, max_epochs=1, profiler="simple", **quiet)
    printed = capsys.readouterr().out
    assert "training_step" in printed
    assert "memory" in printed


def test_scale_to_massive_compute_clusters(quiet):
    trainer = Trainer(num_processes=8, num_nodes=128, **quiet)
    assert (trainer.num_workers, trainer.world_size, trainer._plan.workers.num_nodes) == (1024, 1024, 128)
    with pytest.raises(pl.ResourcesError, match=r"1024 workers|128 hosts"):
        trainer.fit(Regression(), RegressionData())


def test_use_multiple_dataloaders_per_train_val_test_loop(quiet):
    class Several(Regression):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["left"], batch_idx) + super().training_step(batch["right"], batch_idx)

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("val_loss", F.mse_loss(self(batch[0]), batch[1]))

        def test_step(self, batch, batch_idx, dataloader_idx):
            self.log("test_loss", F.mse_loss(self(batch[0]), batch[1]))

    first, second = (DataLoader(make_data(16, seed=seed), batch_size=4) for seed in (1, 2))
    model = Several()
    trainer = Trainer(max_epochs=1, **quiet)
    trainer.fit(model, {"left": first, "right": second}, [first, second])
    assert len(model.losses) == 8
    assert {"val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"} <= trainer.callback_metrics.keys()
    tested = trainer.test(model, [first, second], verbose=False)
    expected = [F.mse_loss(model(x), y).item() for x, y in (make_data(16, seed=seed).tensors for seed in (1, 2))]
    assert [value for metrics in tested for value in metrics.values()] == pytest.approx(expected, rel=1e-5)


class Gan(LightningModule):
    def __init__(self):
        super().__init__()
        self.generator, self.discriminator = nn.Linear(2, 3), nn.Linear(3, 1)
        self.turns = []

    def training_step(self, batch, batch_idx, optimizer_idx):
        self.turns.append(optimizer_idx)
        fake = self.generator(torch.randn(len(batch[0]), 2))
        if optimizer_idx == 0:
            return F.softplus(-self.discriminator(fake)).mean()
        return (F.softplus(self.discriminator(fake.detach())) + F.softplus(-self.discriminator(batch[0]))).mean()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.discriminator)]


def test_use_multiple_optimizers_to_do_reinforcement_learning_or_even_gans(quiet):
    model = Gan()
    before = weights_of(model)
    trainer = Trainer(max_epochs=1, **quiet)
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=4))
    assert (model.turns, trainer.global_step) == ([0, 1] * 3, 6)
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())


# The page's last example.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_using_16_bit_with_early_stopping_half_the_data_and_four_validations_an_epoch(num_workers, quiet):
    """What the example asks of a TPU, on what is there."""

    class Watched(Worsens):
        num_validations = 0

        def on_validation_epoch_end(self):
            self.num_validations += not self.trainer.sanity_checking

    model = Watched()
    trainer = Trainer(
        num_workers=num_workers,
        precision=16,
        early_stop_checkpoint=True,
        limit_train_batches=0.5,
        val_check_interval=0.25,
        max_epochs=1,
        **quiet,
    )
    trainer.fit(model, RegressionData(batch_size=4 // max(1, num_workers), num_train=64))
    assert (trainer.global_step, model.num_validations) == (8, 4)


def test_train_on_tpus(monkeypatch):
    """The training itself: `tests/xla`, and `tests/accelerators/test_torch_tpu.py` with a stand-in."""
    pretend_slices(monkeypatch, ("", "v6e", "2x4", 1, 8))
    plan = Trainer(
        tpu_cores=8, precision=16, early_stop_checkpoint=True, limit_train_batches=0.5, val_check_interval=0.25
    )._plan
    assert (plan.workers.num_workers, plan.optimization.precision) == (8, "bf16-mixed")


def test_train_on_256_gpus(monkeypatch, quiet):
    monkeypatch.setattr("raylit.trainer.arguments.workers.is_on_cluster", lambda: True)
    workers = Trainer(gpus=8, num_nodes=32, **quiet)._plan.workers
    assert (workers.num_workers, workers.num_nodes, workers.accelerator.name) == (256, 32, "cuda")


def test_train_on_1024_cpus_across_128_machines(quiet):
    workers = Trainer(num_processes=8, num_nodes=128, **quiet)._plan.workers
    assert (workers.num_workers, workers.num_nodes, workers.accelerator.name) == (1024, 128, "cpu")


def test_anything_you_can_do_with_pytorch():
    model = Regression()
    model.eval()
    y_hat = model(torch.zeros(2, 8))
    assert y_hat.shape == (2, 3)
    assert isinstance(model, nn.Module)
    assert sum(parameter.numel() for parameter in model.half().parameters()) == 195

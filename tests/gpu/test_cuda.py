"""Training on a CUDA device: the CPU's numbers, mixed precision, batches copied beside the step, no waiting."""

import pytest
import torch
from models import Regression, assert_same_weights, make_data, weights_of
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl
from raylit.accelerators.transfer import BatchForm
from raylit.worker.data.batches import Mover, StreamCopy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def fit(model, *, accelerator="gpu", loader=None, **arguments):
    torch.manual_seed(7)
    loader = loader or DataLoader(make_data(64), batch_size=8, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = pl.Trainer(num_workers=0, accelerator=accelerator, **{**quiet, "max_epochs": 3, **arguments})
    trainer.fit(model, loader)
    return trainer


def made(kind=Regression, **options):
    torch.manual_seed(3)
    return kind(**options)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_gpu_trains_to_the_cpus_numbers(optimizer):
    on_cpu, on_gpu = made(optimizer=optimizer), made(optimizer=optimizer)
    fit(on_cpu, accelerator="cpu")
    fit(on_gpu)
    torch.testing.assert_close(on_gpu.losses, on_cpu.losses, **TOLERANCE)
    assert_same_weights(weights_of(on_gpu.cpu()), weights_of(on_cpu), **TOLERANCE)


def test_the_module_is_on_the_cpu_before_and_after():
    model = made()
    fit(model, max_epochs=1)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_evaluations_and_predictions_are_the_cpus():
    model, loader = made(), DataLoader(make_data(20), batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_workers": 0}
    on_cpu, on_gpu = (pl.Trainer(accelerator=name, **quiet) for name in ("cpu", "gpu"))
    (expected,), (actual,) = (trainer.test(model, loader, verbose=False) for trainer in (on_cpu, on_gpu))
    assert actual["test_loss"] == pytest.approx(expected["test_loss"], rel=1e-4)
    outputs = torch.cat(on_gpu.predict(model, loader))
    assert outputs.device.type == "cpu"
    torch.testing.assert_close(outputs, torch.cat(on_cpu.predict(model, loader)), **TOLERANCE)


class Mixed(Regression):
    """Keeps what type its output had, and the scaler's scale."""

    dtype_of_output = None
    scale = None

    def forward(self, x):
        y = super().forward(x)
        self.dtype_of_output = y.dtype
        return y

    def on_save_checkpoint(self, checkpoint):
        self.scale = checkpoint.get("MixedPrecision", {}).get("scale")


@pytest.mark.parametrize(("precision", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_mixed_precision_follows_a_hand_written_loop(precision, dtype, tmp_path):
    model, by_hand = made(Mixed), made(Mixed).cuda()
    order = torch.utils.data.DistributedSampler(make_data(64), num_replicas=1, rank=0, seed=7)
    optimizer = by_hand.configure_optimizers()
    scaler = torch.amp.GradScaler("cuda", enabled=dtype is torch.float16)
    losses = []
    for epoch in range(3):
        order.set_epoch(epoch)
        for x, y in DataLoader(make_data(64), batch_size=8, sampler=order):
            with torch.autocast("cuda", dtype=dtype):
                loss = torch.nn.functional.mse_loss(by_hand(x.cuda()), y.cuda())
            losses.append(loss.item())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    fit(model, precision=precision, enable_checkpointing=True, default_root_dir=tmp_path)
    assert model.dtype_of_output == dtype
    torch.testing.assert_close(model.losses, losses, rtol=2e-2, atol=1e-3)
    assert (model.scale is not None) == (dtype is torch.float16)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_batches_arrive_in_the_runs_precision(precision):
    class Looking(Regression):
        def on_train_batch_start(self, batch, batch_idx):
            self.seen = batch[0].device.type, batch[0].dtype, self.dtype

    model = made(Looking)
    fit(model, precision=precision, max_epochs=1)
    name = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    assert model.seen == ("cuda", name, name)


class Waiting(Regression):
    """Any wait for the device between its third and its last batch is an error."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.mse_loss(self(x), y)
        self.log("train_loss", loss)
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if batch_idx == 20:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def restored_debug_mode():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("restored_debug_mode")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("loader_workers", [0, 1])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_step_waits_for_nothing(loader_workers, precision):
    loader = DataLoader(make_data(256), batch_size=8, pin_memory=True, num_workers=loader_workers)
    fit(made(Waiting), loader=loader, max_epochs=1, precision=precision, log_every_n_steps=1000)


@pytest.mark.parametrize("pin_memory", [True, False])
@pytest.mark.parametrize("loader_workers", [0, 1])
def test_batches_copied_beside_the_step_train_to_the_same_numbers(loader_workers, pin_memory):
    class Slow(Regression):
        """Keeps the device busy, so that copies overtake the steps that read what came before them."""

        def training_step(self, batch, batch_idx):
            torch.cuda._sleep(2_000_000)
            return super().training_step(batch, batch_idx)

    options = {"batch_size": 8, "shuffle": True, "num_workers": loader_workers, "pin_memory": pin_memory}
    on_cpu, on_gpu = made(), made(Slow)
    fit(on_cpu, accelerator="cpu", loader=DataLoader(make_data(64), batch_size=8, shuffle=True))
    fit(on_gpu, loader=DataLoader(make_data(64), **options))
    torch.testing.assert_close(on_gpu.losses, on_cpu.losses, **TOLERANCE)


def test_the_copy_runs_on_a_stream_of_its_own_while_the_device_computes():
    device = torch.device("cuda", torch.cuda.current_device())
    copy = StreamCopy(device, BatchForm())
    batch = [torch.ones(1 << 20).pin_memory(), "text"]
    mover = Mover(copy, can_prefetch=True)
    torch.cuda.synchronize()
    busy_until = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)
    busy_until.record()
    moved, arrived = copy.start(batch, 0)
    arrived.synchronize()
    assert not busy_until.query(), "the copy is through while the step before it still runs"
    (whole, text), reference = copy.finish((moved, arrived)), torch.ones(1 << 20, device=device)
    assert torch.equal(whole, reference)
    assert text == "text"
    assert [note for note, _ in mover.move_batches(iter([(0, batch), (1, batch)]), can_prefetch=True)] == [0, 1]


def test_memory_of_a_batch_is_not_given_away_while_a_step_reads_it():
    device = torch.device("cuda", torch.cuda.current_device())
    mover = Mover(StreamCopy(device, BatchForm()), can_prefetch=True)
    sums = torch.zeros(50, device=device)
    batches = ((number, [torch.full((1 << 18,), float(number)).pin_memory()]) for number in range(50))
    for number, (batch,) in mover.move_batches(batches, can_prefetch=True):
        torch.cuda._sleep(1_000_000)
        sums[number] = batch.mean()
        del batch
    assert sums.tolist() == list(range(50))


def test_a_transfer_hook_gets_the_device_and_the_batch_after_it_lies_there():
    class Hooked(Regression):
        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            self.device_given = device.type
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            self.device_after = batch[0].device.type
            return batch

    model = made(Hooked)
    fit(model, max_epochs=1, loader=DataLoader(TensorDataset(*make_data(16).tensors), batch_size=8))
    assert (model.device_given, model.device_after) == ("cuda", "cuda")

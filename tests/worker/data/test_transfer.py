"""Transfer of batches to the device: when copies start, which hooks they call, what changes in nested batches."""

import collections
import dataclasses

import pytest
import torch
from models import Regression, assert_same_weights, make_data, weights_of
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl
from raylit.accelerators import CPUAccelerator
from raylit.accelerators.transfer import BatchForm, map_tensors, to_device
from raylit.worker import session as session_module
from raylit.worker.data.combined import build_eval_data
from raylit.worker.data.train_data import TrainData
from raylit.worker.data.transfer import MovedFeed, Mover, build_mover

CPU = torch.device("cpu")


class LoggedCopy:
    """A copy that writes down when it starts and ends."""

    def __init__(self):
        self.log = []

    def start(self, batch, dataloader_idx):
        self.log.append(("start", batch))
        return batch

    def finish(self, started):
        self.log.append(("finish", started))
        return started


def pairs(log, num_batches=3):
    for number in range(num_batches):
        log.append(("fetch", number))
        yield f"note {number}", number


def order_of(*, can_prefetch, **options):
    copy = LoggedCopy()
    mover = Mover(copy, can_prefetch=True, **options)
    for note, batch in mover.move_batches(pairs(copy.log), can_prefetch=can_prefetch):
        assert note == f"note {batch}"
        copy.log.append(("step", batch))
    return [f"{what} {number}" for what, number in copy.log]


def test_the_next_copy_starts_before_the_step_with_can_prefetch():
    assert order_of(can_prefetch=True) == [
        "fetch 0", "start 0",
        "fetch 1", "start 1", "finish 0", "step 0",
        "fetch 2", "start 2", "finish 1", "step 1",
        "finish 2", "step 2",
    ]  # fmt: skip


def test_the_copy_starts_at_the_request_without_can_prefetch():
    assert order_of(can_prefetch=False) == [
        f"{what} {number}" for number in range(3) for what in ("fetch", "start", "finish", "step")
    ]


@pytest.mark.parametrize("can_prefetch", [True, False])
def test_a_batch_of_none_is_not_moved(can_prefetch):
    mover = Mover(LoggedCopy(), after=lambda batch, index: (batch, index), can_prefetch=True)
    batches = iter([(1.0, "a"), (0.0, None), (2.0, "b")])
    moved = list(mover.move_batches(batches, dataloader_idx=4, can_prefetch=can_prefetch))
    assert moved == [(1.0, ("a", 4)), (0.0, None), (2.0, ("b", 4))]


def numbers(num_samples, **options):
    return DataLoader(TensorDataset(torch.arange(num_samples)), batch_size=2, **options)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_moved_feed_pairs_each_batch_with_its_weight(num_workers, world_size):
    for rank in range(world_size):
        data = TrainData(numbers(13, num_workers=num_workers), rank=rank, world_size=world_size, seed=0)
        feed = data.epoch(0, skip=1)
        plain = [(None if batch is None else batch[0].tolist(), feed.weight) for batch in feed]
        moved = MovedFeed(data.epoch(0, skip=1), Mover(LoggedCopy(), can_prefetch=True))
        assert [(None if batch is None else batch[0].tolist(), moved.weight) for batch in moved] == plain


def test_only_loaders_with_worker_processes_can_prefetch():
    def may(loader, **options):
        return TrainData(loader, rank=0, world_size=1, seed=0, **options).epoch(0).can_prefetch

    class Stateful(DataLoader):
        def state_dict(self): ...

        def load_state_dict(self, state): ...

    assert may(numbers(4, num_workers=1))
    assert not may(numbers(4))
    assert not may([torch.ones(1)])
    assert not may(Stateful(range(4), num_workers=1))
    assert build_eval_data(numbers(4, num_workers=1), rank=0, world_size=1, seed=0, shard=True).can_prefetch


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
def test_no_mover_is_built_on_the_cpu_without_hooks(hook):
    assert build_mover(module=Regression(), datamodule=None, accelerator=CPUAccelerator(), form=BatchForm()) is None
    model = Regression()
    setattr(model, hook, lambda *args: args[0])
    assert build_mover(module=model, datamodule=None, accelerator=CPUAccelerator(), form=BatchForm()) is not None
    assert (
        build_mover(
            module=Regression(),
            datamodule=None,
            accelerator=CPUAccelerator(),
            form=BatchForm(floating_dtype=torch.float64),
        )
        is not None
    )


class Augmented(torch.utils.data.Dataset):
    """Draws random numbers for every sample that it is asked for."""

    def __init__(self):
        self.x, self.y = make_data(32).tensors

    def __len__(self):
        return 32

    def __getitem__(self, index):
        return self.x[index] + 0.1 * torch.randn(8), self.y[index]


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_training_and_resume_inside_an_epoch_are_equal_with_and_without_prefetching(
    loader_workers, tmp_path, quiet, monkeypatch
):
    def fit(name, *, ckpt_path=None, **arguments):
        torch.manual_seed(5)
        model = Regression(dropout=0.3)
        torch.manual_seed(6)
        loader = DataLoader(
            Augmented() if loader_workers == 0 else make_data(32),
            batch_size=4,
            shuffle=True,
            num_workers=loader_workers,
        )
        limits = {"max_epochs": 2, "limit_train_batches": 7, "limit_val_batches": 0}
        trainer = pl.Trainer(num_workers=0, **{**quiet, **limits, **arguments})
        trainer.fit(model, loader, ckpt_path=ckpt_path)
        return model

    plain = fit("plain")
    monkeypatch.setattr(session_module, "build_mover", lambda **_: Mover(LoggedCopy(), can_prefetch=True))
    moved = fit("moved")
    assert moved.losses == plain.losses
    assert_same_weights(weights_of(moved), weights_of(plain))
    saving = pl.ModelCheckpoint(dirpath=tmp_path / "saved", every_n_train_steps=3, save_top_k=-1)
    fit("first", callbacks=saving, enable_checkpointing=True, max_steps=10)
    for step in (3, 9):
        path = next((tmp_path / "saved").glob(f"*step={step}*"))
        resumed = fit("resumed", ckpt_path=path)
        assert resumed.losses == plain.losses[step:]
        assert_same_weights(weights_of(resumed), weights_of(plain))


Pair = collections.namedtuple("Pair", ["x", "name"])


@dataclasses.dataclass
class Sample:
    x: torch.Tensor
    name: str


class Movable:
    def __init__(self, device="nowhere"):
        self.device = device

    def to(self, device):
        return Movable(device)


def test_nested_tensors_are_moved_and_containers_keep_their_type():
    one = torch.ones(1)
    batch = {"a": [one, (one, "text")], "b": Pair(one, "x"), "c": Sample(one, "y"), "d": None, "e": 3}
    moved = map_tensors(batch, lambda tensor: tensor + 1)
    assert moved["a"][0] == moved["a"][1][0] == moved["b"].x == moved["c"].x == 2
    assert (type(moved["b"]), type(moved["c"]), moved["a"][1][1], moved["d"], moved["e"]) == (
        Pair,
        Sample,
        "text",
        None,
        3,
    )
    assert one == 1


def test_objects_with_a_to_method_are_moved_wherever_they_are_nested():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    moved = to_device({"own": [Movable()], "packed": packed, "kind": torch.Tensor}, CPU)
    assert moved["own"][0].device == CPU
    assert isinstance(moved["packed"], PackedSequence)
    assert moved["kind"] is torch.Tensor


def test_only_floating_point_tensors_are_converted_to_the_precision():
    moved = BatchForm(floating_dtype=torch.float64).apply([torch.ones(1), torch.ones(1, dtype=torch.int64)])
    assert [tensor.dtype for tensor in moved] == [torch.float64, torch.int64]


def test_only_tensors_of_four_dimensions_are_converted_to_channels_last():
    form = BatchForm(is_channels_last=True)
    images, labels = form.apply((torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4)))
    assert images.stride() == (60, 1, 15, 3)
    assert labels.is_contiguous()
    assert form.apply([images])[0] is images

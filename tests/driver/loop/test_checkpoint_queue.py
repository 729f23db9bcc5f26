"""Saves during training: contents of the files, and the end of runs whose saves fail."""

import io
import os
import pathlib
import resource
import shutil
import threading
import time
from typing import Any

import pytest
import torch
from models import Regression, RegressionData
from torch import Tensor

import raylit as pl
from raylit.accelerators import CPUAccelerator
from raylit.checkpoint import files, index
from raylit.checkpoint.pending import PIECE_BYTES, HostCopy, PendingCheckpoint
from raylit.driver.loop import checkpoint_queue


class Large(pl.LightningModule):
    """Module with 8 MB of weights that change in every step, and as much momentum; it records them after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(2_000_000))
        self.seen: dict[int, Tensor] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.table * (batch_idx + 1)).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen[self.global_step] = self.table.detach()[:3].clone()


def loader(num_batches: int) -> Any:
    return torch.utils.data.DataLoader(list(range(num_batches)))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses before a failed write is tried again."""
    monkeypatch.setattr(checkpoint_queue, "_RETRY_AFTER_S", (0.01, 0.01))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_asynchronous_save_writes_the_same_bytes(num_workers: int, tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "checkpoints"
    content = []
    for is_async in (True, False):
        torch.manual_seed(1)
        shutil.rmtree(directory, ignore_errors=True)
        saving = pl.ModelCheckpoint(directory, every_n_train_steps=2, save_top_k=-1, save_last=True)
        pl.fit(
            Regression(),
            RegressionData(),
            num_workers=num_workers,
            max_epochs=2,
            callbacks=saving,
            checkpoint_async=is_async,
            logger=False,
            enable_progress_bar=False,
        )
        content.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert len(content[0]) > 4
    assert content[0] == content[1]


def test_each_file_has_the_state_of_its_own_step(tmp_path: pathlib.Path) -> None:
    """Check each file: later steps overwrite the weights while it is being written."""
    model = Large()
    saving = pl.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    pl.fit(model, loader(8), num_workers=0, max_epochs=1, callbacks=saving, logger=False, enable_progress_bar=False)
    for step in range(1, 9):
        checkpoint = files.read(tmp_path / f"step={step}.ckpt")
        table = checkpoint["state_dict"]["table"]
        momentum = checkpoint["optimizer_states"][0]["state"][0]["momentum_buffer"]
        assert torch.equal(table, model.seen[step][0].expand_as(table))
        assert torch.equal(momentum, momentum[0].expand_as(momentum))


class Logged(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.log("loss", float(trainer.global_step))


@pytest.mark.parametrize("is_async", [True, False])
def test_saves_due_at_the_same_step_copy_the_state_once(is_async: bool, tmp_path: pathlib.Path) -> None:
    """Check that each file equals one saved alone, and that names of files under way count as used."""

    class Counting(Large):
        num_taken = 0

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            Counting.num_taken += 1

    own, more = tmp_path / "own", tmp_path / "more"
    savings = [
        pl.ModelCheckpoint(own, "{step}", every_n_train_steps=2, save_top_k=-1, save_last=True),
        pl.ModelCheckpoint(own, "{step}", monitor="loss", every_n_train_steps=2, save_top_k=-1, save_last=True),
        pl.ModelCheckpoint(more, "{step}", every_n_train_steps=2, save_top_k=-1, save_weights_only=True, mode="max"),
        pl.ModelCheckpoint(more, "other", every_n_train_steps=4),
    ]
    model = Counting()
    trainer = pl.Trainer(
        num_workers=0,
        max_epochs=1,
        callbacks=[Logged(), *savings],
        checkpoint_async=is_async,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, loader(4))
    names = {path.name for path in own.glob("*.ckpt")}
    assert names == {f"{name}{version}.ckpt" for name in ("step=2", "step=4", "last") for version in ("", "-v1")}
    assert {path.name for path in more.glob("*.ckpt")} == {"step=2.ckpt", "step=4.ckpt", "other.ckpt"}
    for step in (2, 4):
        for path in (own / f"step={step}.ckpt", own / f"step={step}-v1.ckpt", more / f"step={step}.ckpt"):
            table = files.read(path)["state_dict"]["table"]
            assert torch.equal(table, model.seen[step][0].expand_as(table))
    first, second = (files.read(own / f"step=4{version}.ckpt")["callbacks"] for version in ("", "-v1"))
    assert first[savings[0].state_key] == second[savings[0].state_key]
    assert first[savings[1].state_key]["newest_model_path"] == str(own / "last-v1.ckpt")
    assert second[savings[1].state_key]["best_k_models"].keys() > first[savings[1].state_key]["best_k_models"].keys()
    assert 5 <= Counting.num_taken < 7 if is_async else Counting.num_taken == 7
    assert [saving.newest_model_path for saving in savings[:2]] == [str(own / "last.ckpt"), str(own / "last-v1.ckpt")]


class FullDisk(pl.Callback):
    """Callback that limits the size of files to 1 MB between two steps."""

    def __init__(self, first: int, last: int) -> None:
        self.steps = range(first, last + 1)
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        limit = 1_000_000 if trainer.global_step in self.steps else self.before[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, self.before[1]))

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step >= self.steps[-1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


def test_a_full_disk_warns_once_and_the_next_save_is_tried(soon: None, tmp_path: pathlib.Path) -> None:
    model, directory = Large(), tmp_path / "checkpoints"
    saving = pl.ModelCheckpoint(directory, "{step}", every_n_train_steps=2)
    with pytest.warns(UserWarning, match=r"cannot write .*step=4\.ckpt: .*too large.*next save is tried") as caught:
        pl.fit(
            model,
            loader(10),
            num_workers=0,
            max_epochs=1,
            callbacks=[saving, FullDisk(4, 7)],
            checkpoint_async=False,
            logger=False,
            enable_progress_bar=False,
        )
    assert ["newest checkpoint is" in str(one.message) for one in caught] == [True]
    assert [path.name for path in directory.glob("*.ckpt")] == ["step=10.ckpt"]
    assert saving.best_model_path == str(directory / "step=10.ckpt")
    assert len(model.seen) == 10


def test_an_error_of_the_last_save_is_raised_when_all_is_done(soon: None, tmp_path: pathlib.Path) -> None:
    model, directory = Large(), tmp_path / "checkpoints"
    saving = pl.ModelCheckpoint(directory, "{step}", every_n_train_steps=2)
    disk = FullDisk(4, 4)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "checkpoint_async"), False)
    trainer = pl.Trainer(num_workers=0, max_epochs=1, callbacks=[saving, disk], **quiet)
    try:
        with (
            pytest.warns(UserWarning, match="next save"),
            pytest.raises(pl.CheckpointError, match=r"last save of the run .*ended well"),
        ):
            trainer.fit(model, loader(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, disk.before)
    assert trainer.global_step == 4
    assert torch.equal(model.table.detach()[:3], model.seen[4])
    found = index.find_newest_usable(directory)
    assert found is not None
    assert os.path.basename(found[0]) == "step=2.ckpt" == os.path.basename(saving.best_model_path)


def test_an_unreachable_bucket_does_not_end_the_training(soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    saving = pl.callbacks.base.DriverCallback()

    def save(run: Any) -> None:
        run.save_checkpoint("s3://bucket/a.ckpt")

    saving.on_train_epoch_end = save  # type: ignore[method-assign]
    trainer = pl.Trainer(
        num_workers=0,
        max_epochs=2,
        callbacks=saving,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    told, raised = (
        pytest.warns(UserWarning, match=r"write the checkpoint s3://bucket"),
        pytest.raises(pl.CheckpointError),
    )
    with told as caught, raised:
        trainer.fit(Regression(), RegressionData())
    assert len([one for one in caught if "cannot write" in str(one.message)]) == 1
    assert trainer.current_epoch == 2


def test_a_value_that_a_checkpoint_cannot_hold_is_an_error_at_once(tmp_path: pathlib.Path) -> None:
    class Odd(Regression):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["odd"] = object()

    trainer = pl.Trainer(num_workers=0, max_epochs=2, logger=False, enable_progress_bar=False)
    with pytest.raises(pl.CheckpointError, match=r"checkpoint\['odd'\] is of type builtins\.object"):
        trainer.fit(Odd(), RegressionData())
    assert trainer.global_step == 6


# Pieces of a file


def test_pieces_add_up_to_the_file(tmp_path: pathlib.Path) -> None:
    state = {"large": torch.randn(PIECE_BYTES // 3), "small": torch.arange(3), "empty": torch.empty(0)}
    pending = PendingCheckpoint({**state, "again": state["large"][5:9]}, on_release=lambda: None)
    pieces = pieces_of(pending)
    path = tmp_path / "a"
    path.touch()
    assert pending.fill(str(path))
    assert [len(piece) for piece in pieces] == [PIECE_BYTES, path.stat().st_size - PIECE_BYTES]
    assert path.read_bytes() == b"".join(pieces)
    read = torch.load(path, weights_only=True)
    assert all(torch.equal(read[name], value) for name, value in state.items())
    assert torch.equal(read["again"], state["large"][5:9])


def pieces_of(pending: PendingCheckpoint) -> list[bytes]:
    pending.begin_pieces()
    return list(iter(lambda: pending.next_piece().tobytes(), b""))


def test_pieces_can_be_requested_again_and_released() -> None:
    before = threading.active_count()
    pending = PendingCheckpoint({"large": torch.randn(PIECE_BYTES)}, on_release=lambda: None)
    whole = pieces_of(pending)
    pending.begin_pieces()
    assert pending.next_piece().tobytes() == whole[0]
    assert pieces_of(pending) == whole
    pending.begin_pieces()
    pending.release()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_a_serialization_error_is_raised_by_the_pieces() -> None:
    pending = PendingCheckpoint({"large": torch.randn(PIECE_BYTES), "odd": threading.Lock()}, on_release=lambda: None)
    with pytest.raises(TypeError, match="cannot pickle"):
        pieces_of(pending)


@pytest.mark.parametrize("num_large", [0, 3])
def test_a_host_copy_makes_the_same_file_and_ignores_later_changes(num_large: int) -> None:
    shared = torch.randn(20, 30)
    state: dict[str, Any] = {
        "views": [shared, shared[3:].t(), shared[1]],
        "types": [torch.tensor(3), torch.ones(3, dtype=torch.bfloat16), torch.tensor([True]), torch.empty(0, 3)],
        "complex": torch.randn(4, dtype=torch.complex64).conj(),
        "negated": torch.randn(4, dtype=torch.complex64).conj().imag,
        "large": [torch.randn(500_000) for _ in range(num_large)],
        "plain": {"a": (1, 2.0, "x"), "b": bytearray(b"abc")},
    }
    memory = HostCopy(CPUAccelerator())
    before = file_of(state)
    for _ in range(2):
        copy = memory.copy_state(state)
        shared.add_(1)
        state["plain"]["b"][0] += 1
        assert file_of(copy) == before
        shared.sub_(1)
        state["plain"]["b"][0] -= 1
        memory.lend()
        before = file_of(state)


def file_of(state: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    files.save(state, file)
    return file.getvalue()

"""Collectives of the user's own in steps and hooks, where not all ranks have samples; the numbers stay exact."""

import os

import pytest
import torch
import torch.distributed as dist
from models import assert_same_weights, make_data, weights_of
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import raylit as pl
from raylit.worker.collectives import Collectives


class Gathering(pl.LightningModule):
    """Calls a collective in the hook or step of the given name."""

    def __init__(self, place, kind="all_gather"):
        super().__init__()
        self.place, self.kind = place, kind
        self.net = nn.Linear(8, 3)
        self.num_calls = 0

    def collect(self, place, x):
        if place != self.place:
            return
        self.num_calls += 1
        if self.kind == "all_gather":
            rows = self.all_gather(x)
            assert rows.shape == (self.trainer.world_size, *rows.shape[1:])
            assert len(rows[0]) >= len(x)
        elif self.kind == "all_reduce":
            count = torch.tensor(float(len(x)))
            dist.all_reduce(count)
        elif self.kind == "late" and self.trainer.is_last_batch:
            dist.barrier()

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.collect("training_step", x)
        loss = functional.mse_loss(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_batch_start(self, batch, batch_idx):
        self.collect("on_train_batch_start", batch[0])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.collect("on_train_batch_end", batch[0])

    def on_after_backward(self):
        self.collect("on_after_backward", torch.ones(1))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Evaluating(Gathering):
    def _evaluate(self, name, batch):
        x, _ = batch
        self.collect(f"{name}_step", x)
        self.log("size", float(len(x)), batch_size=1, reduce_fx="sum")
        self.log("mean", x.mean(), batch_size=len(x))

    def validation_step(self, batch, batch_idx):
        self._evaluate("validation", batch)

    def test_step(self, batch, batch_idx):
        self._evaluate("test", batch)

    def predict_step(self, batch, batch_idx):
        self.collect("predict_step", batch[0])
        return batch[0]

    def on_validation_batch_start(self, batch, batch_idx):
        self.collect("on_validation_batch_start", batch[0])

    def on_validation_batch_end(self, outputs, batch, batch_idx):
        self.collect("on_validation_batch_end", batch[0])


class ByHand(Gathering):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class OwnStep(Gathering):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


def trained_by_hand(num_samples, batch_size, num_epochs=2, accumulate=1):
    """One process on the global batches, in the order of the data."""
    torch.manual_seed(3)
    model = Gathering("nowhere")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(num_epochs):
        loader = DataLoader(make_data(num_samples), batch_size=batch_size)
        for index, (x, y) in enumerate(loader):
            (functional.mse_loss(model.net(x), y) / accumulate).backward()
            if (index + 1) % accumulate == 0 or index + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()
    return weights_of(model)


@pytest.mark.parametrize(
    ("kind", "place", "collective"),
    [
        (Gathering, "training_step", "all_gather"),
        (Gathering, "training_step", "all_reduce"),
        (Gathering, "training_step", "late"),
        (Gathering, "on_train_batch_start", "all_gather"),
        (Gathering, "on_train_batch_end", "all_gather"),
        (Gathering, "on_after_backward", "all_reduce"),
        (ByHand, "training_step", "all_gather"),
        (OwnStep, "training_step", "all_gather"),
    ],
)
@pytest.mark.parametrize(("num_samples", "batch_size", "num_workers"), [(5, 2, 2), (7, 4, 2)])
def test_training_with_collectives_where_the_last_batch_is_uneven(
    kind, place, collective, num_samples, batch_size, num_workers, quiet
):
    torch.manual_seed(3)
    model = kind(place, collective)
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=2, **quiet)
    trainer.fit(model, DataLoader(make_data(num_samples), batch_size=batch_size))
    assert model.num_calls > 0
    expected = trained_by_hand(num_samples, batch_size * num_workers)
    assert_same_weights(weights_of(model), expected, rtol=1e-5, atol=1e-6)
    assert trainer.global_step == 2 * -(-num_samples // (batch_size * num_workers))


def test_accumulated_gradients_with_collectives_where_the_last_batch_is_uneven(quiet):
    torch.manual_seed(3)
    model = Gathering("training_step", "all_gather")
    trainer = pl.Trainer(num_workers=2, max_epochs=2, accumulate_grad_batches=2, **quiet)
    trainer.fit(model, DataLoader(make_data(9), batch_size=2))
    expected = trained_by_hand(9, 4, accumulate=2)
    assert_same_weights(weights_of(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("place", "collective"),
    [
        ("validation_step", "all_gather"),
        ("on_validation_batch_start", "all_reduce"),
        ("on_validation_batch_end", "all_gather"),
    ],
)
@pytest.mark.parametrize(("is_stream", "num_samples"), [(False, 9), (False, 11), (True, 9)])
def test_validation_with_collectives_where_a_rank_has_a_batch_less(collective, place, is_stream, num_samples, quiet):
    model = Evaluating(place, collective)
    data = make_data(num_samples)
    loader = DataLoader(Stream(data) if is_stream else data, batch_size=2)
    metrics = pl.Trainer(num_workers=2, **quiet).validate(model, loader, verbose=False)[0]
    assert metrics["size"] == num_samples
    assert metrics["mean"] == pytest.approx(data.tensors[0].mean().item(), abs=1e-6)


def test_testing_and_predicting_with_collectives_where_a_rank_has_a_batch_less(quiet):
    data = make_data(9)
    trainer = pl.Trainer(num_workers=2, **quiet)
    metrics = trainer.test(Evaluating("test_step"), DataLoader(data, batch_size=2), verbose=False)[0]
    assert metrics["size"] == 9
    predictions = trainer.predict(Evaluating("predict_step", "all_reduce"), DataLoader(data, batch_size=2))
    assert torch.equal(torch.cat(predictions), data.tensors[0])


class Counting(Evaluating):
    """Tells how often each rank's own code has run."""

    def validation_step(self, batch, batch_idx):
        self.num_calls += 1

    def on_validation_end(self):
        counts = self.all_gather(torch.tensor(self.num_calls))
        self.counts = counts.tolist()


def test_steps_without_collectives_run_for_a_rank_s_own_batches_only(quiet):
    class Told(Counting):
        def on_validation_epoch_end(self):
            self.log("least", self.all_gather(torch.tensor(float(self.num_calls))).min())

    metrics = pl.Trainer(num_workers=2, **quiet).validate(
        Told("nowhere"), DataLoader(make_data(9), batch_size=2), verbose=False
    )
    assert metrics == [{"least": 2.0}]


class Ragged(Evaluating):
    def validation_step(self, batch, batch_idx):
        x, _ = batch
        dist.all_gather([torch.empty_like(x) for _ in range(2)], x)


def test_collectives_on_tensors_of_different_shapes_are_named(quiet):
    with pytest.raises(
        pl.ModuleError, match=r"rank 0 is in all_gather of \(2, 8\).*rank 1 is in all_gather of \(1, 8\)"
    ):
        pl.Trainer(num_workers=2, **quiet).validate(
            Ragged("nowhere"), DataLoader(make_data(11), batch_size=2), verbose=False
        )


def test_all_gather_at_the_end_of_an_epoch_fills_up_what_is_short(quiet):
    class Kept(Evaluating):
        def on_validation_epoch_start(self):
            self.kept = []

        def validation_step(self, batch, batch_idx):
            self.kept.append(batch[0][:, 0])

        def on_validation_epoch_end(self):
            rows = self.all_gather(torch.cat(self.kept))
            self.log("sum", rows[0].sum() + rows[1][:4].sum())
            self.log("again", rows[1][4])

    x = torch.arange(9.0)[:, None]
    loader = DataLoader(TensorDataset(x, x), batch_size=2)
    metrics = pl.Trainer(num_workers=2, **quiet).validate(Kept("nowhere"), loader, verbose=False)[0]
    assert metrics == {"sum": 36.0, "again": 2.0}  # rank 1 has 2, 3, 6, 7, and begins anew


class Alone(Gathering):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 0:
            dist.all_reduce(torch.ones(3))
        return super().training_step(batch, batch_idx)


@pytest.mark.cluster
def test_a_collective_of_one_rank_alone_is_named_with_what_gloo_said(quiet):
    # Data of several times the size that the other rank waits for: gloo ends the process that gets it.
    model = Alone("nowhere")
    with pytest.raises(pl.WorkerDied, match=r"gloo's last words: .*op\.preamble\.length.* in training_step; rank 1 at"):
        pl.Trainer(num_workers=2, max_epochs=1, **quiet).fit(model, DataLoader(make_data(16), batch_size=2))


def meet(rank, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    peers = Collectives(rank=rank, world_size=2)
    peers.wait_for_all_ranks("trainer.save_checkpoint", notice_s=30, timeout_s=60)
    if rank == 0:
        with pytest.raises(pl.ModuleError, match=r"rank 0 waits in trainer\.save_checkpoint.* collective.* within 2 s"):
            peers.wait_for_all_ranks("trainer.save_checkpoint", notice_s=0.1, timeout_s=2)
    else:
        with pytest.raises(RuntimeError):  # rank 0 has left
            dist.all_reduce(torch.ones(100))
    os._exit(0)  # the group is broken, and its destructor would wait for it


def test_a_rank_that_is_alone_in_save_checkpoint_says_that_it_is_collective(tmp_path, capfd):
    torch.multiprocessing.spawn(meet, (str(tmp_path),), nprocs=2)
    assert "rank 0 waits in trainer.save_checkpoint" in capfd.readouterr().err

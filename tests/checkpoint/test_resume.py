"""A run that is resumed at any batch ends bit-identical to an uninterrupted one, for a table of features.

With another number of workers every sample of the epoch is used once.
"""

import copy
import itertools
import json
import random

import numpy
import pytest
import torch
from models import Regression, assert_same_weights, make_data, weights_of
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)

import raylit as pl

NUM_SAMPLES, BATCH_SIZE = 44, 8  # 6 batches an epoch, the last one smaller


class Recorder(pl.Logger):
    """Keeps what is logged, without the goodput, which differs from run to run."""

    def __init__(self):
        self.rows = []

    def log_metrics(self, metrics, step=None):
        if "goodput/fraction" not in metrics:
            self.rows.append((step, dict(metrics)))


class SaveAt(pl.Callback):
    """Saves after so many batches, wherever that falls."""

    def __init__(self, directory, *counts):
        self.directory, self.counts = directory, counts

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        number = trainer.current_epoch * 100 + batch_idx + 1
        if number in self.counts:
            trainer.save_checkpoint(self.directory / f"{number}.ckpt")


class Plain(Regression):
    """Draws random numbers of every kind in its steps."""

    def __init__(self, **options):
        super().__init__(dropout=0.3, **options)
        self.net.append(nn.BatchNorm1d(3))

    def training_step(self, batch, batch_idx):
        if isinstance(batch, dict):
            batch = [
                torch.cat(parts) for parts in zip(*[part for part in batch.values() if part is not None], strict=True)
            ]
        loss = super().training_step(batch, batch_idx)
        noise = torch.rand(()) + random.random() + numpy.random.rand()
        self.log("noise", noise, on_step=True, on_epoch=True)
        self.log("most", noise, on_step=False, on_epoch=True, reduce_fx="max")
        return loss + 0.01 * noise * self.net[0].weight.sum()


class Ranged(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("range", loss, on_step=False, on_epoch=True, reduce_fx=lambda kept: kept.max() - kept.min())
        return loss


class Scheduled(Plain):
    def __init__(self, make, **config):
        super().__init__(optimizer="adam")
        self.make, self.config = make, config

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.make(optimizer), **self.config}}


class OnPlateau(Scheduled):
    def __init__(self):
        super().__init__(
            lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5),
            monitor="val_loss",
        )


class Two(Plain):
    """Automatic optimization of two optimizers, the second for two batches after each one of the first."""

    frequencies = (1, 2)

    def training_step(self, batch, batch_idx, optimizer_idx):
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        parts = [self.net[0].parameters(), self.net[3].parameters()]
        optimizers = [torch.optim.Adam(part, lr=0.02) for part in parts]
        if self.frequencies is None:
            return optimizers
        return tuple(
            {"optimizer": optimizer, "frequency": frequency}
            for optimizer, frequency in zip(optimizers, self.frequencies, strict=True)
        )


class Together(Two):
    frequencies = None


class Manual(Two):
    """Accumulates over three batches by hand."""

    frequencies = None

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        loss = Plain.training_step(self, batch, batch_idx)
        self.manual_backward(loss)
        if (self.trainer.current_epoch * 6 + batch_idx) % 3 == 2:
            first.step()
            first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()


class WithClosure(Plain):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2, history_size=3)


class Stepping(Plain):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)


class Noisy(Dataset):
    """Augments at random, in whatever process it is read."""

    def __init__(self):
        self.data = make_data(NUM_SAMPLES)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, y = self.data[index]
        return x + torch.rand(()) + random.random() + numpy.random.rand(), y


class Stream(IterableDataset):
    def __iter__(self):
        data = Noisy()
        yield from (data[index] for index in torch.randperm(NUM_SAMPLES).tolist())


class StatefulStream(IterableDataset):
    def __init__(self):
        self.position, self.is_resumed = 0, False

    def __iter__(self):
        data = Noisy()
        self.position = self.position if self.is_resumed else 0
        self.is_resumed = False
        while self.position < NUM_SAMPLES:
            self.position += 1
            yield data[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position, self.is_resumed = state["position"], True


def loader(**options):
    return DataLoader(Noisy(), **{"batch_size": BATCH_SIZE, "shuffle": True, **options})


def stateful_loader(**options):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(make_data(NUM_SAMPLES), batch_size=BATCH_SIZE, shuffle=True, **options)


def combined(mode):
    return pl.CombinedLoader({"a": loader(), "b": loader(batch_size=20)}, mode)


ADAM = lambda: Plain(optimizer="adam")  # noqa: E731
CASES = {
    # what: (module, loader, Trainer's arguments)
    "sgd": (Plain, loader, {}),
    "adam": (ADAM, loader, {}),
    "in order": (Ranged, lambda: loader(shuffle=False), {}),
    "epoch scheduler": (lambda: Scheduled(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)), loader, {}),
    "step scheduler": (
        lambda: Scheduled(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 18), interval="step", frequency=1),
        loader,
        {},
    ),
    "plateau": (OnPlateau, loader, {"limit_val_batches": 1.0, "val_check_interval": 2}),
    "two optimizers": (Two, loader, {}),
    "optimizers together": (Together, loader, {"accumulate_grad_batches": 4}),
    "manual": (Manual, loader, {}),
    "closure": (WithClosure, loader, {}),
    "own step": (Stepping, loader, {"accumulate_grad_batches": 4}),
    "accumulation": (ADAM, loader, {"accumulate_grad_batches": 4}),
    "accumulation by epoch": (ADAM, loader, {"accumulate_grad_batches": {0: 1, 1: 5}}),
    "clipping": (ADAM, loader, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2, "track_grad_norm": 2}),
    "bf16": (ADAM, loader, {"precision": "bf16-mixed"}),
    "scaler": (ADAM, loader, {"precision": "16-mixed", "accumulate_grad_batches": 4}),
    "double": (ADAM, loader, {"precision": "64-true"}),
    "ema": (ADAM, loader, {"callbacks": lambda: [pl.callbacks.EMAWeightAveraging(decay=0.9)]}),
    "swa": (
        ADAM,
        loader,
        {"callbacks": lambda: [pl.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=2)]},
    ),
    "validation in mid-epoch": (Plain, loader, {"limit_val_batches": 1.0, "val_check_interval": 0.5}),
    "limited": (Plain, loader, {"limit_train_batches": 4}),
    "fraction": (Plain, loader, {"limit_train_batches": 0.7}),
    "overfitting": (Plain, lambda: loader(shuffle=False), {"overfit_batches": 4}),
    "generator": (Plain, lambda: loader(generator=torch.Generator().manual_seed(4)), {}),
    "weighted": (Plain, lambda: loader(shuffle=False, sampler=WeightedRandomSampler(torch.arange(44.0), 44)), {}),
    "batch sampler": (
        Plain,
        lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(NUM_SAMPLES)), 8, True)),
        {},
    ),
    "own split": (Plain, loader, {"use_distributed_sampler": False}),
    "cycle": (Plain, lambda: combined("max_size_cycle"), {}),
    "max": (Plain, lambda: combined("max_size"), {}),
    "min": (Plain, lambda: combined("min_size"), {"max_epochs": 4}),
    "one after the other": (Plain, lambda: pl.CombinedLoader([loader(), loader()], "sequential"), {}),
    "stream": (Plain, lambda: DataLoader(Stream(), batch_size=BATCH_SIZE), {}),
    "stateful stream": (Plain, lambda: DataLoader(StatefulStream(), batch_size=BATCH_SIZE), {}),
    "stateful loader": (Plain, stateful_loader, {}),
    "processes": (Plain, lambda: loader(num_workers=2), {}),
    "persistent processes": (Plain, lambda: loader(num_workers=2, persistent_workers=True), {}),
    "two workers": (ADAM, lambda: loader(batch_size=4), {"num_workers": 2, "accumulate_grad_batches": 4}),
    "two workers, manual": (Manual, lambda: loader(batch_size=4), {"num_workers": 2}),
    "two workers, processes": (Plain, lambda: loader(batch_size=4, num_workers=2), {"num_workers": 2}),
}

FROM_SEVERAL = {"adam", "plateau", "manual", "accumulation by epoch", "swa", "cycle"}


def fitted(module, make_loader, directory, *, saves=(), ckpt_path=None, arguments):
    """Return the trainer and everything that was logged."""
    arguments = dict(arguments)
    callbacks = [*arguments.pop("callbacks", list)(), SaveAt(directory, *saves)]
    recorder = Recorder()
    settings = {"max_epochs": 3, "limit_val_batches": 0, "num_workers": 0, "log_every_n_steps": 1, **arguments}
    trainer = pl.Trainer(
        **settings,
        callbacks=callbacks,
        logger=recorder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    val = DataLoader(make_data(20, seed=2), batch_size=8) if settings["limit_val_batches"] else None
    trainer.fit(module, make_loader(), val, ckpt_path=ckpt_path)
    return trainer, recorder.rows


def seeded(seed):
    torch.manual_seed(seed), random.seed(seed), numpy.random.seed(seed)


def assert_same(left, right, where=""):
    if torch.is_tensor(left):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}/{index}")
    else:
        assert left == right or left != left, (where, left, right)


@pytest.mark.filterwarnings("ignore:the training loader is a stream", "ignore:overfit_batches")
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated", "ignore:.*lr_scheduler.step", "ignore:Detected call of")
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_at_any_batch_ends_bit_identical(case, tmp_path):
    make, make_loader, arguments = CASES[case]
    seeded(3)
    module = make()
    fresh = copy.deepcopy(module)
    points = (2, 103) if case in FROM_SEVERAL else (103,)
    whole, rows = fitted(module, make_loader, tmp_path, saves=(*points, 202), arguments=arguments)
    expected = torch.load(tmp_path / "202.ckpt", weights_only=True)
    for point in points:
        (tmp_path / str(point)).mkdir()
        seeded(99)
        resumed, continued = fitted(
            copy.deepcopy(fresh),
            make_loader,
            tmp_path / str(point),
            saves=(202,),
            ckpt_path=tmp_path / f"{point}.ckpt",
            arguments=arguments,
        )
        again = resumed.lightning_module
        assert_same_weights(weights_of(again), weights_of(module))
        assert (resumed.global_step, resumed.current_epoch) == (whole.global_step, whole.current_epoch)
        assert_same(whole.callback_metrics, resumed.callback_metrics)
        assert continued
        assert_same(rows[-len(continued) :], continued, "logged")
        actual = torch.load(tmp_path / str(point) / "202.ckpt", weights_only=True)
        for key in ("optimizer_states", "lr_schedulers", "epoch", "global_step", "state_dict", "raylit"):
            assert_same(expected[key], actual[key], key)


class Seen(pl.LightningModule):
    """Writes down what every rank is given."""

    def __init__(self, directory):
        super().__init__()
        self.directory = directory
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        numbers = batch[0]
        with open(self.directory / f"{self.global_rank}.txt", "a") as file:
            file.write(json.dumps([self.current_epoch, batch_idx, numbers.tolist()]) + "\n")
        self.log("mean", numbers.mean(), on_step=False, on_epoch=True)
        return (self.weight - numbers).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seen_in(directory):
    lines = itertools.chain.from_iterable(path.read_text().splitlines() for path in directory.glob("*.txt"))
    return [json.loads(line) for line in lines]


@pytest.mark.filterwarnings("ignore:checkpoints go to")
def test_changing_the_number_of_workers_twice_in_an_epoch_uses_every_sample_once(quiet, tmp_path):
    data = torch.utils.data.TensorDataset(torch.arange(47.0))
    path = None
    # Three workers' batches of 3 are 9 samples a step, two workers' 6: 9 + 12 + 26.
    for num_workers, max_steps in ((3, 1), (2, 3), (0, -1)):
        directory = tmp_path / str(num_workers)
        directory.mkdir()
        saving = pl.ModelCheckpoint(directory, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer = pl.Trainer(
            **{**quiet, "enable_checkpointing": True},
            num_workers=num_workers,
            max_steps=max_steps,
            max_epochs=2,
            callbacks=saving,
        )
        pl.seed_everything(4, verbose=False)
        trainer.fit(Seen(directory), DataLoader(data, batch_size=3, shuffle=True), ckpt_path=path)
        path = directory / f"step={trainer.global_step}.ckpt"
    rows = [row for num_workers in (3, 2, 0) for row in seen_in(tmp_path / str(num_workers))]
    assert sorted(number for epoch, _, numbers in rows for number in numbers if epoch == 0) == list(range(47))
    assert sorted(number for epoch, _, numbers in rows for number in numbers if epoch == 1) == list(range(47))
    assert [batch for epoch, batch, _ in seen_in(tmp_path / "0") if epoch == 0] == list(range(3, 12))
    assert trainer.global_step == 12 + 16

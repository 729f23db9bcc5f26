"""Small modules and data that the tests train, and the hand-written loops they are compared with."""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import raylit as pl


def make_data(num_samples=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples, 8, generator=generator)
    y = x @ torch.randn(8, 3, generator=generator) + 0.1 * torch.randn(num_samples, 3, generator=generator)
    return TensorDataset(x, y)


class Regression(pl.LightningModule):
    """A small network on `make_data`; keeps every loss that a hook on the worker saw."""

    def __init__(self, width=16, dropout=0.0, lr=0.05, optimizer="sgd"):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.mse_loss(self(x), y)
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", functional.mse_loss(self(x), y), prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_loss", functional.mse_loss(self(x), y))

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
        return kinds[self.hparams.optimizer](self.parameters(), lr=self.hparams.lr)


class RegressionData(pl.DataModule):
    def __init__(self, batch_size=8, num_train=48, num_val=20):
        self.batch_size = batch_size
        self.num_train = num_train
        self.num_val = num_val

    def setup(self):
        self.train = make_data(self.num_train)
        self.val = make_data(self.num_val, seed=2)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=self.batch_size)

    def loader_for_test(self):
        self.setup()
        return self.val_dataloader()

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def train_by_hand(model, dataset, *, batch_size, num_epochs, seed, clip=None, accumulate=1):
    """The loop that a user would write; returns the losses."""
    optimizer = model.configure_optimizers()
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler)
    losses = []
    model.train()
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        for index, (x, y) in enumerate(loader):
            loss = functional.mse_loss(model(x), y)
            losses.append(loss.item())
            (loss / accumulate).backward()
            if (index + 1) % accumulate and index + 1 < len(loader):
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return losses


def fit(model, *, num_samples=48, batch_size=8, num_workers=0, max_epochs=2, data=None, ckpt_path=None, **arguments):
    """Train quietly on what `batches` yields, shared out over the workers."""
    loader = DataLoader(data or make_data(num_samples), batch_size=batch_size // max(1, num_workers), shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    torch.manual_seed(5)
    trainer = pl.Trainer(num_workers=num_workers, max_epochs=max_epochs, **{**quiet, **arguments})
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer


def batches(*, epochs=2, num_samples=48, batch_size=8, data=None):
    """What a single process trains on: (epoch, batch_idx, batch)."""
    data = data or make_data(num_samples)
    sampler = DistributedSampler(data, num_replicas=1, rank=0, seed=5)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch_idx, batch in enumerate(DataLoader(data, batch_size=batch_size, sampler=sampler)):
            yield epoch, batch_idx, batch


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(left, right, **tolerance):
    """Bit for bit, unless a tolerance is given."""
    assert left.keys() == right.keys()
    for name in left:
        if tolerance:
            torch.testing.assert_close(left[name], right[name], **tolerance)
        else:
            assert torch.equal(left[name], right[name]), name


def images():
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(16, 3, 6, 6, generator=generator), torch.randint(0, 2, (16,), generator=generator))


class Pictures(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
        self.layouts = set()

    def forward(self, x):
        tensors = (x, self.net[0].weight)
        self.layouts.add(tuple(one.is_contiguous(memory_format=torch.channels_last) for one in tensors))
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self(x), y)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

"""Find a learning rate and a batch size before training: on the digits of scikit-learn, in seconds.

python examples/find_lr.py                  in this process
python examples/find_lr.py --num-workers 1  as Ray Tune's trials, several at a time
python examples/find_lr.py --pictures .     also saves what was found as PNG files (needs matplotlib)
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import raylit as pl


class Digits(pl.DataModule):
    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str | None = None) -> None:
        images, labels = load_digits(return_X_y=True)
        digits = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
        self.train, self.val = random_split(digits, [0.8, 0.2], torch.Generator().manual_seed(1))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)


class Classifier(pl.LightningModule):
    """`lr` is a guess, and a bad one."""

    def __init__(self, lr: float = 1e-6) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.net(images).argmax(dim=1) == labels).float().mean()
        self.log("accuracy", accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--pictures", type=Path, default=None, help="a directory")
    arguments = parser.parse_args()

    pl.seed_everything(1)
    model, data = Classifier(), Digits(batch_size=64)
    trainer = pl.Trainer(
        num_workers=arguments.num_workers,
        max_epochs=5,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )

    # The fastest of the sizes that divide the 64 samples of a step; what is missing to 64 is accumulated.
    size = trainer.tuner.scale_batch_size(model, datamodule=data, mode="throughput", init_val=8)
    sizes = trainer.tuner.batch_sizes
    print(f"batch size: {size}, {sizes.rule}")

    # One training whose rate rises from step to step.
    curve = trainer.tuner.lr_find(model, datamodule=data, update_attr=False)
    print(f"range test: lr = {curve.suggestion():.1e}, {curve.rule}")

    # Eight trainings that start alike, each with its rate; those behind are cut. Sets model.hparams.lr.
    race = trainer.tuner.lr_find(model, datamodule=data, method="race", num_candidates=8, num_training=54)
    print(f"race: lr = {model.hparams.lr:.1e}, {race.rule}")

    if arguments.pictures is not None:
        for name, found in {"sizes": sizes, "range": curve, "race": race}.items():
            found.plot(suggest=True, path=arguments.pictures / f"{name}.png")

    trainer.fit(model, data)
    print(f"accuracy: {trainer.callback_metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()

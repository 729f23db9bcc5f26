"""Handwritten digits: a LightningModule and a DataModule, trained by two Ray actors. Driver."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import raylit as pl


class Digits(pl.DataModule):
    """The 1,797 images of 8x8 pixels that come with scikit-learn: 1,297 to train, 250 to validate, 250 to test."""

    def __init__(self, batch_size: int = 32) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        dataset = TensorDataset(images, torch.tensor(digits.target))
        # Every worker must come to the same split.
        generator = torch.Generator().manual_seed(0)
        self.train, self.val, self.test = random_split(dataset, [1297, 250, 250], generator)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.test)

    def _loader(self, dataset: Dataset[tuple[Tensor, ...]], shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle)


class ConvNet(pl.LightningModule):
    """Two convolutions and a linear layer: 29,000 parameters."""

    def __init__(self, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(2 * width * 4 * 4, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    def _evaluate(self, name: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        self.log(f"{name}_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log(f"{name}_acc", (logits.argmax(dim=1) == labels).float().mean(), prog_bar=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 trains in this process")
    parser.add_argument("--max-epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32, help="of each worker")
    parser.add_argument("--accelerator", default="auto", help="such as cpu, gpu or xla")
    args = parser.parse_args()

    pl.seed_everything(1)
    model, digits = ConvNet(), Digits(args.batch_size)
    trainer = pl.fit(
        model,
        digits,
        num_workers=args.num_workers,
        max_epochs=args.max_epochs,
        accelerator=args.accelerator,
        log_every_n_steps=10,
    )
    (result,) = trainer.test(datamodule=digits)

    print(f"test accuracy: {result['test_acc']:.4f}")
    print(f"checkpoint: {trainer.checkpoint_callback.best_model_path}")
    print("curves: tensorboard --logdir lightning_logs")


if __name__ == "__main__":
    main()

"""Prediction: every worker writes its own share, and nothing passes through the driver. Driver."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from digits import ConvNet, Digits
from torch import Tensor
from torch.utils.data import DataLoader

import raylit as pl


class Classifier(ConvNet):
    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(dim=1)


class FilePerWorker(pl.BasePredictionWriter):
    """Leaves `predictions-RANK.pt`: for each sample its index in the data set and its class."""

    def __init__(self, directory: Path) -> None:
        super().__init__(write_interval="epoch")
        self.directory = directory

    def write_on_epoch_end(
        self, trainer: Any, pl_module: pl.LightningModule, predictions: Sequence[Tensor], batch_indices: Sequence[Any]
    ) -> None:
        (of_loader,) = batch_indices
        indices = [index for batch in of_loader for index in batch]
        rows = torch.stack([torch.tensor(indices), torch.cat(list(predictions))], dim=1)
        torch.save(rows, self.directory / f"predictions-{trainer.global_rank}.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 predicts in this process")
    parser.add_argument("--max-epochs", type=int, default=6)
    parser.add_argument("--directory", type=Path, default=Path("predictions"))
    args = parser.parse_args()
    directory = args.directory.absolute()
    directory.mkdir(exist_ok=True)

    pl.seed_everything(1)
    model, digits = Classifier(), Digits()
    shape = {"num_workers": args.num_workers, "logger": False, "enable_checkpointing": False}
    pl.fit(model, digits, max_epochs=args.max_epochs, **shape)

    trainer = pl.Trainer(callbacks=FilePerWorker(directory), **shape)
    # The workers have set up copies of the data module; this process needs the data to compare with.
    digits.setup("predict")
    loader = DataLoader(digits.test, batch_size=32)
    trainer.predict(model, loader, return_predictions=False)

    files = sorted(directory.glob("predictions-*.pt"))
    rows = torch.cat([torch.load(file) for file in files])
    labels = torch.tensor([int(label) for _, label in loader.dataset])
    print(f"samples predicted: {len(rows[:, 0].unique())} of {len(labels)}, in {len(files)} files")
    print(f"accuracy: {(rows[:, 1] == labels[rows[:, 0]]).float().mean():.4f}")


if __name__ == "__main__":
    main()

"""A character model of text, trained by truncated back-propagation through time. Driver.

The text is what scikit-learn ships on its data sets: 45,000 characters of English.
"""

import argparse
import math
from collections import Counter
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl


def corpus() -> str:
    folder = files("sklearn.datasets.descr")
    return "\n".join(
        sorted(entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".rst"))
    )


class Text(pl.DataModule):
    """Long rows of characters, of which the next is to be told."""

    def __init__(self, batch_size: int = 8, num_steps: int = 256) -> None:
        super().__init__()
        self.batch_size = batch_size
        text = corpus()
        common = [character for character, count in Counter(text).most_common() if count > 10]
        self.alphabet = ["?", *sorted(common)]
        index = {character: number for number, character in enumerate(self.alphabet)}
        codes = torch.tensor([index.get(character, 0) for character in text])
        num_rows = (len(codes) - 1) // num_steps
        inputs = codes[: num_rows * num_steps].reshape(num_rows, num_steps)
        targets = codes[1 : num_rows * num_steps + 1].reshape(num_rows, num_steps)
        self.train = TensorDataset(inputs[:-32], targets[:-32])
        self.val = TensorDataset(inputs[-32:], targets[-32:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=self.batch_size)


class CharacterModel(pl.LightningModule):
    """An LSTM. `training_step` sees 64 characters at a time and hands its state on to the next 64."""

    def __init__(self, num_characters: int, width: int = 96, lr: float = 4e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(num_characters, 32)
        self.lstm = nn.LSTM(32, width, batch_first=True)
        self.head = nn.Linear(width, num_characters)

    def forward(self, characters: Tensor, hiddens: Any = None) -> tuple[Tensor, Any]:
        out, hiddens = self.lstm(self.embedding(characters), hiddens)
        return self.head(out), hiddens

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, hiddens: Any) -> dict[str, Any]:
        inputs, targets = batch
        logits, hiddens = self(inputs, hiddens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("train_loss", loss, prog_bar=True)
        return {"loss": loss, "hiddens": hiddens}

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        logits, _ = self(inputs)
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), targets.flatten()), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 trains in this process")
    parser.add_argument("--max-epochs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=64, help="characters between two backward passes")
    args = parser.parse_args()

    pl.seed_everything(1)
    text = Text()
    model = CharacterModel(len(text.alphabet))
    trainer = pl.fit(
        model,
        text,
        num_workers=args.num_workers,
        max_epochs=args.max_epochs,
        truncated_bptt_steps=args.steps,
        gradient_clip_val=1.0,
    )
    bits = trainer.callback_metrics["val_loss"].item() / math.log(2)
    print(f"{bits:.2f} bits per character, of {math.log2(len(text.alphabet)):.2f} without a model")


if __name__ == "__main__":
    main()

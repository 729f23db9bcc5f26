"""A small language model whose weights, gradients and optimizer states are shared out over the workers. Driver.

`configure_model` builds it on the meta device: no process ever holds the whole of it while it trains. The checkpoint is
a directory that each worker writes its part of; `raylit checkpoint consolidate DIRECTORY FILE` makes one file of it.
"""

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

TEXT = (
    "the quick brown fox jumps over the lazy dog and the lazy dog sleeps on while the quick brown fox looks for "
    "another dog to jump over and finds none "
) * 40
VOCABULARY = sorted(set(TEXT))


def windows(length: int) -> TensorDataset:
    """Pieces of the text and what comes one letter later."""
    numbers = torch.tensor([VOCABULARY.index(letter) for letter in TEXT])
    starts = range(0, len(numbers) - length - 1, length)
    return TensorDataset(
        torch.stack([numbers[start : start + length] for start in starts]),
        torch.stack([numbers[start + 1 : start + length + 1] for start in starts]),
    )


class Block(nn.Module):
    """Attention to what came before, then a hidden layer. Each block is gathered when it is its turn."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.inputs(self.norms[0](x)).view(batch, length, self.num_heads, -1).transpose(1, 2).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.outputs(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.hidden(self.norms[1](x))


class Letters(pl.LightningModule):
    """Predicts the next letter."""

    def __init__(self, width: int = 64, num_blocks: int = 4, num_heads: int = 4, length: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.blocks: Any = None

    def configure_model(self) -> None:
        if self.blocks is not None:  # after a fit the driver's model has them
            return
        sizes = self.hparams
        self.embedding = nn.Embedding(len(VOCABULARY), sizes.width)
        self.places = nn.Embedding(sizes.length, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.num_heads) for _ in range(sizes.num_blocks))
        self.head = nn.Linear(sizes.width, len(VOCABULARY))

    def forward(self, letters: Tensor) -> Tensor:
        x = self.embedding(letters) + self.places(torch.arange(letters.shape[1], device=letters.device))
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        letters, following = batch
        loss = F.cross_entropy(self(letters).flatten(0, 1), following.flatten())
        self.log("loss", loss, prog_bar=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        letters, following = batch
        self.log("val_loss", F.cross_entropy(self(letters).flatten(0, 1), following.flatten()))

    def on_train_start(self) -> None:
        parts = [part.to_local() if isinstance(part, DTensor) else part for part in self.parameters()]
        own = sum(part.numel() for part in parts)
        whole = sum(parameter.numel() for parameter in self.parameters())
        print(f"holds {own:,} of {whole:,} parameters")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    pl.seed_everything(0)
    data = windows(32)
    model = Letters()
    trainer = pl.Trainer(num_workers=args.num_workers, strategy="fsdp", max_epochs=args.epochs)
    trainer.fit(model, DataLoader(data, batch_size=8, shuffle=True), DataLoader(data, batch_size=8))
    assert trainer.checkpoint_callback is not None
    print(f"a checkpoint is in {trainer.checkpoint_callback.best_model_path}")

    # Without the letters that it has learned, a model knows as much as the alphabet has letters.
    print(f"val_loss {trainer.callback_metrics['val_loss']:.2f}, at first {math.log(len(VOCABULARY)):.2f}")
    letters = torch.tensor([[VOCABULARY.index(letter) for letter in "the quick "]])
    for _ in range(20):
        with torch.no_grad():
            letters = torch.cat([letters, model(letters[:, -32:])[:, -1:].argmax(-1)], dim=1)
    print("".join(VOCABULARY[int(letter)] for letter in letters[0]))


if __name__ == "__main__":
    main()

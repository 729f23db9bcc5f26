"""A GAN on handwritten digits: two optimizers, driven automatically or by hand (`--manual`). Driver.

The generator's images are judged by a classifier that was trained on real digits: how sure it is of what it sees.
"""

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import raylit as pl

NUM_LATENT = 16


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images of 64 pixels in [-1, 1], and their labels."""
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)


class GAN(pl.LightningModule):
    """Generator against discriminator, after Goodfellow et al. 2014, https://arxiv.org/abs/1406.2661."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.generator = nn.Sequential(
            nn.Linear(NUM_LATENT, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64)
        )
        self.discriminator = nn.Sequential(
            nn.Linear(64, 128),
            nn.LeakyReLU(0.2),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.LeakyReLU(0.2),
            nn.Linear(64, 1),
        )

    def forward(self, latent: Tensor) -> Tensor:
        return torch.tanh(self.generator(latent))

    def loss(self, images: Tensor, optimizer_idx: int) -> Tensor:
        """Of the generator (0): the discriminator takes its images for real. Of the discriminator (1): it does not."""
        fake = self(torch.randn(len(images), NUM_LATENT, device=self.device))
        if optimizer_idx == 0:
            loss = F.softplus(-self.discriminator(fake)).mean()
            self.log("generator_loss", loss, prog_bar=True)
        else:
            loss = F.softplus(-self.discriminator(images)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
            self.log("discriminator_loss", loss, prog_bar=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int, optimizer_idx: int) -> Tensor:
        return self.loss(batch[0], optimizer_idx)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(network.parameters(), lr=self.hparams.lr, betas=(0.5, 0.99))
            for network in (self.generator, self.discriminator)
        ]


class ManualGAN(GAN):
    """The same steps, written out."""

    def __init__(self, lr: float = 1e-3) -> None:
        super().__init__(lr)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            loss = self.loss(batch[0], index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def confidence(images: Tensor) -> tuple[float, int]:
    """How sure a classifier of real digits is of its answers on average, and how many digits it sees."""
    real, labels = digits()
    classifier = LogisticRegression(max_iter=2000).fit(real.numpy(), labels.numpy())
    probabilities = classifier.predict_proba(images.numpy())
    return float(probabilities.max(axis=1).mean()), len(set(probabilities.argmax(axis=1)))


def picture(image: Tensor) -> str:
    shades = " .:-=+*#%@"
    levels = ((image + 1) / 2 * (len(shades) - 1)).round().int().reshape(8, 8).tolist()
    return "\n".join("".join(shades[level] * 2 for level in row) for row in levels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--manual", action="store_true", help="optimize by hand in training_step")
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 trains in this process")
    parser.add_argument("--max-epochs", type=int, default=40)
    args = parser.parse_args()

    pl.seed_everything(1)
    model = ManualGAN() if args.manual else GAN()
    images, _ = digits()
    loader = DataLoader(TensorDataset(images), batch_size=32, shuffle=True, drop_last=True)
    trainer = pl.fit(model, loader, num_workers=args.num_workers, max_epochs=args.max_epochs)

    model.eval()
    with torch.no_grad():
        made = model(torch.randn(500, NUM_LATENT))
    sure, num_digits = confidence(made)
    print(picture(made[0]))
    print(f"optimizer steps: {trainer.global_step}")
    print(f"confidence: {sure:.3f} over {num_digits} digits")


if __name__ == "__main__":
    main()

"""Finetuning: a backbone that knows the digits 0 to 4 learns 5 to 9, the head first. Driver."""

import argparse
from copy import deepcopy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split

import raylit as pl


class Digits(pl.DataModule):
    """Some classes of scikit-learn's 1,797 images, numbered from 0: `num_train` to train on, the rest to test."""

    def __init__(self, classes: range, num_train: int) -> None:
        super().__init__()
        self.classes = classes
        self.num_train = num_train

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
        labels = torch.tensor(digits.target)
        chosen = (labels >= self.classes.start) & (labels < self.classes.stop)
        dataset = TensorDataset(images[chosen], labels[chosen] - self.classes.start)
        # Every worker must come to the same split.
        generator = torch.Generator().manual_seed(0)
        sizes = [self.num_train, len(dataset) - self.num_train]
        self.train, self.test = random_split(dataset, sizes, generator)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.train, shuffle=True)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.test)

    def _loader(self, dataset: Dataset[tuple[Tensor, ...]], shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(dataset, batch_size=10, shuffle=shuffle)


class Classifier(pl.LightningModule):
    """Convolutions as `backbone`, which BackboneFinetuning freezes and thaws, and a linear head for five classes."""

    def __init__(self, backbone: nn.Module | None = None, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.backbone = backbone or nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 16),
            nn.ReLU(),
        )
        self.head = nn.Linear(16, 5)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.head(self.backbone(images)), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("test_acc", (self.head(self.backbone(images)).argmax(dim=1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # What is frozen joins later, as a group with a learning rate of its own.
        is_new = all(parameter.requires_grad for parameter in self.backbone.parameters())
        return torch.optim.Adam(self.parameters() if is_new else self.head.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 trains in this process")
    parser.add_argument("--max-epochs", type=int, default=6, help="of each of the trainings")
    args = parser.parse_args()
    shape = {"num_workers": args.num_workers, "max_epochs": args.max_epochs}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    pl.seed_everything(1)
    pretrained = Classifier()
    pl.fit(pretrained, Digits(range(5), num_train=600), **shape, **quiet)

    others = Digits(range(5, 10), num_train=200)
    accuracies = []
    for thaw_at in (args.max_epochs, args.max_epochs // 2):
        model = Classifier(deepcopy(pretrained.backbone))
        finetuning = pl.BackboneFinetuning(unfreeze_backbone_at_epoch=thaw_at)
        trainer = pl.fit(model, others, callbacks=finetuning, **shape, **quiet)
        (result,) = trainer.test(model, datamodule=others, verbose=False)
        accuracies.append(result["test_acc"])
    print("accuracy: {:.4f} with a frozen backbone, {:.4f} finetuned".format(*accuracies))


if __name__ == "__main__":
    main()

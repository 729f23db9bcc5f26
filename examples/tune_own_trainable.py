"""A trainable of one's own for Ray Tune, with a raylit Trainer in it: it reports, saves, stops and goes on by itself.

    python examples/tune_own_trainable.py --num-workers 2

ASHA ends trials that fall behind. With --pbt, population based training copies the better trials' weights to the worse
ones and changes their learning rates. Both see each validation, its metrics and a checkpoint: `trial` does
nothing for it. Its last line prints the best trial's accuracy.
"""

import argparse
import os
import tempfile

import ray
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import raylit as pl


class Classifier(pl.LightningModule):
    def __init__(self, lr: float, width: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_acc", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


class Digits(pl.DataModule):
    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.data, dtype=torch.float32) / 16
        both = TensorDataset(images, torch.tensor(digits.target))
        self.train, self.val = random_split(both, [1500, 297], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=50, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=100)


def trial(config: dict) -> None:
    trainer = pl.Trainer(
        num_workers=config["num_workers"],
        max_epochs=config["max_epochs"],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(lr=config["lr"], width=config["width"]), Digits())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--max-epochs", type=int, default=8)
    parser.add_argument("--num-trials", type=int, default=6)
    parser.add_argument("--pbt", action="store_true")
    arguments = parser.parse_args()
    pl.seed_everything(0)  # the configs are drawn in this process
    scheduler = ASHAScheduler(max_t=arguments.max_epochs, grace_period=2, reduction_factor=2)
    if arguments.pbt:
        scheduler = PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=2,
            hyperparam_mutations={"lr": tune.loguniform(1e-4, 1.0)},
        )
    ray.init(log_to_driver=False)
    # The trial's own process only waits for its workers: they use the CPUs that it holds.
    room = {"cpu": max(1, arguments.num_workers)}
    tuner = tune.Tuner(
        tune.with_resources(trial, room),
        param_space={
            "lr": tune.loguniform(1e-4, 1.0),
            "width": tune.choice([32, 128]),
            "num_workers": arguments.num_workers,
            "max_epochs": arguments.max_epochs,
        },
        # With reuse_actors the next trial takes over the process of the last, and its workers.
        tune_config=tune.TuneConfig(
            metric="val_acc", mode="max", num_samples=arguments.num_trials, scheduler=scheduler, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            storage_path=tempfile.mkdtemp(),
            # Of each trial. Population based training may come back to any of another trial's.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=None if arguments.pbt else 2),
            verbose=0,
        ),
    )
    results = tuner.fit()
    for result in results:
        metrics = result.metrics
        print(f"lr={result.config['lr']:.5f} epochs={metrics['epoch'] + 1} val_acc={metrics['val_acc']:.3f}")
    best = results.get_best_result()
    with best.checkpoint.as_directory() as directory:
        model = Classifier.load_from_checkpoint(os.path.join(directory, "checkpoint.ckpt"))
    print(f"best: lr={model.hparams.lr:.5f} with a validation accuracy of {best.metrics['val_acc']:.3f}")


if __name__ == "__main__":
    main()

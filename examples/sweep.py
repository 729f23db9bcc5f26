"""Digits: eight sizes and learning rates of a network tried in parallel, the losers cut early; the best is tested."""

import argparse
from typing import Any

from digits import ConvNet, Digits
from ray import tune
from ray.tune.schedulers import ASHAScheduler

import raylit as pl


def build(config: dict[str, Any]) -> tuple[pl.LightningModule, pl.DataModule]:
    return ConvNet(width=config["width"], lr=config["lr"]), Digits(config["batch_size"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=0, help="of each trial; 0 trains in the trial's process")
    parser.add_argument("--num-samples", type=int, default=8)
    parser.add_argument("--max-epochs", type=int, default=8)
    args = parser.parse_args()

    pl.seed_everything(1)
    result = pl.sweep(
        build,
        {
            "width": tune.choice([4, 8, 16]),
            "lr": tune.loguniform(1e-4, 3e-2),
            "batch_size": tune.choice([32, 64]),
        },
        metric="val_acc",
        mode="max",
        num_samples=args.num_samples,
        num_workers=args.num_workers,
        max_epochs=args.max_epochs,
        scheduler=ASHAScheduler(max_t=args.max_epochs, grace_period=2, reduction_factor=2),
    )

    print(result.dataframe()[["config/width", "config/lr", "config/batch_size", "status", "epoch", "best val_acc"]])
    print(f"best: {result.best_config}, in {result.best_checkpoint}")
    (tested,) = pl.test(result.best_model, datamodule=Digits(), num_workers=0, logger=False)
    print(f"curves: tensorboard --logdir {result.directory}")
    print(f"test accuracy: {tested['test_acc']:.4f}")


if __name__ == "__main__":
    main()

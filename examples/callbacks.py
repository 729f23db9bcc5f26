"""Callbacks: some of raylit's and one of our own, on the workers beside the model. Driver."""

import argparse
import time

import torch
from digits import ConvNet, Digits

import raylit as pl


class Hardest(pl.Callback):
    """Remembers the batches with the highest losses; it goes on where it was in a resumed run."""

    def __init__(self, num_kept: int = 3) -> None:
        self.num_kept = num_kept
        self.kept: list[tuple[float, int, int]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: dict, batch: list, batch_idx: int
    ) -> None:
        self.kept.append((outputs["loss"].item(), trainer.current_epoch, batch_idx))
        self.kept = sorted(self.kept, reverse=True)[: self.num_kept]

    def state_dict(self) -> dict:
        return {"kept": self.kept}

    def load_state_dict(self, state_dict: dict) -> None:
        self.kept = state_dict["kept"]


class Scheduled(ConvNet):
    """The digits' network with a learning rate that falls as training goes on."""

    def configure_optimizers(self) -> dict:
        optimizer = super().configure_optimizers()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-workers", type=int, default=2, help="Ray actors; 0 trains in this process")
    parser.add_argument("--max-epochs", type=int, default=12)
    args = parser.parse_args()

    pl.seed_everything(1)
    model, hardest, timer = Scheduled(), Hardest(), pl.Timer({"minutes": 10})
    stops = pl.EarlyStopping("val_acc", mode="max", patience=2, min_delta=0.002)
    best = pl.ModelCheckpoint(monitor="val_acc", mode="max", filename="{epoch}-{val_acc:.3f}", save_last=True)
    started = time.strftime("%H:%M:%S")
    trainer = pl.fit(
        model,
        Digits(),
        num_workers=args.num_workers,
        max_epochs=args.max_epochs,
        log_every_n_steps=10,
        callbacks=[
            hardest,
            timer,
            stops,
            best,
            pl.EMAWeightAveraging(decay=0.95),
            pl.LearningRateMonitor(),
            pl.LambdaCallback(on_train_start=lambda trainer, module: module.print(f"training since {started}")),
        ],
    )

    (result,) = trainer.test(model, datamodule=Digits())
    for loss, epoch, batch_idx in hardest.kept:
        print(f"hard: batch {batch_idx} of epoch {epoch}, loss {loss:.2f}")
    print(f"stopped: {stops.stopping_reason_message or 'after the last epoch'}, in {timer.time_elapsed():.1f} s")
    print(f"best checkpoint: {best.best_model_path}")
    print(f"last learning rate: {trainer.callback_metrics['lr-Adam']:.6f}")
    print(f"test accuracy of the averaged weights: {result['test_acc']:.4f}")


if __name__ == "__main__":
    main()

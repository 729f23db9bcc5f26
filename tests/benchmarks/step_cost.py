"""What a training step costs over the hand-written loop: tiny MLP, batch 4, everything switched on.

    python tests/benchmarks/step_cost.py

Contenders run in turn within each round, so that a ratio compares neighbours in time.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peers import WARM_UP, by_hand, dataset, installed, module_class, table
from torch.utils.data import DataLoader

import raylit as pl

WIDTH, HIDDEN, BATCH_SIZE = 16, 32, 4


def with_trainer(trainer: Any, base: Any, num_steps: int) -> float:
    """Seconds per step under a Trainer of raylit's or of Lightning's."""
    model = module_class(base)(width=WIDTH, hidden=HIDDEN, num_steps=num_steps)
    data = dataset((WARM_UP + num_steps + 1) * BATCH_SIZE, width=WIDTH)
    trainer.fit(model, DataLoader(data, batch_size=BATCH_SIZE, shuffle=True))
    return model.clock.seconds_per_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-steps", type=int, default=2000)
    args = parser.parse_args()
    directory = tempfile.mkdtemp()
    lightning = installed("lightning")
    times: dict[str, list[float]] = {}

    def note(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    for _ in range(args.rounds):
        shape = {"width": WIDTH, "hidden": HIDDEN, "batch_size": BATCH_SIZE}
        note("by hand", by_hand(**shape, num_steps=args.num_steps))
        for num_workers in (0, 1):
            trainer = pl.Trainer(num_workers=num_workers, max_epochs=1, default_root_dir=directory)
            note(f"raylit, num_workers={num_workers}", with_trainer(trainer, pl.LightningModule, args.num_steps))
        if lightning is None:
            continue
        common = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": directory, "enable_model_summary": False}
        note(
            "Lightning, defaults",
            with_trainer(lightning.Trainer(**common), lightning.LightningModule, args.num_steps),
        )
        bare = lightning.Trainer(**common, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        note("Lightning, all switched off", with_trainer(bare, lightning.LightningModule, args.num_steps))
    table(times, "by hand")


if __name__ == "__main__":
    main()

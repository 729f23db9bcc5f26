"""What a training step costs over the hand-written loop: tiny MLP, batch 4, everything switched on.

    python tests/benchmarks/step_cost.py

The hand-written loop logs nothing. It runs before and after each contender: a ratio compares neighbours in time.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from peers import WARM_UP, by_hand, compare, dataset, installed, module_class
from torch.utils.data import DataLoader

import raylit as pl

WIDTH, HIDDEN, BATCH_SIZE = 16, 32, 4


def with_trainer(trainer: Any, base: Any, num_steps: int) -> float:
    """Seconds per step under a Trainer of raylit's or of Lightning's."""
    model = module_class(base)(width=WIDTH, hidden=HIDDEN, num_steps=num_steps)
    data = dataset((WARM_UP + num_steps + 1) * BATCH_SIZE, width=WIDTH)
    trainer.fit(model, DataLoader(data, batch_size=BATCH_SIZE, shuffle=True))
    return float(model.clock.seconds_per_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--without-peers", action="store_true")
    args = parser.parse_args()
    directory = tempfile.mkdtemp()
    steps = args.num_steps

    def raylit(num_workers: int) -> float:
        trainer = pl.Trainer(num_workers=num_workers, max_epochs=1, default_root_dir=directory)
        return with_trainer(trainer, pl.LightningModule, steps)

    contenders = {f"raylit, num_workers={number}": partial(raylit, number) for number in (0, 1)}
    lightning = None if args.without_peers else installed("lightning")
    if lightning is not None:
        off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        common = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": directory, "enable_model_summary": False}
        for name, arguments in {"defaults": common, "all switched off": {**common, **off}}.items():
            contenders[f"Lightning, {name}"] = partial(with_lightning, lightning, arguments, steps)
    shape = {"width": WIDTH, "hidden": HIDDEN, "batch_size": BATCH_SIZE}
    compare("by hand", partial(by_hand, **shape, num_steps=steps), contenders, num_rounds=args.rounds)


def with_lightning(lightning: Any, arguments: dict[str, Any], num_steps: int) -> float:
    return with_trainer(lightning.Trainer(**arguments), lightning.LightningModule, num_steps)


if __name__ == "__main__":
    main()

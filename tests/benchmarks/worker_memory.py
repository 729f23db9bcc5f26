"""What a worker process holds beyond a process of the hand-written loop, at the end of the same training.

    python tests/benchmarks/worker_memory.py

USS is the memory that nobody else shares: what one more worker costs the host. RSS counts shared libraries as well.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from memory import megabytes
from peers import by_hand, dataset, module_class
from torch.utils.data import DataLoader

import raylit as pl

WIDTH, HIDDEN, BATCH_SIZE, NUM_STEPS = 16, 32, 4, 200
SHAPE = {"width": WIDTH, "hidden": HIDDEN, "num_steps": NUM_STEPS}


class Measured(module_class(pl.LightningModule)):  # type: ignore[misc]
    """Every rank's memory at the end of the training."""

    def on_train_end(self) -> None:
        measured = (megabytes(), packages())
        self.ranks: list[Any] = [measured] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(self.ranks, measured)


def packages() -> set[str]:
    """Imported by this process, the standard library's left out."""
    return {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)


def of_the_hand_written_loop() -> tuple[dict[str, float], set[str]]:
    """In a process of its own, beside this one, with which it shares torch's libraries as a worker does."""
    done = subprocess.run([sys.executable, __file__, "--by-hand"], capture_output=True, text=True, check=True)
    memory, imported = json.loads(done.stdout.splitlines()[-1])
    return memory, set(imported)


def of_workers(num_workers: int) -> list[tuple[dict[str, float], set[str]]]:
    model = Measured(**SHAPE)
    loader = DataLoader(dataset(BATCH_SIZE * NUM_STEPS * num_workers, width=WIDTH), batch_size=BATCH_SIZE, shuffle=True)
    pl.fit(model, loader, num_workers=num_workers, max_epochs=1, logger=False, enable_progress_bar=False)
    return list(model.ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--by-hand", action="store_true", help="be the process of the hand-written loop")
    parser.add_argument("--show-packages", action="store_true", help="name what only workers import")
    args = parser.parse_args()
    if args.by_hand:
        by_hand(**SHAPE, batch_size=BATCH_SIZE)
        print(json.dumps([megabytes(), sorted(packages())]))
        return
    base, base_packages = of_the_hand_written_loop()
    print(f"{'by hand':24}USS {base['uss']:6.1f} MB              RSS {base['rss']:6.1f} MB")
    for num_workers in (1, 2):
        memory, imported = max(of_workers(num_workers), key=lambda rank: rank[0]["uss"])
        print(
            f"{f'raylit, num_workers={num_workers}':24}"
            f"USS {memory['uss']:6.1f} MB ({memory['uss'] - base['uss']:+6.1f})     "
            f"RSS {memory['rss']:6.1f} MB ({memory['rss'] - base['rss']:+6.1f})"
        )
        if args.show_packages:
            print("    imported beyond it:", ", ".join(sorted(imported - base_packages)))


if __name__ == "__main__":
    main()

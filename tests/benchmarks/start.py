"""From the start of a script to its first training step on two fresh CPU workers, and from a later fit to its own.

    python tests/benchmarks/start.py

Each contender is a script in a new process; what it prints in its first step is a point in time.
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time

MODEL = """
import time, torch
from torch.utils.data import DataLoader, TensorDataset
data = TensorDataset(torch.randn(64, 8), torch.randn(64, 1))
def module(base):
    class Module(base):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 1)
            self.first = 0.0
        def training_step(self, batch, batch_idx):
            if batch_idx == 0:
                self.first = time.time()
                print("FIRST", self.first, flush=True)
            return (self.layer(batch[0]) - batch[1]).pow(2).mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)
    return Module
"""
RAYLIT = """
import raylit as pl
def fit(kind, trainer):
    model = module(pl.LightningModule)()
    started = time.time()
    trainer.fit(model, DataLoader(data, batch_size=8))
    print(kind, model.first - started)
    print(kind + "-WHOLE", time.time() - started)
def trainer():
    return pl.Trainer(num_workers=2, max_epochs=1, enable_progress_bar=False)
if __name__ == "__main__":
    first = trainer()
    fit("COLD", first)
    fit("SAME", first)
    fit("NEW", trainer())
"""
LIGHTNING = """
import lightning
if __name__ == "__main__":
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                                enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(module(lightning.LightningModule)(), DataLoader(data, batch_size=8))
"""
RAY_TRAIN = """
import ray.train
from ray.train.torch import TorchTrainer
def loop():
    model = ray.train.torch.prepare_model(torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for index, (x, y) in enumerate(ray.train.torch.prepare_data_loader(DataLoader(data, batch_size=8))):
        if index == 0:
            print("FIRST", time.time(), flush=True)
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
if __name__ == "__main__":
    TorchTrainer(loop, scaling_config=ray.train.ScalingConfig(num_workers=2)).fit()
"""


AGAIN = {
    "SAME": "second fit, the same Trainer, to its first step",
    "NEW": "third fit, a new Trainer, to its first step",
    "NEW-WHOLE": "all of it",
}


def run(source: str) -> tuple[float, dict[str, float]]:
    """Seconds to the first step of the process that had one first, and what the script says of its own fits."""
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as directory:
        path = os.path.join(directory, "script.py")
        with open(path, "w") as file:
            file.write(textwrap.dedent(MODEL + source))
        started = time.time()
        done = subprocess.run(
            [sys.executable, path],
            cwd=directory,
            env={**os.environ, "RAY_TMPDIR": directory},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
    words = (done.stdout + done.stderr).split()
    firsts = [float(words[index + 1]) for index, word in enumerate(words) if word.endswith("FIRST")]
    since = {word: float(words[index + 1]) for index, word in enumerate(words) if word in AGAIN}
    return min(firsts) - started, since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    contenders = {"raylit": RAYLIT, "Ray Train": RAY_TRAIN}
    if importlib.util.find_spec("lightning") is not None:
        contenders["Lightning, ddp"] = LIGHTNING
    times: dict[str, list[float]] = {name: [] for name in contenders}
    again: dict[str, list[float]] = {words: [] for words in AGAIN.values()}
    for _ in range(args.rounds):
        for name, source in contenders.items():
            seconds, since = run(source)
            times[name].append(seconds)
            for kind, value in since.items():
                again[AGAIN[kind]].append(value)
    print("from the script's start to the first step:")
    for name, values in times.items():
        print(f"    {name:50}{statistics.median(values):8.2f} s  ({min(values):.2f} - {max(values):.2f})")
    ratios = [own / other for own, other in zip(times["raylit"], times["Ray Train"], strict=True)]
    print(f"    {'raylit / Ray Train':50}{statistics.median(ratios):8.2f}    ({min(ratios):.2f} - {max(ratios):.2f})")
    print("raylit, workers that are there:")
    for name, values in again.items():
        print(f"    {name:50}{statistics.median(values):8.3f} s  ({min(values):.3f} - {max(values):.3f})")


if __name__ == "__main__":
    main()

"""A sweep of 8 and of 32 trials, beside Ray Tune with a Lightning training in each trial, and the trainings alone.

    python tests/benchmarks/sweep.py

Each contender is a script in a new process, timed from its start to its end: the same network, data, rates and epochs,
one CPU for each trial, a report and a checkpoint after each epoch.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import textwrap
import time

MODEL = """
import sys, time, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
NUM_TRIALS = int(sys.argv[1])
def loaders():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 32, generator=generator)
    data = TensorDataset(x, x @ torch.randn(32, 1, generator=generator))
    return DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=256)
def module(base, lr):
    class Module(base):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))
        def training_step(self, batch, batch_idx):
            return (self.layers(batch[0]) - batch[1]).pow(2).mean()
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", (self.layers(batch[0]) - batch[1]).pow(2).mean())
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=lr)
    return Module()
"""
RAYLIT = """
import raylit as pl
from ray import tune
def build(config):
    return (module(pl.LightningModule, config["lr"]), *loaders())
if __name__ == "__main__":
    result = pl.sweep(build, {"lr": tune.loguniform(1e-4, 1e-2)}, metric="val_loss", num_samples=NUM_TRIALS,
                      num_workers=NUM_WORKERS, max_epochs=5, logger=False)
    assert [trial.status for trial in result.trials] == ["finished"] * NUM_TRIALS, result.errors
"""
LIGHTNING = """
import lightning
from ray import tune
from ray.tune.integration.pytorch_lightning import TuneReportCheckpointCallback
def train(config):
    torch.manual_seed(0)
    trainer = lightning.Trainer(max_epochs=5, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
                                enable_checkpointing=False, enable_model_summary=False,
                                callbacks=[TuneReportCheckpointCallback(["val_loss"], on="validation_end")])
    trainer.fit(module(lightning.LightningModule, config["lr"]), *loaders())
if __name__ == "__main__":
    import os
    place = os.getcwd()
    results = tune.Tuner(
        tune.with_resources(train, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(metric="val_loss", mode="min", num_samples=NUM_TRIALS, reuse_actors=IS_REUSING),
        run_config=tune.RunConfig(storage_path=place, name="peer", verbose=0,
                                  checkpoint_config=tune.CheckpointConfig(num_to_keep=1)),
    ).fit()
    assert len(results) == NUM_TRIALS and not results.errors
"""
ALONE = """
import raylit as pl
if __name__ == "__main__":
    trainer = pl.Trainer(max_epochs=5, num_workers=NUM_WORKERS, logger=False, enable_progress_bar=False,
                         enable_checkpointing=False, enable_model_summary=False)
    for _ in range(3):
        started = time.perf_counter()
        trainer.fit(module(pl.LightningModule, 1e-3), *loaders())
        seconds = time.perf_counter() - started
    print("ALONE", seconds)
"""


def run(source: str, num_trials: int, **constants: object) -> tuple[float, str]:
    """Seconds from the script's start to its end, and what it printed."""
    with tempfile.TemporaryDirectory(prefix="rl-", dir="/tmp") as directory:
        path = os.path.join(directory, "script.py")
        with open(path, "w") as file:
            lines = "".join(f"{name} = {value!r}\n" for name, value in constants.items())
            file.write(textwrap.dedent(MODEL) + lines + textwrap.dedent(source))
        started = time.time()
        done = subprocess.run(
            [sys.executable, path, str(num_trials)],
            cwd=directory,
            env={**os.environ, "RAY_TMPDIR": directory},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        seconds = time.time() - started
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
    return seconds, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--without-peers", action="store_true")
    args = parser.parse_args()
    contenders = {
        "raylit, 1 worker": (RAYLIT, {"NUM_WORKERS": 1}),
        "raylit, the trial's process": (RAYLIT, {"NUM_WORKERS": 0}),
    }
    if not args.without_peers and importlib.util.find_spec("lightning") is not None:
        contenders["Tune and Lightning"] = (LIGHTNING, {"IS_REUSING": False})
        contenders["Tune and Lightning, reuse_actors"] = (LIGHTNING, {"IS_REUSING": True})
    alone_s = {number: float(run(ALONE, 1, NUM_WORKERS=number)[1].split("ALONE ")[1].split()[0]) for number in (1, 0)}
    num_slots = os.cpu_count() or 1
    print(f"a training alone, warm: {alone_s[1]:.2f} s with 1 worker, {alone_s[0]:.2f} s in the process")
    times: dict[tuple[str, int], float] = {}
    for name, (source, constants) in contenders.items():
        for number in args.trials:
            times[name, number] = run(source, number, **constants)[0]
            print(f"    {name:40}{number:4} trials {times[name, number]:8.2f} s", flush=True)
    few, many = min(args.trials), max(args.trials)
    for name, (source, constants) in contenders.items():
        if source is RAYLIT and many > few:
            # Start and end cost the same; further trials run on all cores at once.
            each_s = (times[name, many] - times[name, few]) / (many - few) * num_slots
            print(f"{name}: {each_s - alone_s[int(constants['NUM_WORKERS'])]:.2f} s beside a further trial's training")
    for number in args.trials:
        for peer in (name for name in contenders if name.startswith("Tune")):
            for own in (name for name in contenders if name.startswith("raylit")):
                print(f"{number} trials: {own} / {peer}: {times[own, number] / times[peer, number]:.2f}")


if __name__ == "__main__":
    main()

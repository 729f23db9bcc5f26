"""Settings that cannot work on XLA are refused before the run."""

import os
import subprocess
import sys

import pytest
from xla.xla_models import QUIET, require_xla

import raylit as pl

require_xla()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "16-mixed"}, "use 'bf16-mixed'"),
        ({"compile": True}, "XLA compiles each step as a whole already"),
        ({"sync_batchnorm": True, "num_workers": 2}, "use one worker"),
        ({"strategy": pl.FSDPStrategy(cpu_offload=True)}, "use strategy='fsdp'"),
        ({"strategy": pl.DDPStrategy(static_graph=True)}, "use 'auto', 'ddp' or 'fsdp'"),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, message):
    with pytest.raises(pl.ConfigError, match=message):
        pl.Trainer(**{**QUIET, **arguments})


START = """
import torch, raylit
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Model(raylit.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

def fit():
    try:
        trainer = raylit.Trainer(accelerator="xla", max_epochs=1, logger=False, enable_checkpointing=False)
        trainer.fit(Model(), DataLoader(TensorDataset(torch.ones(4, 2)), batch_size=2))
        print("trained")
    except raylit.ConfigError as error:
        print(error)
"""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("first", "device", "message"),
    [
        ("nn.Linear(2, 1)(torch.ones(1, 2)).sum().backward()", "CPU", "a backward pass has run in this process before"),
        ("import torch_xla; torch_xla.device()", "CPU", "torch_xla has been used in this process before, without SPMD"),
        (
            "raylit.accelerators.get_accelerator('xla').device(); Model().layer(torch.ones(2)).backward()",
            "CPU",
            "trained",
        ),
        ("", None, "this machine has no TPU and PJRT_DEVICE is not set"),
    ],
)
def test_a_start_that_cannot_work_is_explained(first, device, message):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_USE_SPMD", "PJRT_"))}
    if device is not None:
        environment["PJRT_DEVICE"] = device
    done = subprocess.run(
        [sys.executable, "-c", f"{START}\n{first}\nfit()"], env=environment, capture_output=True, text=True, timeout=280
    )
    assert message in done.stdout, done.stdout + done.stderr

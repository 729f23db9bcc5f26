"""What a training step costs on XLA over the hand-written loop: a small MLP on XLA's CPU device.

    PJRT_DEVICE=CPU CPU_NUM_DEVICES=1 python tests/benchmarks/xla_step.py

It needs torch_xla. Both loops divide each batch over the devices and sync once a step; the one by hand logs nothing. It
runs before and after each round of raylit's: a ratio compares neighbours in time.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from peers import WARM_UP, Clock, compare, dataset, module_class, network
from torch.nn import functional
from torch.utils.data import DataLoader

import raylit as pl
from raylit.accelerators import get_accelerator


def by_hand(*, width: int, hidden: int, batch_size: int, num_steps: int) -> float:
    """Seconds per step of the loop that a user of torch_xla would write, without any logging."""
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.distributed.spmd as spmd
    import torch_xla.runtime as runtime

    device, num_devices = torch_xla.device(), runtime.global_runtime_device_count()
    mesh = spmd.Mesh(np.arange(num_devices), (num_devices,), ("data",))
    sharding = spmd.ShardingSpec(mesh, ("data", None))
    torch.manual_seed(0)
    model = network(width=width, hidden=hidden).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    loader = DataLoader(
        dataset((WARM_UP + num_steps + 1) * batch_size, width=width), batch_size=batch_size, shuffle=True
    )
    clock = Clock(num_steps)
    for index, batch in enumerate(loader):
        clock.tick(index)
        x, y = (xm.send_cpu_data_to_device([tensor], device, sharding)[0] for tensor in batch)
        optimizer.zero_grad()
        loss = functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        torch_xla.sync()
    return clock.seconds_per_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    get_accelerator("xla").device()
    directory = tempfile.mkdtemp()

    def raylit() -> float:
        trainer = pl.Trainer(accelerator="xla", max_epochs=1, default_root_dir=directory)
        model = module_class(pl.LightningModule)(width=args.width, hidden=args.hidden, num_steps=args.num_steps)
        data = dataset((WARM_UP + args.num_steps + 1) * args.batch_size, width=args.width)
        trainer.fit(model, DataLoader(data, batch_size=args.batch_size, shuffle=True))
        return float(model.clock.seconds_per_step)

    shape = {"width": args.width, "hidden": args.hidden, "batch_size": args.batch_size, "num_steps": args.num_steps}
    compare("by hand", partial(by_hand, **shape), {"raylit, num_workers=0": raylit}, num_rounds=args.rounds)


if __name__ == "__main__":
    main()

"""The whole chain on a slice of two hosts with four devices each, which Ray nodes of this machine pretend to be."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("torch_xla", reason="needs torch_xla, which runs in a venv of its own", exc_type=ImportError)

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SCRIPT = """
    import copy, json, os

    import ray
    import torch
    from models import Regression, RegressionData
    from tpu_hosts import add_slice, start_cluster

    import raylit as pl

    class Model(Regression):
        def training_step(self, batch, batch_idx):
            loss = torch.nn.functional.mse_loss(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def on_fit_start(self):
            import torch_xla.runtime as runtime

            facts = {
                "rank": self.trainer.global_rank,
                "worker_id": os.environ["TPU_WORKER_ID"],
                "devices": runtime.global_runtime_device_count(),
                "device": str(self.device),
            }
            print(json.dumps(facts), flush=True)

    class OnCPU(Model):
        on_fit_start = Regression.on_fit_start

    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    torch.manual_seed(3)
    model, reference = Model(), OnCPU()
    reference.load_state_dict(model.state_dict())
    reference.losses = []

    cluster = start_cluster()
    try:
        add_slice(cluster, "pod")
        ray.init(address=cluster.address, log_to_driver=False)
        trainer = pl.Trainer(accelerator="tpu", tpu_cores=8, max_epochs=2, **quiet)
        assert trainer._plan.workers.accelerator.name == "xla"
        trainer.fit(model, RegressionData(batch_size=8, num_train=64))
        trainer.save_checkpoint("trained.ckpt")
        tested = trainer.validate(model, RegressionData(batch_size=8, num_train=64))[0]["val_loss"]
    finally:
        pl.shutdown()
        ray.shutdown()
        cluster.shutdown()

    single = pl.Trainer(accelerator="cpu", num_workers=0, max_epochs=2, enable_checkpointing=False, **quiet)
    single.fit(reference, RegressionData(batch_size=16, num_train=64))
    expected = single.validate(reference, RegressionData())[0]["val_loss"]
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    difference = max(float((mine - theirs).abs().max()) for mine, theirs in pairs)
    saved = torch.load("trained.ckpt", weights_only=False, map_location="cpu")["state_dict"]
    lost = max(float((saved[name] - value).abs().max()) for name, value in model.state_dict().items())
    print(json.dumps({"difference": difference, "val_loss": abs(tested - expected), "lost": lost}), flush=True)
"""


def test_a_module_trains_on_an_emulated_slice_as_on_the_cpu(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line[line.index("{") :]) for line in done.stdout.splitlines() if "{" in line]
    *workers, result = lines
    workers.sort(key=lambda worker: worker["rank"])
    assert [(worker["rank"], worker["worker_id"], worker["devices"]) for worker in workers] == [
        (0, "0", 4),
        (1, "1", 4),
    ]
    assert {worker["device"] for worker in workers} == {"xla:0"}
    assert result["difference"] < 1e-6
    assert result["val_loss"] < 1e-6
    assert result["lost"] == 0

"""What Ray's agent exports of a real run, read as Prometheus does. It needs the packages of ray[default]."""

import json

import pytest

SCRIPT = """
import json, re, sys, threading, time, urllib.request
import ray
import torch
from torch.utils.data import DataLoader, TensorDataset
import raylit as pl

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        time.sleep(0.05 if self.trainer.global_rank else 0.02)
        return self.net(batch[0]).mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

seen = {}
def scrape():
    while True:
        time.sleep(0.5)
        if ray.is_initialized() and (nodes := ray.nodes()) and nodes[0]["MetricsExportPort"]:
            url = f"http://{nodes[0]['NodeManagerAddress']}:{nodes[0]['MetricsExportPort']}/metrics"
            try:
                text = urllib.request.urlopen(url, timeout=5).read().decode()
            except OSError:
                continue
            lines = re.findall(r'^ray_(raylit_\\w+){.*(?:rank|cause)="(\\w+)".*} (\\S+)$', text, re.MULTILINE)
            seen.update({f"{name} {tag}": float(value) for name, tag, value in lines})

if __name__ == "__main__":
    threading.Thread(target=scrape, daemon=True).start()
    pl.fit(Model(), DataLoader(TensorDataset(torch.rand(800, 2)), batch_size=4), num_workers=2, max_epochs=2,
           log_every_n_steps=10, logger=False, enable_progress_bar=False)
    print(json.dumps(seen))
"""


@pytest.mark.cluster
def test_each_rank_exports_its_times_and_memory(run_script, monkeypatch):
    pytest.importorskip("opencensus", reason="Ray exports metrics where ray[default] is installed")
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    seen = json.loads(run_script(SCRIPT).splitlines()[-1])
    for rank in (0, 1):
        assert seen[f"raylit_step_time_s {rank}"] >= 0.05
        assert 0 < seen[f"raylit_samples_per_s {rank}"] <= 4 / 0.05
        assert seen[f"raylit_data_wait_s {rank}"] >= 0.0
        assert seen[f"raylit_host_memory_bytes {rank}"] > 1e8
        assert seen[f"raylit_checkpoint_time_s {rank}"] > 0
    assert seen["raylit_goodput_s_total start"] > 0
    assert seen["raylit_goodput_s_total steps"] > 5
    assert seen["raylit_collective_wait_s 0"] > seen["raylit_collective_wait_s 1"]

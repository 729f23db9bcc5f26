"""The bars in a notebook: a real kernel, seen as a front end sees it."""

import re

import pytest

CODE = """
import torch
import raylit as pl
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
    def training_step(self, batch, batch_idx):
        loss = self.layer(batch[0]).square().mean()
        self.log("loss <1>", loss, prog_bar=True)
        return loss
    def validation_step(self, batch, batch_idx):
        self.log("val", 0.5, prog_bar=True)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=2)
trainer = pl.Trainer(num_workers=0, max_epochs=3, logger=False, enable_checkpointing=False, enable_model_summary=False)
trainer.fit(Net(), data, data)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cell_shows_bars_that_are_updated_in_place() -> None:
    pytest.importorskip("ipykernel")
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(kernel_name="python3")
    outputs: dict[str, list[dict[str, str]]] = {}
    others = []

    def show(message: dict[str, object]) -> None:
        content = message["content"]
        assert isinstance(content, dict)
        if message["msg_type"] in ("display_data", "update_display_data"):
            outputs.setdefault(content["transient"]["display_id"], []).append(content["data"])
        elif message["msg_type"] in ("stream", "error"):
            others.append(content)

    try:
        client.execute_interactive(CODE, output_hook=show, timeout=90)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert [str(output.get("text")).split()[0] for output in others] == ["goodput"], others
    # One output for the epochs, whichever is under way, and one for what runs inside them.
    assert len(outputs) == 2
    lasts = [versions[-1] for versions in outputs.values()]
    assert sorted(last["text/plain"] for last in lasts)[0] == ""
    last = max(lasts, key=lambda last: len(last["text/plain"]))
    assert re.fullmatch(r"Epoch 2/2: 4/4 \[\S+, \S+ it/s, loss <1>=\S+, val=0\.500]", last["text/plain"])
    assert '<progress max="4" value="4">' in last["text/html"]
    assert "loss &lt;1&gt;=" in last["text/html"]

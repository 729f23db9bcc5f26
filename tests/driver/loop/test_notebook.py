"""Runs in a notebook: classes of its cells are sent to the workers, and the kernel stays usable however a run ends.

A real kernel is driven as a front end does it.
"""

import os
import re
import shutil
import tempfile
import time

import pytest

CELLS = {
    "definitions": """
        import time, torch
        import raylit as pl
        from torch.utils.data import DataLoader, TensorDataset

        class Net(pl.LightningModule):
            def __init__(self, delay_s=0.0):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
                self.delay_s = delay_s
                self.num_seen = 0
            def training_step(self, batch, batch_idx):
                if batch_idx == 2 and self.delay_s:
                    print("training")
                time.sleep(self.delay_s)
                self.num_seen += 1
                return self.layer(batch[0]).square().mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        data = DataLoader(TensorDataset(torch.randn(400, 4)), batch_size=4)
        trainer = pl.Trainer(num_workers=2, max_epochs=1, logger=False, enable_progress_bar=False)
        """,
    "interrupted": "trainer.fit(Net(delay_s=0.1), data)",
    "again": """
        print("interrupted", trainer.interrupted, trainer.global_step < 50)
        net = Net()
        trainer.fit(net, data)
        print("fitted", net.num_seen, trainer.interrupted)
        """,
    "failing": """
        class Net(Net):
            def training_step(self, batch, batch_idx):
                raise ValueError("wrong on purpose")
        trainer.fit(Net(), data)
        """,
    "changed": """
        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)
            def training_step(self, batch, batch_idx):
                self.is_new = True
                return self.layer(batch[0]).square().mean()
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)
        net = Net()
        trainer.fit(net, data)
        print("new", net.is_new)
        """,
}


class Notebook:
    def __init__(self, directory):
        from jupyter_client.manager import start_new_kernel

        environment = {**os.environ, "RAY_TMPDIR": directory}
        self.kernel, self.client = start_new_kernel(kernel_name="python3", env=environment)

    def run(self, name, *, interrupt_at=None):
        """Run a cell; return its output or its error's name and text. Interrupt the kernel at `interrupt_at`."""
        shown = []
        is_sent = False

        def show(message):
            nonlocal is_sent
            content = message["content"]
            if message["msg_type"] == "stream":
                shown.append(content["text"])
            elif message["msg_type"] == "error":
                shown.append(f"{content['ename']}: {content['evalue']}\n" + "\n".join(content["traceback"]))
            if interrupt_at is not None and not is_sent and interrupt_at in "".join(shown):
                is_sent = True
                self.kernel.interrupt_kernel()

        lines = CELLS[name].splitlines()
        indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
        code = "\n".join(line[indent:] for line in lines)
        self.client.execute_interactive(code, output_hook=show, timeout=90)
        assert is_sent == (interrupt_at is not None), shown
        return "".join(shown)

    def close(self):
        self.client.stop_channels()
        self.kernel.shutdown_kernel(now=True)


@pytest.fixture
def notebook():
    pytest.importorskip("ipykernel")
    pytest.importorskip("jupyter_client")
    directory = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    opened = Notebook(directory)
    yield opened
    opened.close()
    deadline = time.monotonic() + 15
    while os.listdir(directory) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = os.listdir(directory)
    shutil.rmtree(directory, ignore_errors=True)
    assert left == []


@pytest.mark.cluster
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_kernel_stays_usable_after_an_interrupt_and_after_an_error(notebook):
    assert notebook.run("definitions") == ""
    shown = notebook.run("interrupted", interrupt_at="training")
    assert "KeyboardInterrupt" in shown
    shown = notebook.run("again")
    assert "interrupted True True" in shown, shown
    assert "fitted 50 False" in shown, shown
    shown = notebook.run("failing")
    assert shown.count("ValueError: wrong on purpose") >= 1, shown
    assert not re.search(r"raylit/(driver|worker|trainer)", shown), shown
    shown = notebook.run("changed")
    assert "new True" in shown, shown

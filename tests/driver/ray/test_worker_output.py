"""Output of workers arrives in the driver once, in order, with its ranks."""

import io
import os
import sys
import time
from pathlib import Path

import pytest

from raylit.driver.ray.worker_output import WorkerOutput
from raylit.protocol.messages import Printed
from raylit.worker.process.stdout_capture import StdoutCapture

SCRIPT = """
    import logging, warnings
    import torch
    from torch.utils.data import DataLoader, Dataset
    import raylit as pl

    class Numbers(Dataset):
        def __len__(self):
            return 16
        def __getitem__(self, index):
            if index == 0:
                print("in the loader")
            return torch.ones(2)

    class Talks(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 1)
        def on_fit_start(self):
            print("all say this")
            print(f"rank {self.global_rank} says this")
            warnings.warn("mind the gap")
            logging.getLogger("mine").warning("logged")
            print("without an end", end="")
        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and self.global_rank == 1:
                print("about to fail")
                raise ValueError("bad number")
            return self.net(batch).sum()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    import sys, traceback
    sys.stderr = sys.stdout
    try:
        pl.fit(Talks(), DataLoader(Numbers(), batch_size=2, num_workers=1), num_workers=2, max_epochs=1,
               logger=False, enable_checkpointing=False)
    except ValueError:
        traceback.print_exc()
"""


def test_a_script_shows_each_line_once_and_the_users_frames_only(run_script):
    shown = run_script(SCRIPT)
    lines = shown.splitlines()
    for line in (
        "[all ranks] all say this",
        "[rank 0] rank 0 says this",
        "[rank 1] rank 1 says this",
        "[all ranks] logged",
        "[all ranks] without an end",
        "[rank 1] about to fail",
    ):
        assert lines.count(line) == 1, shown
    assert shown.count("UserWarning: mind the gap") == 1
    assert shown.count("in the loader") == 1
    assert shown.index("about to fail") < shown.index("In rank 1 of 2 on host")
    assert lines[-1] == "ValueError: bad number"
    assert shown.count("in training_step") == 1
    for noise in ("raylit/driver", "raylit/worker", "site-packages", "pid=", "(raylet)", "repeated"):
        assert noise not in shown, shown


KILLED = """
    import os, signal, time
    import raylit as pl
    from models import Regression, RegressionData

    class Dies(Regression):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2 and self.global_rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(batch, batch_idx)

    try:
        pl.fit(Dies(), RegressionData(), num_workers=2, max_epochs=1, logger=False, enable_checkpointing=False,
               enable_progress_bar=False)
    except pl.WorkerDied as error:
        print(error)
    time.sleep(1.5)  # for Ray to say something as well
    import ray

    @ray.remote(max_retries=0)
    def task():
        os._exit(1)

    try:
        ray.get(task.remote())
    except ray.exceptions.WorkerCrashedError:
        time.sleep(1.5)
"""


@pytest.mark.cluster
def test_a_workers_death_is_printed_once_and_others_are_unchanged(run_script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    shown = run_script(KILLED)
    assert shown.count("worker of rank 1") == 1, shown
    assert shown.count("(raylet)") == shown.count("A worker died or was killed") == 1, shown


def printed(*lines):
    return Printed(lines=tuple(("stdout", line) for line in lines))


def test_a_rank_keeps_its_order_and_common_lines_are_shown_once(capsys):
    worker_output = WorkerOutput(num_workers=2)
    worker_output.add(0, printed("a", "common", "b"))
    worker_output.add(1, printed("common"))
    assert capsys.readouterr().out == ""
    time.sleep(0.3)
    worker_output.print_due()
    assert capsys.readouterr().out == "[rank 0] a\n[all ranks] common\n[rank 0] b\n"


def test_a_single_worker_needs_no_label(capsys):
    WorkerOutput(num_workers=1).add(0, printed("a"))
    assert capsys.readouterr().out == "a\n"


@pytest.fixture
def make_output(monkeypatch):
    """Capture the streams; call it in the test itself, as pytest has other streams in a fixture."""

    def make():
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        return StdoutCapture(on_lines=lambda: None)

    return make


def taken(output):
    report = output.take()
    return [] if report is None else [text for _, text in report.lines]


def test_lines_are_complete_and_redrawn_ones_have_their_final_text(make_output):
    output = make_output()
    print("a", end="")
    print("b\nc", end="")
    sys.stderr.write("\r10%\r20%\n")
    assert taken(output) == ["ab", "20%"]
    output.finish_lines()
    assert taken(output) == ["c"]
    assert taken(output) == []


def test_excess_output_is_cut_and_counted(make_output):
    output = make_output()
    print("x\n" * 5000)
    assert len(taken(output)) == 2001
    print("again")
    assert taken(output) == ["again"]


def test_output_of_a_forked_process_arrives(make_output):
    output = make_output()
    pid = os.fork()
    if pid == 0:
        print("from the fork")
        os._exit(0)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 5
    lines = []
    while not lines and time.monotonic() < deadline:
        lines = taken(output)
        time.sleep(0.01)
    assert lines == ["from the fork"]

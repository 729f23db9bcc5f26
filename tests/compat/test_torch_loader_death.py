"""What raylit asks torch of a DataLoader's processes, on the real torch."""

import multiprocessing
import os
import signal
import time

import torch
from torch.utils.data import DataLoader, TensorDataset

from raylit.compat import torch_data
from raylit.compat.torch_data import find_loader_death


def test_the_death_of_a_loader_s_process_is_found():
    assert find_loader_death() is None
    batches = iter(DataLoader(TensorDataset(torch.zeros(80, 1)), num_workers=1))
    next(batches)
    before = {process.pid for process in multiprocessing.active_children()}
    [pid] = before
    death = None
    # torch's own handler of SIGCHLD raises at once; not this time.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while death is None and time.monotonic() < deadline:
            death = find_loader_death()
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGCHLD, handler)
    assert f"DataLoader worker (pid {pid}) is killed by signal" in str(death)


def test_without_the_private_name_there_is_no_answer(monkeypatch):
    monkeypatch.delattr(torch._C, "_error_if_any_worker_fails")
    assert torch_data.find_loader_death() is None

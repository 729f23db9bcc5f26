"""What is known as an error of memory, and a limit whose errors are real."""

import os
import re
import signal

import pytest
import torch

import raylit as pl
from raylit.accelerators import CUDAAccelerator
from raylit.errors import RemoteTraceback, WorkerDied
from raylit.tune.search.out_of_memory import classify_failure, drop_tracebacks


def died(reason):
    return WorkerDied(rank=1, host="a", reason=reason)


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (MemoryError(), "too large"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "too large"),
        (torch.cuda.OutOfMemoryError("HIP out of memory."), "too large"),
        (RuntimeError("CUDA error: out of memory"), "too large"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "too large"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"), "too large"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"), "too large"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "too large"),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), "too large"),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), "too large"),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), "too large"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), "too large"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "too large"),
        (OSError(12, "Cannot allocate memory"), "too large"),
        (RuntimeError("std::bad_alloc"), "too large"),
        (died("killed by Ray's memory monitor, as its host ran out of memory (8 of 8 GB were in use)"), "too large"),
        (died("killed by the kernel, probably out of memory (the host has 8 GB)"), "too large"),
        (died("crashed (segmentation fault)"), "crashed"),
        (died("its process ended without a word: killed (out of memory?), crashed in a library"), "crashed"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "crashed"),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp, unhandled system error"), "crashed"),
        (RuntimeError("shapes do not match"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_failures_are_classified_by_type_or_message(error, failure):
    assert classify_failure(error, CUDAAccelerator()) == failure


def caught(function):
    with pytest.raises(IndexError) as info:
        function()
    return info.value


def test_failures_are_classified_by_their_cause_and_frames_are_dropped():
    outer = None
    try:
        try:
            raise MemoryError
        except MemoryError as error:
            raise KeyError("step") from error
    except KeyError as error:
        outer = error
    assert classify_failure(outer, CUDAAccelerator()) == "too large"
    assert drop_tracebacks(outer).__traceback__ is outer.__cause__.__traceback__ is None
    error = caught(lambda: [][1])
    assert "[][1]" in str(drop_tracebacks(error).__cause__)
    error = RuntimeError("bug")
    error.__cause__ = RemoteTraceback("In rank 0: out of memory")  # only a text, of whatever
    assert classify_failure(error, CUDAAccelerator()) is None


class Allocates(pl.LightningModule):
    """Takes a megabyte for each sample of a batch; kills its process at one size."""

    def __init__(self, *, killed_at=0):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batch_size = 1
        self.killed_at = killed_at

    def training_step(self, batch, batch_idx):
        if len(batch) == self.killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        taken = torch.empty(len(batch), 250_000)
        return self.layer(batch).mean() + 0 * taken[0, 0].nan_to_num()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(512, 1), batch_size=self.batch_size)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_memory_limit_makes_large_batches_fail_and_is_removed_afterwards(quiet):
    model = Allocates()
    tuner = pl.Trainer(**quiet).tuner
    size = tuner.scale_batch_size(model, memory_limit_bytes=200_000_000, init_val=16)
    assert size == model.batch_size == 128
    statuses = dict(zip(tuner.batch_sizes.results["batch_size"], tuner.batch_sizes.results["status"], strict=True))
    assert statuses == {16: "fits", 32: "fits", 64: "fits", 128: "fits", 256: "too large"}
    assert "allocate memory" in tuner.batch_sizes.results["error"][-1]
    assert torch.empty(1_000_000_000, dtype=torch.uint8).numel() == 1_000_000_000


@pytest.mark.slow
def test_a_trial_that_runs_out_of_memory_or_is_killed_does_not_end_the_others(quiet):
    model = Allocates(killed_at=192)
    tuner = pl.Trainer(num_workers=1, **quiet).tuner
    size = tuner.scale_batch_size(
        model, mode="binsearch", memory_limit_bytes=210_000_000, init_val=128, max_trials=5, margin=0.1
    )
    results = tuner.batch_sizes.results
    assert dict(zip(results["batch_size"], results["status"], strict=True)) == {
        128: "fits",
        160: "fits",
        176: "fits",
        192: "crashed",
        256: "too large",
    }
    assert "killed by SIGKILL" in results["error"][3] or "without a word" in results["error"][3]
    assert "allocate memory" in results["error"][4]
    assert size == model.batch_size == 158


KILLED_BY_RAY = """
    import os, time, torch
    import raylit as pl
    from torch.utils.data import DataLoader

    class Eats(pl.LightningModule):
        batch_size = 1

        def __init__(self):
            super().__init__()
            self.batch_size = 1
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            self.eaten = []
            for _ in range(len(batch)):
                self.eaten.append(b"x" * 100_000_000)
                time.sleep(0.03)
            loss, self.eaten = self.layer(batch).mean(), []
            return loss

        def train_dataloader(self):
            return DataLoader(torch.ones(512, 1), batch_size=self.batch_size)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    if __name__ == "__main__":
        with open("/proc/meminfo") as lines:
            memory = {line.split()[0]: int(line.split()[1]) for line in lines}
        limit = 1 - (memory["MemAvailable:"] - 6_000_000) / memory["MemTotal:"]
        os.environ["RAY_memory_usage_threshold"] = str(limit)
        os.environ["RAY_memory_monitor_refresh_ms"] = "100"
        trainer = pl.Trainer(num_workers=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
        size = trainer.tuner.scale_batch_size(Eats(), init_val=8, steps_per_trial=1)
        results = trainer.tuner.batch_sizes.results
        print("SIZE", size, results["status"], "ERROR", results["error"][-1])
"""


@pytest.mark.cluster
@pytest.mark.timeout(180)
def test_a_trial_that_rays_memory_monitor_kills_is_too_large(run_script):
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    if available < 10_000_000:
        pytest.skip("needs 10 GB of free memory")
    shown = run_script(KILLED_BY_RAY, timeout_s=170.0)
    found = re.search(r"SIZE (\d+) .*'too large'\] ERROR .*killed by Ray's memory monitor", shown)
    assert found is not None, shown
    assert 8 <= int(found[1]) < 512  # of 100 MB each


def test_a_memory_limit_that_is_no_number_of_bytes_is_refused(quiet):
    with pytest.raises(pl.ConfigError, match="memory_limit_bytes='2 GB': must be a number of bytes"):
        pl.Trainer(**quiet).tuner.scale_batch_size(Allocates(), memory_limit_bytes="2 GB")

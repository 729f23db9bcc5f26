"""Errors that a user sees for an exception in a worker, and for a worker's death."""

import ctypes
import os
import pickle
import re
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
from models import Regression, RegressionData
from ray.core.generated.common_pb2 import ActorDiedErrorContext, NodeDeathInfo
from ray.exceptions import ActorDiedError

import raylit as pl
from raylit.driver.ray import failures
from raylit.driver.ray.failures import (
    describe_death,
    describe_end,
    explain_failure,
    is_at_one_line,
    is_harmless,
    raise_failures,
)
from raylit.worker.job import WorkerContext


def crash():
    ctypes.string_at(0)


DEEDS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(3),
    "crash": crash,
    "sys.exit": lambda: sys.exit(4),
    "interrupt": lambda: signal.raise_signal(signal.SIGINT),
}


class Does(Regression):
    def __init__(self, deed):
        super().__init__()
        self.deed = deed

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == self.trainer.world_size - 1:
            DEEDS[self.deed]()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("deed", "words"),
    [
        ("kill", r"killed by SIGKILL|without a word"),
        ("exit", r"exit code 3|without a word"),
        ("crash", r"segmentation fault|without a word"),
    ],
)
def test_a_death_is_described_in_the_error(deed, words, quiet):
    with pytest.raises(pl.WorkerDied, match=words) as caught:
        pl.fit(Does(deed), RegressionData(batch_size=4), num_workers=2, max_epochs=1, **quiet)
    assert caught.value.rank == 1
    assert "ray.exceptions" not in "".join(traceback.format_exception(caught.value))


def test_a_systemexit_of_a_hook_is_raised_as_itself(quiet):
    with pytest.raises(SystemExit) as caught:
        pl.fit(Does("sys.exit"), RegressionData(batch_size=4), num_workers=1, **quiet)
    assert caught.value.code == 4


KILLED_BY_RAY = """
    import os, time, torch
    import raylit as pl
    from torch.utils.data import DataLoader

    class Eats(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
        def training_step(self, batch, batch_idx):
            self.eaten = []
            for _ in range(50):
                self.eaten.append(b"x" * 100_000_000)
                time.sleep(0.1)
            return self.layer(batch).mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    if __name__ == "__main__":
        with open("/proc/meminfo") as lines:
            memory = {line.split()[0]: int(line.split()[1]) for line in lines}
        limit = 1 - (memory["MemAvailable:"] - 3_000_000) / memory["MemTotal:"]
        os.environ["RAY_memory_usage_threshold"] = str(limit)
        os.environ["RAY_memory_monitor_refresh_ms"] = "100"
        try:
            pl.fit(Eats(), DataLoader(torch.ones(4, 1)), num_workers=1, max_epochs=1, logger=False,
                   enable_checkpointing=False, enable_progress_bar=False)
        except pl.WorkerDied as error:
            print("DIED", error)
"""


class EndsAtStep3(Regression):
    def __init__(self, end):
        super().__init__()
        self.end = end

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == 3 and self.global_rank == 1:
            self.end()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("saving", "words"),
    [
        (True, r'checkpoint is \S+step=2\.ckpt: Trainer\(resume="auto"\) continues from it'),
        (False, "The run keeps no checkpoints"),
    ],
)
def test_a_death_says_how_far_the_run_had_come_and_how_to_continue(saving, words, tmp_path):
    callbacks = [pl.ModelCheckpoint(tmp_path, every_n_train_steps=2)] if saving else []
    trainer = pl.Trainer(
        num_workers=2, max_epochs=2, logger=False, enable_progress_bar=False, log_every_n_steps=1,
        enable_checkpointing=saving, callbacks=callbacks,
    )  # fmt: skip
    with pytest.raises(pl.WorkerDied, match=r"killed by SIGKILL|ended without a word") as caught:
        trainer.fit(EndsAtStep3(lambda: os.kill(os.getpid(), signal.SIGKILL)), RegressionData(batch_size=4))
    told = str(caught.value)
    # A save brings all reports before it to the driver; others may be lost with the group.
    least = 2 if saving else 0
    assert re.search(rf"The last step that it reported is [{least}-3], in epoch 0\.", told)
    assert re.search(words, told)
    assert str(pickle.loads(pickle.dumps(caught.value))) == told


def test_a_sys_exit_of_one_rank_is_printed(quiet, capfd):
    with pytest.raises(SystemExit) as caught:
        pl.fit(EndsAtStep3(lambda: sys.exit(0)), RegressionData(batch_size=4), num_workers=2, max_epochs=1, **quiet)
    assert caught.value.code == 0
    assert "raylit: sys.exit(0) in rank 1 of 2 on host" in capfd.readouterr().err


@pytest.mark.cluster
def test_an_out_of_memory_kill_by_ray_is_named_as_the_cause(run_script):
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    if available < 7_000_000:
        pytest.skip("needs 7 GB of free memory")
    shown = run_script(KILLED_BY_RAY)
    assert re.search(r"DIED worker of rank 0 .* killed by Ray's memory monitor, .*\([\d.]+ of [\d.]+ GB were", shown), (
        shown
    )
    assert "(raylet)" not in shown


class Confined(Regression):
    """Module whose rank 1 joins a control group with little memory and exceeds it."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 1:
            Path(self.group, "cgroup.procs").write_text(str(os.getpid()))
            for size in range(100_000_000, 2_000_000_000, 100_000_000):
                self.eaten = b"x" * size
        return super().training_step(batch, batch_idx)


@pytest.fixture
def small_group():
    """Create a control group, of version 1 or 2, with 200 MB."""
    for parent, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max"), ("unified", "memory.max")):
        group = Path("/sys/fs/cgroup", parent, f"raylit-test-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text("200000000")
        except OSError:
            group.rmdir()
            continue
        yield group
        deadline = time.monotonic() + 10
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        group.rmdir()
        return
    pytest.skip("control groups cannot be written to here")


def test_an_out_of_memory_kill_by_the_kernel_is_named_as_the_cause(small_group, quiet):
    module = Confined()
    module.group = str(small_group)
    with pytest.raises(pl.WorkerDied, match=r"killed by the kernel, probably out of memory|without a word") as caught:
        pl.fit(module, RegressionData(batch_size=4), num_workers=2, max_epochs=1, **quiet)
    assert caught.value.rank == 1


class Wrong(Regression):
    def training_step(self, batch, batch_idx):
        raise ValueError("wrong on purpose")


def test_in_process_tracebacks_end_at_the_users_frame_without_raylit_frames(quiet, monkeypatch):
    def files():
        with pytest.raises(ValueError, match="on purpose") as caught:
            pl.fit(Wrong(), RegressionData(), num_workers=0, **quiet)
        return [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]

    assert files() == [__file__, __file__]
    monkeypatch.setenv("RAYLIT_FULL_TRACEBACK", "1")
    assert any(file.endswith("coordinator.py") for file in files())


def failed(error, rank):
    try:
        raise error
    except Exception as caught:
        return explain_failure(caught, WorkerContext(rank=rank, world_size=4, host="here"))


def test_the_users_error_is_preferred_to_collective_errors_that_follow():
    closed = RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.1]:4711")
    reports = [failed(closed, 0), failed(KeyError("x"), 2), failed(ValueError("odd"), 3)]
    with pytest.raises(KeyError) as caught:
        raise_failures(reports, num_workers=4)
    text = str(caught.value.__cause__)
    assert "In rank 2 of 4 on host here" in text
    assert "Meanwhile in rank 3: ValueError: odd" in text
    assert "Meanwhile in rank 0: RuntimeError: [../gloo" in text


def test_the_end_of_a_process_is_read_from_its_log_and_the_kernels_counter():
    log = "[2026-11-30 16:09:47,596 E 7 9] logging.cc:474: *** SIGSEGV received at time=1796054987 on cpu 0 ***\n"
    assert "segmentation fault" in describe_end(log, pid=7, num_oom_kills=1)
    assert describe_end(log, pid=8, num_oom_kills=0) is None  # that of a child, which writes to the same log
    assert "SIGSYS" in describe_end(log.replace("SIGSEGV", "SIGSYS"), pid=7, num_oom_kills=0)
    assert describe_end("", pid=7, num_oom_kills=1).startswith("killed by the kernel, probably out of memory")


def test_memory_in_use_is_the_containers_if_its_limit_is_below_the_hosts(tmp_path, monkeypatch):
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    limit.write_text(f"{2**30}\n")
    used.write_text(f"{2**29}\n")
    monkeypatch.setattr(failures, "_CONTAINER_FILES", [(str(limit), str(used))])
    assert failures.describe_memory_use() == "the container has 1.0 GB, of which 0.5 GB are still in use"
    limit.write_text("max\n")
    assert failures.describe_memory_use().startswith("the host has")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("odd"), True),
        (RuntimeError("shapes do not match"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), False),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer"), False),
        (MemoryError(), False),
        (SystemExit(1), False),
        (pl.WorkerDied(rank=0, host="a", reason="killed"), False),
    ],
)
def test_a_users_mistake_leaves_the_process_usable(error, expected):
    assert is_harmless(error) is expected
    outer = KeyError("outer")
    outer.__cause__ = error
    assert is_harmless(outer) is expected


def test_ranks_that_fail_at_different_places_are_not_at_one_line():
    assert is_at_one_line([failed(KeyError("x"), 0), failed(KeyError("x"), 1)])
    assert not is_at_one_line([failed(KeyError("x"), 0), failed(KeyError("y"), 1)])


def died(text):
    """Build the error with the text of Ray 2.60."""
    error = ActorDiedError()
    error.error_msg = "The actor died unexpectedly before finishing this task.\n\tclass_name: WorkerActor\n" + text
    error.args = (error.error_msg,)
    return error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Worker exits unexpectedly. Worker exits with an exit code 4.", "its process ended with exit code 4"),
        ("Worker exits with an exit code 1. The process receives a SIGTERM.", "exit code 1, after a SIGTERM"),
        ("Worker unexpectedly exits with a connection error code 2. End of file. Some common", "without a word"),
        (
            "The actor died because its node has died. Node Id: 91f\n\tthe actor's node was terminated unexpectedly: "
            "health check failed\nThe actor never ran - it was cancelled.",
            "Ray has lost its host (terminated unexpectedly: health check failed)",
        ),
        ("The actor died because its node has died.", "Ray has lost its host (it does not say why)"),
        ("Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: Task was killed", "Ray's memory monitor"),
    ],
)
def test_a_death_reported_by_ray_is_described_in_the_error(text, words):
    assert words in describe_death(died(text), None)
    assert "class_name" not in describe_death(died(text), None)


def test_a_worker_of_a_drained_host_is_described_as_preempted():
    drained = NodeDeathInfo(reason=NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED, reason_message="spot")
    error = ActorDiedError(ActorDiedErrorContext(actor_id=bytes(16), error_message="died", node_death_info=drained))
    assert describe_death(error, None) == "its host was preempted: the cluster has drained it"

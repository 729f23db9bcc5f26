"""Leftovers of runs: however a run ends, no process, temporary file, shared memory or partial checkpoint is left.

On a user's cluster no actor and no placement group is left either.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from models import Regression, RegressionData

import raylit as pl

SCRIPT = """
import os, signal, sys, time
sys.path.insert(0, {tests!r})
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
from torch.utils.data import DataLoader
from models import Regression, make_data
import raylit as pl


class Slow(Regression):
    def training_step(self, batch, batch_idx):
        open(os.path.join({place!r}, "steps-%d" % self.trainer.global_rank), "a").write("step\\n")
        time.sleep(0.1)
        return super().training_step(batch, batch_idx)


trainer = pl.Trainer(num_workers=2, max_steps={max_steps}, logger=False, enable_progress_bar=False)
try:
    trainer.fit(Slow(), DataLoader(make_data(480), batch_size=8, num_workers=1))
finally:
    print("interrupted", trainer.interrupted, trainer.global_step, flush=True)
"""


class Driver:
    """A user's script with a Ray node of its own, in a process group of its own, as in a terminal."""

    def __init__(self, place, *, max_steps, **variables):
        # Ray keeps sockets there, whose paths may not exceed 107 characters.
        self.mark = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
        self.place = place
        script = place / "script.py"
        tests = str(Path(__file__).parents[2])
        script.write_text(SCRIPT.format(tests=tests, place=str(place), max_steps=max_steps))
        environment = {**os.environ, "RAY_TMPDIR": self.mark, "RAYLIT_TEST_MARK": self.mark, **variables}
        self.output = place / "output"
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                cwd=place,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_steps(self, count):
        files = [self.place / f"steps-{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text().count("\n") >= count for file in files), 90)

    def end(self, *, within_s):
        """Return the exit code as subprocess has it."""
        return self.process.wait(timeout=within_s)

    def processes(self):
        """Return the command lines of the driver's remaining processes.

        These are its descendants and processes with open files below its temporary directory. Descendants may have been
        adopted by others; Ray's agents overwrite their environment with their titles.
        """
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                files = [os.readlink(file) for file in (entry / "fd").iterdir()]
                is_marked = f"RAYLIT_TEST_MARK={self.mark}".encode() in (entry / "environ").read_bytes()
                if is_marked or any(file.startswith(self.mark) for file in files):
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it has just ended
        return [line for line in found if line]

    def clean_up(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.mark, ignore_errors=True)


def wait_until(is_true, limit_s):
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def start_driver(tmp_path):
    drivers = []

    def start(**options):
        drivers.append(Driver(tmp_path, **options))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.clean_up()


@pytest.mark.parametrize(
    ("end", "exit_code"),
    [
        ("normal", 0),
        ("terminal's Ctrl-C", -signal.SIGINT),
        pytest.param("SIGTERM", 128 + signal.SIGTERM, marks=pytest.mark.slow),
        ("SIGKILL", -signal.SIGKILL),
    ],
)
def test_a_run_leaves_no_processes_and_files(end, exit_code, start_driver, tmp_path):
    shared_before = set(os.listdir("/dev/shm"))
    driver = start_driver(max_steps=4 if end == "normal" else -1)
    driver.wait_for_steps(3)
    if end != "normal":  # each actor has a loader process, which bears its name
        assert sum("ray::WorkerActor" in line for line in driver.processes()) >= 2
    if end == "terminal's Ctrl-C":
        os.killpg(driver.process.pid, signal.SIGINT)
    elif end != "normal":
        driver.process.send_signal(getattr(signal, end))
    assert driver.end(within_s=30) == exit_code, driver.output.read_text()
    is_saved = end != "SIGKILL"
    assert [file.suffix for file in tmp_path.rglob("*.ckpt")] == [".ckpt"] * is_saved
    if is_saved:
        assert f"interrupted {end != 'normal'}" in driver.output.read_text()
    if end == "SIGKILL":  # else there is nothing to wait for
        wait_until(lambda: driver.processes() == [] and os.listdir(driver.mark) == [], 10)
    assert driver.processes() == []
    assert os.listdir(driver.mark) == []
    assert list(tmp_path.rglob("*.tmp")) == []
    assert set(os.listdir("/dev/shm")) <= shared_before


OBSERVER = """
import sys
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)
print(cluster.address, flush=True)
for line in sys.stdin:
    actors = [state for state in ray._private.state.actors().values() if state["State"] != "DEAD"]
    groups = [entry for entry in ray.util.placement_group_table().values() if entry["state"] != "REMOVED"]
    print(len(actors), len(groups), ray.available_resources().get("CPU", 0.0), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.fixture
def observer(tmp_path):
    """Start a user's cluster; it answers a line with its numbers of actors, placement groups and free CPUs."""
    directory = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    environment = {**os.environ, "RAY_TMPDIR": directory, "RAY_AUTH_MODE": "disabled"}
    with open(tmp_path / "observer", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", OBSERVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    yield process
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.cluster
def test_a_killed_driver_frees_its_resources_on_the_users_cluster(observer, start_driver, tmp_path):
    def resources_in_use():
        observer.stdin.write("\n")
        observer.stdin.flush()
        return observer.stdout.readline().split()

    address = observer.stdout.readline().strip()
    assert address, (tmp_path / "observer").read_text()
    assert resources_in_use() == ["0", "0", "2.0"]
    driver = start_driver(max_steps=-1, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    driver.wait_for_steps(3)
    assert resources_in_use() == ["2", "1", "0.0"]
    driver.process.kill()
    driver.end(within_s=30)
    wait_until(lambda: resources_in_use() == ["0", "0", "2.0"], 10)
    # torch's loader processes look for their parent every 5 s.
    wait_until(lambda: not any("ray::WorkerActor" in line for line in driver.processes()), 15)


FREED = """
    import time
    import ray, torch
    import raylit as pl
    from models import Regression, RegressionData

    def resources_in_use():
        actors = [state for state in ray._private.state.actors().values() if state["State"] != "DEAD"]
        groups = [entry for entry in ray.util.placement_group_table().values() if entry["state"] != "REMOVED"]
        return len(actors), len(groups), ray.available_resources().get("CPU", 0.0)

    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    pl.fit(Regression(), RegressionData(), num_workers=2, max_steps=2, logger=False, enable_checkpointing=False,
           enable_progress_bar=False)
    print("warm", resources_in_use())
    pl.shutdown()
    deadline = time.monotonic() + 10
    while resources_in_use() != (0, 0, 2.0) and time.monotonic() < deadline:
        time.sleep(0.05)
    print("freed", resources_in_use(), ray.is_initialized())
    ray.shutdown()
"""


@pytest.mark.cluster
def test_shutdown_frees_raylits_resources_in_the_users_ray(run_script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    shown = run_script(FREED)
    assert "warm (2, 1, 0.0)" in shown
    assert "freed (0, 0, 2.0) True" in shown


@pytest.mark.filterwarnings("ignore:the checkpoint directory .* is not empty")
def test_the_next_run_removes_partial_files_of_a_killed_one(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(timeout=60)
    abandoned = tmp_path / f".{socket.gethostname()}.{ended.pid}.0123.tmp"
    others = [
        tmp_path / f".{socket.gethostname()}.{os.getpid()}.0123.tmp",
        tmp_path / f".another-host.{ended.pid}.0123.tmp",
        tmp_path / "model.ckpt",
    ]
    for file in (abandoned, *others):
        file.touch()
    pl.fit(
        Regression(),
        RegressionData(),
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        callbacks=[pl.ModelCheckpoint(dirpath=tmp_path, every_n_epochs=5, save_last=None)],
    )
    assert not abandoned.exists()
    assert all(file.exists() for file in others)

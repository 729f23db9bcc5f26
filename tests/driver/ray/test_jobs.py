"""Trainings as jobs of a Ray cluster: `ray job submit` to a head on the loopback interface, from a user's directory."""

import contextlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest

from raylit.compat.ray_core import read_package_limits
from raylit.driver.ray.doctor import check_working_dir

CHECKOUT = pathlib.Path(__file__).parents[3]
COMMANDS = pathlib.Path(sys.executable).parent
JOB_SERVER = (
    "aiohttp_cors",
    "opencensus",
    "opentelemetry",
    "prometheus_client",
    "smart_open",
    "colorful",
    "virtualenv",
)
"""Modules of ray[default], without which a head has no job server."""
DEADLINE_S = 100

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

NET = """
import os
import pathlib
import time

import torch

import raylit as pl


class Net(pl.LightningModule):
    def __init__(self, step_s: float = 0.0, is_faulty: bool = False):
        super().__init__()
        self.step_s, self.is_faulty = step_s, is_faulty
        self.layer = torch.nn.Linear(2, 1)

    def on_train_start(self):
        print(f"{os.environ['GREETING']} from step {self.global_step}")

    def training_step(self, batch, batch_idx):
        if self.is_faulty:
            raise ValueError("a mistake of the user's")
        time.sleep(self.step_s)
        if self.step_s and self.global_rank == 0 and batch_idx == 5:
            pathlib.Path(os.environ["MARK"]).touch()
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(pl.DataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(2000, 2), batch_size=1)
"""

# Only the head has a resource "disk": on a node of raylit's own the workers would not start.
CONFIG = """
model: {class_path: mine.net.Net}
data: {class_path: mine.net.Data}
seed_everything: 0
trainer:
  num_workers: 2
  resources_per_worker: {CPU: 1, disk: 1}
  max_epochs: 1
  resume: auto
  enable_progress_bar: false
  enable_model_summary: false
"""


def find_free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def find_processes(directory):
    """Return the ids of the processes whose command line names this directory."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(directory) in path.read_bytes() and int(path.parts[2]) != os.getpid():
                found.append(int(path.parts[2]))
    return found


@pytest.fixture(scope="module")
def submit():
    """Start a head; returns a function that runs `ray job NAME ...` against it. All of the head is ended afterwards."""
    if missing := [name for name in JOB_SERVER if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs Ray's job server (pip install 'ray[default]'), here are no {', '.join(missing)}")
    directory = tempfile.mkdtemp(prefix="rl-", dir="/tmp")
    variables = {
        **os.environ,
        "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), os.environ.get("PYTHONPATH", "")]),
        "RAY_TMPDIR": directory,
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    address = f"http://127.0.0.1:{(port := find_free_port())}"
    ports = ["--port", str(find_free_port()), "--dashboard-port", str(port)]
    ports += ["--dashboard-agent-listen-port", str(find_free_port())]
    loopback = ["--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1"]
    size = [
        "--num-cpus",
        "3",
        "--resources",
        '{"disk": 2}',
        "--object-store-memory",
        str(10**8),
        "--temp-dir",
        directory,
    ]
    command = [str(COMMANDS / "ray"), "start", "--head", "--block", *loopback, *ports, *size]

    def run(name, *arguments):
        return subprocess.run(
            [str(COMMANDS / "ray"), "job", name, "--address", address, *arguments],
            env=variables,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    with open(os.path.join(directory, "head.log"), "wb") as log:
        head = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while run("list").returncode != 0:
            said = pathlib.Path(directory, "head.log").read_text()
            assert head.poll() is None, said
            assert time.monotonic() < deadline, said
        yield run
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        for process in {head.pid, *find_processes(directory)}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        head.wait(10)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def project(tmp_path):
    """A user's directory: a package and a config."""
    package = tmp_path / "project" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "net.py").write_text(NET)
    (package.parent / "run.yaml").write_text(CONFIG)
    return package.parent


def arguments_of(project, *options, submission=()):
    variables = {"GREETING": "good day", "MARK": str(project.parent / "mark"), "RAY_JOB_STOP_WAIT_TIME_S": "60"}
    environment = json.dumps({"env_vars": variables})
    root = ["--trainer.default_root_dir", str(project.parent / "runs")]
    job = ["--working-dir", str(project), "--runtime-env-json", environment, *submission]
    return [*job, "--", "raylit", "fit", "--config", "run.yaml", *root, *options]


def test_a_stopped_job_saves_and_the_next_one_continues(submit, project):
    name = f"stopped-{os.getpid()}"
    slow = arguments_of(project, "--model.step_s", "0.1", submission=("--no-wait", "--submission-id", name))
    started = submit("submit", *slow)
    assert started.returncode == 0, started.stdout + started.stderr
    deadline = time.monotonic() + DEADLINE_S
    while not (project.parent / "mark").exists():
        assert time.monotonic() < deadline, submit("logs", name).stdout
        time.sleep(0.2)
    submit("stop", name)
    said = submit("logs", name).stdout
    assert "good day from step 0" in said
    assert "SIGTERM: the run ends after this step and is saved" in said
    assert f"Job '{name}' was stopped" in submit("status", name).stdout
    assert list((project.parent / "runs").rglob("*.ckpt")) != []

    done = submit("submit", *arguments_of(project, "--trainer.max_steps", "400"))
    assert done.returncode == 0, done.stdout + done.stderr
    [step] = [line.split("from step ")[1] for line in done.stdout.splitlines() if "good day from step" in line]
    assert 5 <= int(step) < 400, done.stdout


def test_a_users_exception_fails_the_job_with_its_traceback(submit, project):
    failed = submit("submit", *arguments_of(project, "--model.is_faulty", "true"))
    said = failed.stdout + failed.stderr
    assert failed.returncode == 1, said
    assert "ValueError: a mistake of the user's" in said
    assert 'raise ValueError("a mistake of the user\'s")' in said


def test_a_working_directory_over_the_limit_is_refused_where_the_doctor_says_so(submit, project):
    limit = read_package_limits()[0]
    with (project / "data.bin").open("wb") as file:
        file.truncate(limit + 2**20)
    refused = submit("submit", *arguments_of(project))
    assert refused.returncode == 1
    assert f"Maximum request body size {limit} exceeded" in refused.stderr
    [problem] = check_working_dir(str(project))
    assert "data.bin 101 MiB" in problem.found
    (project / ".rayignore").write_text("data.bin\n")
    assert list(check_working_dir(str(project))) == []
    done = submit("submit", *arguments_of(project, "--trainer.max_steps", "2"))
    assert done.returncode == 0, done.stdout + done.stderr

"""The SLURM script: its directives, and a run of it beside stand-ins for srun, ray and raylit.

sbatch is not there to ask: its options are compared with a list made from its manual.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster_commands import CHECKOUT, CLUSTER

SCRIPT = CLUSTER / "slurm.sbatch"
OPTIONS = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"(\w+:)?\d+",
    "cpus-per-task": r"\d+",
    "mem": r"\d+[KMGT]?",
    "exclusive": r"(user|mcs|topo)?",
    "time": r"(\d+-)?\d+(:\d\d){0,2}",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"[\w%./-]+",
    "signal": r"(R?B?:)?(USR1|USR2|TERM|INT|HUP)(@\d+)?",
}
"""Options of sbatch by their long names, with a pattern for the value."""

PROGRAMS = {
    # Takes its own options away and runs the command on this one node.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "ray": 'echo "ray $* in $RAY_TMPDIR" >> "$CALLS"; while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
    "raylit": 'echo "raylit $* at $RAY_ADDRESS with ${#RAY_AUTH_TOKEN}" >> "$CALLS"; '
    'trap "echo saved >> $CALLS; exit $EXIT_CODE" TERM; echo started >> "$CALLS"; '
    'for i in $(seq "$SECONDS_TO_RUN"0); do sleep 0.1; done; exit "$EXIT_CODE"',
    "scontrol": 'echo "scontrol $*" >> "$CALLS"',
    "hostname": "echo 127.0.0.1 10.0.0.7 10.1.0.7",
}
"""Stand-ins for what SLURM's nodes have; `ray stop`, with which the real `symmetric-run` ends, must not run here."""


def read_directives() -> dict[str, str]:
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    directives = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (directive.partition("=") for directive in directives)}


def test_directives_are_options_of_sbatch() -> None:
    directives = read_directives()
    assert len(directives) == len(re.findall(r"^#SBATCH", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))
    wrong = {name: value for name, value in directives.items() if not re.fullmatch(OPTIONS.get(name, "(?!)"), value)}
    assert wrong == {}


def test_directives_are_those_that_the_script_relies_on() -> None:
    directives = read_directives()
    assert directives["ntasks-per-node"] == "1"
    assert {"exclusive", "requeue"} <= directives.keys()
    assert directives["signal"].startswith("B:USR1@")
    assert directives["open-mode"] == "append"  # a requeued job keeps what the first one wrote
    assert "/" not in directives["output"]  # in a directory that exists


def test_directives_come_before_the_first_command() -> None:
    """Sbatch does not read on behind it."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert [line for line in lines[first:] if line.startswith("#SBATCH")] == []


class Job:
    """The script on one node, with stand-ins for the programs that it calls."""

    def __init__(self, directory: Path, *, seconds: int, exit_code: int) -> None:
        programs = directory / "bin"
        programs.mkdir()
        for name, body in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
            (programs / name).chmod(0o755)
        self._calls = directory / "calls"
        self._calls.touch()
        environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "SECONDS_TO_RUN": str(seconds),
            "EXIT_CODE": str(exit_code),
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_GPUS_ON_NODE": "4",
            "SLURM_CPUS_PER_TASK": "32",
            "SLURM_JOB_ID": "123",
            "RAYLIT_VENV": str(directory / "venv"),
            "RAYLIT_ROOT": "/shared/digits",
        }
        self.process = subprocess.Popen(["bash", str(SCRIPT)], cwd=CHECKOUT, env=environment)

    def read_calls(self) -> list[str]:
        return self._calls.read_text(encoding="utf-8").splitlines()

    def wait_for(self, line: str) -> None:
        deadline = time.monotonic() + 60
        while line not in self.read_calls():
            assert time.monotonic() < deadline, self.read_calls()
            time.sleep(0.05)


@pytest.mark.parametrize("exit_code", [0, 3])
def test_the_training_runs_on_the_cluster_of_the_job_and_its_code_is_the_jobs(exit_code: int, tmp_path: Path) -> None:
    job = Job(tmp_path, seconds=0, exit_code=exit_code)
    assert job.process.wait(60) == exit_code
    ray, raylit, *rest = job.read_calls()
    assert ray.startswith("ray symmetric-run --address 10.0.0.7:6379 --min-nodes 1 --num-cpus=32 --num-gpus=4 ")
    assert ray.endswith(" in /tmp/ray-123")
    assert "--temp-dir" not in ray  # with it, symmetric-run's own ray.init() misses the head
    assert "--trainer.num_workers 4 --trainer.default_root_dir /shared/digits" in raylit
    assert raylit.endswith(" at 10.0.0.7:6379 with 64")
    assert rest == ["started"]


def test_before_its_time_is_over_the_job_saves_and_is_requeued(tmp_path: Path) -> None:
    job = Job(tmp_path, seconds=60, exit_code=7)
    job.wait_for("started")
    job.process.send_signal(signal.SIGUSR1)
    job.process.wait(60)
    assert job.read_calls()[2:] == ["started", "saved", "scontrol requeue 123"]
